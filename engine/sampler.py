"""Logits to tokens, all rows of a step at once; what a row gets never depends on the other rows.

Order: repetition, frequency and presence penalties, logit bias; log probabilities are taken here; tokens that may not
come yet are excluded; greedy rows take the largest logit, the lowest id among equals. Sampled rows go on: temperature,
top-k, top-p over what top-k left, min-p; tokens exactly as likely as the last one kept are kept too.

Sampling inverts the cumulative distribution, in order of token id, at one uniform number per (seed, position), where
position is the token's place in the sequence, prompt included. So a token is the same alone, in any batch, after a
preemption, and on another engine that continues the sequence.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field

import torch

_MASK = (1 << 64) - 1
# Widths at which to look for the nucleus before sorting whole rows: it is nearly always among a few hundred tokens.
_NUCLEUS_WIDTHS = (256, 4096)


@dataclass(frozen=True, slots=True)
class Sampling:
    """How a request's tokens are chosen. Temperature 0 is greedy; the other defaults change nothing."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    top_logprobs: int = 0

    @property
    def penalizes(self) -> bool:
        """Whether tokens already seen matter."""
        return (self.repetition_penalty, self.frequency_penalty, self.presence_penalty) != (1.0, 0.0, 0.0)


@dataclass(frozen=True, slots=True)
class SampleRow:
    """One row to choose a token for.

    Attributes:
        tokens: prompt and answer so far.
        prompt_length: how many of them are the prompt.
        forbidden: token ids that must not be chosen.
    """

    sampling: Sampling
    tokens: Sequence[int]
    prompt_length: int
    forbidden: Set[int] = frozenset()


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Natural log probability of a token, and the most likely tokens at its place, most likely first."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True)
class Sampled:
    """The token of a row; its log probability when asked for."""

    token: int
    logprob: TokenLogprob | None


@torch.inference_mode()
def sample(logits: torch.Tensor, rows: Sequence[SampleRow]) -> list[Sampled | None]:
    """Chooses a token for each row of logits [len(rows), vocab] float32; logits are overwritten.

    None where a row has a NaN, a positive infinity, or nothing but negative infinities.
    """
    finite = torch.isfinite(logits.amax(-1)).tolist()
    _adjust(logits, rows)
    logprobs = {
        index: torch.log_softmax(logits[index], -1) for index, row in enumerate(rows) if row.sampling.top_logprobs
    }
    for index, row in enumerate(rows):
        if row.forbidden:
            logits[index, sorted(row.forbidden)] = float("-inf")
    tokens = logits.argmax(-1).tolist()
    drawn = [index for index, row in enumerate(rows) if row.sampling.temperature > 0 and finite[index]]
    if drawn:
        for index, token in zip(drawn, _draw(logits[drawn], [rows[index] for index in drawn]), strict=True):
            tokens[index] = token
    return [
        Sampled(tokens[index], _logprob(logprobs.get(index), tokens[index], row.sampling.top_logprobs))
        if finite[index]
        else None
        for index, row in enumerate(rows)
    ]


def uniform(seed: int, position: int) -> float:
    """The random number in [0, 1) of a place in a sequence: two rounds of SplitMix64 over seed and position."""
    return (_mix(_mix(seed & _MASK) + position & _MASK) >> 11) * 2.0**-53


def _mix(state: int) -> int:
    state = state + 0x9E3779B97F4A7C15 & _MASK
    state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 & _MASK
    state = (state ^ state >> 27) * 0x94D049BB133111EB & _MASK
    return state ^ state >> 31


def _adjust(logits: torch.Tensor, rows: Sequence[SampleRow]) -> None:
    """Penalties and bias, in place, on the rows that ask for them."""
    for index, row in enumerate(rows):
        sampling = row.sampling
        if sampling.penalizes:
            _penalize(logits[index], row)
        if sampling.logit_bias:
            ids = torch.tensor(list(sampling.logit_bias), device=logits.device)
            logits[index, ids] += torch.tensor(list(sampling.logit_bias.values()), device=logits.device)


