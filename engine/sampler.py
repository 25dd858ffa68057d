"""Logits to tokens, all rows of a step at once; what a row gets never depends on the other rows.

Order: repetition, frequency and presence penalties, logit bias; log probabilities are taken here; tokens that may not
come yet are excluded; greedy rows take the largest logit, the lowest id among equals. Sampled rows go on: temperature,
top-k, top-p over what top-k left, min-p; tokens exactly as likely as the last one kept are kept too.

Sampling inverts the cumulative distribution, in order of token id, at one uniform number per (seed, position), where
position is the token's place in the sequence, prompt included. So a token is the same alone, in any batch, after a
preemption, and on another engine that continues the sequence.

Nothing is done to rows that do not ask for it: greedy rows cost a look at their largest logits and no more.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field

import torch

from engine.logprobs import TokenLogprob, logprobs_of
from engine.penalties import Bias, Penalty, SeenTokens, add_bias, penalize

_MASK = (1 << 64) - 1
# Widths at which to look for the nucleus before sorting whole rows: it is nearly always among a few hundred tokens.
_NUCLEUS_WIDTHS = (256, 4096)
# The cumulative distribution is taken over blocks of this many tokens first, then inside of one.
_BLOCK = 256


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


class History:
    """What the choice of a sequence's next token needs of its tokens and its request, kept from token to token.

    Attributes:
        seen: None where there is no penalty.
        bias: None where there is none.
    """

    def __init__(self, sampling: Sampling, prompt: Sequence[int]) -> None:
        # The other penalties do not look at the prompt.
        relevant = prompt if sampling.repetition_penalty != 1.0 else ()
        self.seen = SeenTokens(relevant) if sampling.penalizes else None
        self.bias = Bias(sampling.logit_bias) if sampling.logit_bias else None

    def push(self, token: int) -> None:
        """Adds a token of the answer."""
        if self.seen is not None:
            self.seen.push(token)


@dataclass(frozen=True, slots=True)
class SampleRow:
    """One row to choose a token for.

    Attributes:
        position: the token's place in its sequence.
        history: has all tokens of the answer so far.
        forbidden: token ids that must not be chosen.
    """

    sampling: Sampling
    position: int
    history: History
    forbidden: Set[int] = frozenset()


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
    _adjust(logits, rows)
    is_finite = torch.isfinite(logits.amax(-1))
    allowed = logits
    if any(row.forbidden for row in rows):
        allowed = _without_forbidden(logits, rows)
        is_finite &= torch.isfinite(allowed.amax(-1))
    finite: list[bool] = is_finite.tolist()
    tokens = _choose(allowed, rows, finite)
    logprobs: dict[int, TokenLogprob | None] = {}
    asked = [index for index, row in enumerate(rows) if row.sampling.top_logprobs]
    if asked:
        counts = [rows[index].sampling.top_logprobs for index in asked]
        found = logprobs_of(_part(logits, asked), [tokens[index] for index in asked], counts)
        logprobs = dict(zip(asked, found, strict=True))
    return [Sampled(tokens[index], logprobs.get(index)) if finite[index] else None for index in range(len(rows))]


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
    penalties = [
        Penalty(index, seen, asked.repetition_penalty, asked.frequency_penalty, asked.presence_penalty)
        for index, row in enumerate(rows)
        if (asked := row.sampling) and (seen := row.history.seen) is not None
    ]
    if penalties:
        penalize(logits, penalties)
    biases = {index: row.history.bias for index, row in enumerate(rows) if row.history.bias is not None}
    if biases:
        add_bias(logits, list(biases), list(biases.values()))


def _without_forbidden(logits: torch.Tensor, rows: Sequence[SampleRow]) -> torch.Tensor:
    places = [(index, token) for index, row in enumerate(rows) for token in row.forbidden]
    index, token = torch.tensor(places, device=logits.device).unbind(-1)
    return logits.index_put((index, token), logits.new_tensor(float("-inf")))


def _choose(logits: torch.Tensor, rows: Sequence[SampleRow], finite: Sequence[bool]) -> list[int]:
    """A token for every row; any token where it is not finite."""
    drawn = [index for index, row in enumerate(rows) if row.sampling.temperature > 0 and finite[index]]
    tokens: list[int] = logits.argmax(-1).tolist() if len(drawn) < len(rows) else [0] * len(rows)
    if drawn:
        found = _draw(_part(logits, drawn), [rows[index] for index in drawn])
        for index, token in zip(drawn, found, strict=True):
            tokens[index] = token
    return tokens


def _draw(logits: torch.Tensor, rows: Sequence[SampleRow]) -> list[int]:
    """Samples every row of logits [rows, vocab]."""
    samplings = [row.sampling for row in rows]
    temperature = _column(logits, [sampling.temperature for sampling in samplings])
    # Probabilities but for a factor: the largest is 1. So a tiny temperature does not overflow to infinity.
    weights = (logits - logits.amax(-1, keepdim=True)).div_(temperature).exp_()
    _truncate(weights, samplings)
    places = [uniform(row.sampling.seed, row.position) for row in rows]
    share = torch.tensor(places, dtype=torch.float64, device=logits.device)[:, None]
    tokens: list[int] = invert(weights, share).tolist()
    return tokens


def _truncate(weights: torch.Tensor, samplings: Sequence[Sampling]) -> None:
    """Zeroes what top-k, top-p and min-p drop, in place. The largest weight of each row is 1 and stays."""
    vocab = weights.shape[-1]
    ks = [min(sampling.top_k or vocab, vocab) for sampling in samplings]
    if min(ks) < vocab:
        widest = max(k for k in ks if k < vocab)
        best = weights.topk(widest, -1).values
        last = torch.tensor([min(k, widest) - 1 for k in ks], device=weights.device)[:, None]
        keeps_all = torch.tensor([k == vocab for k in ks], device=weights.device)[:, None]
        _drop_below(weights, best.gather(-1, last).masked_fill(keeps_all, 0.0))
    floor = _column(weights, [sampling.min_p for sampling in samplings])
    narrow = [index for index, sampling in enumerate(samplings) if sampling.top_p < 1]
    if narrow:
        share = _column(weights, [samplings[index].top_p for index in narrow])
        floor[narrow] = torch.maximum(floor[narrow], _nucleus_floor(_part(weights, narrow), share))
    if narrow or any(sampling.min_p > 0 for sampling in samplings):
        _drop_below(weights, floor)


def _drop_below(weights: torch.Tensor, floor: torch.Tensor) -> None:
    weights.masked_fill_(weights < floor, 0.0)


def _nucleus_floor(weights: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
    """Smallest weight inside each row's nucleus: the fewest tokens that have this share of the whole; [rows, 1]."""
    vocab = weights.shape[-1]
    wanted = share.double() * weights.sum(-1, keepdim=True, dtype=torch.float64)
    floor = weights.new_zeros(len(weights), 1)
    left = list(range(len(weights)))
    for width in (*_NUCLEUS_WIDTHS, vocab):
        best = _part(weights, left).topk(min(width, vocab), -1).values
        cumulative = best.cumsum(-1, dtype=torch.float64)
        # A token is inside while the mass before it has not reached the share.
        inside = (cumulative - best < wanted[left]).sum(-1, keepdim=True).clamp_(min=1)
        floor[left] = best.gather(-1, inside - 1)
        # Only the rows whose nucleus is wider are looked at once more.
        wider: list[bool] = (cumulative[:, -1:] < wanted[left])[:, 0].tolist()
        left = [row for row, is_wider in zip(left, wider, strict=True) if is_wider]
        if width >= vocab or not left:
            break
    return floor


