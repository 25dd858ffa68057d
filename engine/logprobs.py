"""Log probabilities of given tokens, many places at once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

# Places looked at together: the intermediate results of more would be as large as the logits themselves.
_SLICE = 64


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Natural log probability of a token, and the most likely tokens at its place, most likely first."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


@torch.inference_mode()
def logprobs_of(logits: torch.Tensor, tokens: Sequence[int], counts: Sequence[int]) -> list[TokenLogprob | None]:
    """Log probability of tokens[i] under logits[i], [len(tokens), vocab] float32, with the counts[i] most likely tokens.

    None where the logits have a NaN, a positive infinity, or nothing but negative infinities.
    """
    found: list[TokenLogprob | None] = []
    for start in range(0, len(tokens), _SLICE):
        part = slice(start, start + _SLICE)
        found += _slice(logits[part], tokens[part], counts[part])
    return found


def _slice(logits: torch.Tensor, tokens: Sequence[int], counts: Sequence[int]) -> list[TokenLogprob | None]:
    totals = logits.logsumexp(-1, keepdim=True)
    chosen = logits.gather(-1, torch.tensor(tokens, device=logits.device)[:, None]) - totals
    values, ids = logits.topk(min(max(counts), logits.shape[-1]), -1)
    rows = zip(
        tokens, counts, totals[:, 0].tolist(), chosen[:, 0].tolist(), ids.tolist(), (values - totals).tolist(),
        strict=True,
    )  # fmt: skip
    return [
        TokenLogprob(token, logprob, tuple(zip(top[:count], likely[:count], strict=True)))
        if math.isfinite(total)
        else None
        for token, count, total, logprob, top, likely in rows
    ]
