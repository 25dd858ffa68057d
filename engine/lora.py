"""Adapters inside the forward pass: y[t] += (x[t] · Aᵀ) · Bᵀ for the tokens t of each segment.

A projection is what several target modules that read the same input are computed as: one product with the base's
weights side by side, and per adapter one shrink (their A on top of each other) followed by one expand for each of them.

    q, k, v of one layer:      y = x · [Wq Wk Wv]      z = x · [Aq; Ak; Av]ᵀ      y_q += z_q · Bqᵀ   y_k += ...
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import count, pairwise
from typing import Protocol

import torch

from engine.projection import Projection as Projection
from engine.projection import TargetModule as TargetModule


@dataclass(frozen=True, slots=True)
class Part:
    """The expand of one target: `b` [rank, out_features] of `ranks` of the shrink, into `columns` of the output."""

    ranks: slice
    columns: slice
    b: torch.Tensor


@dataclass(frozen=True, slots=True)
class Delta:
    """What one adapter adds to one projection: `a` [sum of ranks, in_features], and a part for each target it has.

    Attributes:
        span: the columns all parts cover together; None where there are gaps between them.
    """

    a: torch.Tensor
    parts: tuple[Part, ...]
    span: slice | None

    def add(self, x: torch.Tensor, y: torch.Tensor) -> None:
        """Adds to y [tokens, out] what the adapter makes of x [tokens, in]."""
        z = torch.mm(x, self.a.t())
        if len(self.parts) == 1:  # without the slices, which cost as much as a product of one row
            (part,) = self.parts
            (y if part.b.shape[1] == y.shape[1] else y[:, part.columns]).addmm_(z, part.b)
            return
        for part in self.parts:
            y[:, part.columns].addmm_(z[:, part.ranks], part.b)

    @property
    def size_bytes(self) -> int:
        """Memory of the tensors."""
        return self.a.nbytes + sum(part.b.nbytes for part in self.parts)

    @property
    def shape(self) -> tuple[tuple[int, int, int], ...]:
        """Equal for deltas whose tensors can be stacked."""
        return tuple((part.ranks.start, part.ranks.stop, part.columns.start) for part in self.parts)


def delta_of(projection: Projection, pairs: Sequence[tuple[torch.Tensor, torch.Tensor] | None]) -> Delta | None:
    """Joins the (A [rank, in], B [out, rank]) of a projection's targets; None when the adapter has none of them.

    The tensors are copied: A on top of each other, each B transposed, so that both products read them in order.
    """
    parts: list[Part] = []
    shrinks: list[torch.Tensor] = []
    first = 0
    for pair, columns in zip(pairs, projection.columns, strict=True):
        if pair is not None:
            a, b = pair
            shrinks.append(a)
            parts.append(
                Part(slice(first, first + a.shape[0]), columns, b.t().clone(memory_format=torch.contiguous_format))
            )
            first += a.shape[0]
    if not parts:
        return None
    whole = all(part.columns.stop == following.columns.start for part, following in pairwise(parts))
    span = slice(parts[0].columns.start, parts[-1].columns.stop) if whole else None
    return Delta(torch.cat(shrinks), tuple(parts), span)


_serials = count(1)


@dataclass(frozen=True, eq=False)
class DeviceAdapter:
    """One adapter's tensors on the device, by number of the projection; None where it has none.

    Attributes:
        serial: of this copy; an adapter that was brought in again has another one.
    """

    digest: str
    deltas: tuple[Delta | None, ...]
    size_bytes: int
    serial: int = field(default_factory=lambda: next(_serials))

    @cached_property
    def shape(self) -> tuple[object, ...]:
        """Equal for adapters whose tensors can be stacked."""
        return tuple(delta and delta.shape for delta in self.deltas)

    def release(self) -> None:
        """Gives back what the adapter holds beside its tensors. It is not used again."""


@dataclass(frozen=True, slots=True)
class DeviceSegment:
    """Tokens `start` to `stop` use this adapter."""

    start: int
    stop: int
    adapter: DeviceAdapter


class StepDeltas(Protocol):
    """What some segments of the running step add to projections."""

    def add(self, number: int, x: torch.Tensor, y: torch.Tensor) -> None:
        """Adds to y [T, out] of projection `number`, given its x [T, in]; other tokens stay as they are."""


class Arranger(Protocol):
    """How adapters are computed on a device."""

    @property
    def device(self) -> torch.device:
        """The device."""

    def arrange(self, segments: Sequence[DeviceSegment]) -> Sequence[StepDeltas]:
        """What these segments of a step add; nothing for none."""