def invert(weights: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
    """The first token of each row with which the running sum of its weights exceeds this share, [rows, 1], of them all.

    Never one of weight 0, however sums are rounded. Running sums are float64: weights differ by many magnitudes.
    """
    vocab = weights.shape[-1]
    whole = vocab // _BLOCK * _BLOCK
    blocks = weights[:, :whole].unflatten(-1, (whole // _BLOCK, _BLOCK))  # type: ignore[no-untyped-call]
    sums: torch.Tensor = blocks.sum(-1, dtype=torch.float64)
    tail = weights[:, whole:].sum(-1, keepdim=True, dtype=torch.float64)
    ends = torch.cat([sums, tail], -1).cumsum(-1)
    target = _below(share * ends[:, -1:], ends[:, -1:])
    block = (ends > target).int().argmax(-1, keepdim=True)
    before = torch.where(block > 0, ends.gather(-1, (block - 1).clamp_(min=0)), 0.0)
    ids = block * _BLOCK + torch.arange(_BLOCK, device=weights.device)
    inside = weights.gather(-1, ids.clamp(max=vocab - 1)).masked_fill_(ids >= vocab, 0.0)
    running = inside.cumsum(-1, dtype=torch.float64)
    place = (running > _below(target - before, running[:, -1:])).int().argmax(-1, keepdim=True)
    return ids.gather(-1, place)[:, 0]


def _below(target: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
    """The target, or the number before the total where rounding has lifted it to the total, which nothing exceeds."""
    return torch.minimum(target, torch.nextafter(total, torch.zeros_like(total)))


def _part(values: torch.Tensor, rows: Sequence[int]) -> torch.Tensor:
    """Some rows, in order; no copy where it is all of them."""
    return values if len(rows) == len(values) else values[list(rows)]


def _column(like: torch.Tensor, values: list[float]) -> torch.Tensor:
    return torch.tensor(values, dtype=like.dtype, device=like.device)[:, None]
