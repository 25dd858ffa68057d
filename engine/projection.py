"""The base's linear layers as adapters see them. PURE."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise


@dataclass(frozen=True, slots=True)
class TargetModule:
    """A linear layer an adapter may target: its path in the model and its widths."""

    name: str
    in_features: int
    out_features: int


@dataclass(frozen=True)
class Projection:
    """Target modules that read the same input, in the order their outputs are laid out."""

    targets: tuple[TargetModule, ...]

    @cached_property
    def columns(self) -> tuple[slice, ...]:
        """Where each target's output is in the projection's."""
        ends = [0]
        for target in self.targets:
            ends.append(ends[-1] + target.out_features)
        return tuple(slice(start, stop) for start, stop in pairwise(ends))
