"""Tokens chosen on the device, nothing looked at on the host: what `engine.sampler` does for rows that ask for no more
than temperature, top-k, top-p and min-p.

Same order, same random numbers, same ties. Greedy rows take the largest logit, the lowest id among equals.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import torch

from engine.gpu.upload import Ints
from engine.kernels.threshold import kernels as threshold
from engine.sampler import SampleRow, invert, uniform

# Instead of a token, where a row's logits are not finite.
BROKEN = -1


class Mode(IntEnum):
    """What has to be done for the row of a step that asks for most; part of the shape of a pass."""

    LOGITS = 0
    GREEDY = 1
    DRAWN = 2
    TRUNCATED = 3


def is_plain(row: SampleRow) -> bool:
    """Whether a row's token can be chosen here."""
    return row.history.seen is None and row.history.bias is None and not row.forbidden and not row.sampling.top_logprobs


def mode_of(rows: Sequence[SampleRow]) -> Mode:
    """What these rows, all plain, ask for."""
    drawn = [row.sampling for row in rows if row.sampling.temperature > 0]
    if any(sampling.top_k or sampling.top_p < 1 or sampling.min_p > 0 for sampling in drawn):
        return Mode.TRUNCATED
    return Mode.DRAWN if drawn else Mode.GREEDY


# Fields of an upload, each of one int32 a row, but for the share, a float64.
FIELDS = (("temperature", 1), ("top_k", 1), ("top_p", 1), ("min_p", 1), ("share", 2))


def write(host: Ints, places: dict[str, slice], rows: Sequence[SampleRow], vocab: int) -> None:
    """Fills the fields; rows beyond these are left as they are."""
    count = len(rows)
    samplings = [row.sampling for row in rows]
    floats = host.view(np.float32)
    floats[places["temperature"]][:count] = [sampling.temperature for sampling in samplings]
    floats[places["top_p"]][:count] = [sampling.top_p for sampling in samplings]
    floats[places["min_p"]][:count] = [sampling.min_p for sampling in samplings]
    host[places["top_k"]][:count] = [min(sampling.top_k or vocab, vocab) for sampling in samplings]
    shares = host[places["share"]].view(np.float64)
    # Greedy rows need no random number, and one costs as much as all the rest of a row.
    shares[:count] = [uniform(row.sampling.seed, row.position) if row.sampling.temperature > 0 else 0.0 for row in rows]


@dataclass(frozen=True, slots=True)
class Asked:
    """The fields on the device."""

    temperature: torch.Tensor
    top_k: torch.Tensor
    top_p: torch.Tensor
    min_p: torch.Tensor
    share: torch.Tensor

    @classmethod
    def of(cls, views: dict[str, torch.Tensor]) -> Asked:
        temperature, top_p, min_p = (views[name].view(torch.float32) for name in ("temperature", "top_p", "min_p"))
        return cls(temperature, views["top_k"], top_p, min_p, views["share"].view(torch.float64))


def choose(logits: torch.Tensor, asked: Asked, mode: Mode) -> torch.Tensor:
    """A token for each row of logits [R, vocab] float32; [R] int32, BROKEN where a row is not finite."""
    largest, tokens = logits.max(-1)
    if mode is not Mode.GREEDY:
        temperature = asked.temperature[:, None]
        is_drawn = temperature > 0
        weights = (logits - largest[:, None]).div_(torch.where(is_drawn, temperature, 1.0)).exp_()
        if mode is Mode.TRUNCATED:
            threshold.drop(weights, asked.top_k, asked.top_p, asked.min_p)
        tokens = torch.where(is_drawn[:, 0], invert(weights, asked.share[:, None]), tokens)
    return torch.where(torch.isfinite(largest), tokens, BROKEN).int()