def _penalize(logits: torch.Tensor, row: SampleRow) -> None:
    """One row, in place: repetition over prompt and answer, frequency and presence over the answer."""
    sampling = row.sampling
    if sampling.repetition_penalty != 1.0:
        seen = torch.tensor(sorted(set(row.tokens)), device=logits.device)
        scores = logits[seen]
        penalty = sampling.repetition_penalty
        logits[seen] = torch.where(scores > 0, scores / penalty, scores * penalty)
    counts = Counter(row.tokens[row.prompt_length :])
    if counts and (sampling.frequency_penalty or sampling.presence_penalty):
        answered = torch.tensor(list(counts), device=logits.device)
        times = torch.tensor(list(counts.values()), dtype=logits.dtype, device=logits.device)
        logits[answered] -= times * sampling.frequency_penalty + sampling.presence_penalty


def _draw(logits: torch.Tensor, rows: Sequence[SampleRow]) -> list[int]:
    """Samples every row of logits [rows, vocab]."""
    temperature = _column(logits, [row.sampling.temperature for row in rows])
    # The largest logit becomes 0 first: a tiny temperature must not overflow to infinity.
    probs = torch.softmax((logits - logits.amax(-1, keepdim=True)) / temperature, -1)
    probs = _truncate(probs, [row.sampling for row in rows])
    cumulative = probs.cumsum(-1, dtype=torch.float64)
    total = cumulative[:, -1:]
    places = [uniform(row.sampling.seed, len(row.tokens)) for row in rows]
    target = torch.tensor(places, dtype=torch.float64, device=logits.device)[:, None] * total
    # Rounding may lift the target to the total itself, which no entry exceeds.
    target = torch.minimum(target, torch.nextafter(total, torch.zeros_like(total)))
    tokens: list[int] = (cumulative > target).int().argmax(-1).tolist()
    return tokens


def _truncate(probs: torch.Tensor, samplings: Sequence[Sampling]) -> torch.Tensor:
    """Zeroes what top-k, top-p and min-p drop. Rows need not sum to 1 afterwards."""
    vocab = probs.shape[-1]
    ks = [min(sampling.top_k or vocab, vocab) for sampling in samplings]
    if min(ks) < vocab:
        widest = max((k for k in ks if k < vocab), default=1)
        best = probs.topk(widest, -1).values
        floors = [best[index, k - 1] if k < vocab else best.new_zeros(()) for index, k in enumerate(ks)]
        probs = probs.masked_fill(probs < torch.stack(floors)[:, None], 0.0)
    if any(sampling.top_p < 1 for sampling in samplings):
        share = _column(probs, [sampling.top_p for sampling in samplings])
        probs = probs.masked_fill(probs < _nucleus_floor(probs, share), 0.0)
    if any(sampling.min_p > 0 for sampling in samplings):
        least = _column(probs, [sampling.min_p for sampling in samplings])
        probs = probs.masked_fill(probs < probs.amax(-1, keepdim=True) * least, 0.0)
    return probs


def _nucleus_floor(probs: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
    """Smallest probability inside each row's nucleus, [rows, 1]; 0 where the share is 1, which drops nothing."""
    vocab = probs.shape[-1]
    wanted = share.double() * probs.sum(-1, keepdim=True, dtype=torch.float64)
    narrow = (share < 1).flatten()
    for width in (*_NUCLEUS_WIDTHS, vocab):
        best = probs.topk(min(width, vocab), -1).values
        cumulative = best.cumsum(-1, dtype=torch.float64)
        if width >= vocab or bool((cumulative[:, -1:] >= wanted)[narrow].all()):
            break
    # A token is inside while the mass before it has not reached the share.
    inside = (cumulative - best < wanted).sum(-1, keepdim=True).clamp_(min=1)
    return best.gather(-1, inside - 1).masked_fill(~narrow[:, None], 0.0)


def _column(like: torch.Tensor, values: list[float]) -> torch.Tensor:
    return torch.tensor(values, dtype=like.dtype, device=like.device)[:, None]


def _logprob(logprobs: torch.Tensor | None, token: int, count: int) -> TokenLogprob | None:
    if logprobs is None:
        return None
    values, ids = logprobs.topk(min(count, logprobs.shape[-1]))
    return TokenLogprob(token, float(logprobs[token]), tuple(zip(ids.tolist(), values.tolist(), strict=True)))
