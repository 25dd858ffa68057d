"""Adapters inside the forward pass: y[t] += (x[t] · Aᵀ) · Bᵀ for the tokens t of each segment.

Every linear layer an adapter may target is wrapped once, at load. Which adapters are in the step, and where, is read
from an `ActiveAdapters` that belongs to the model; a step without adapters finds it empty and pays one comparison.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D


@dataclass(frozen=True, slots=True)
class TargetModule:
    """A linear layer an adapter may target: its path in the model and its widths."""

    name: str
    in_features: int
    out_features: int


@dataclass(frozen=True, slots=True)
class LoraPair:
    """One adapter's delta for one layer: a [rank, in_features] and b [out_features, rank], scaling folded into b."""

    a: torch.Tensor
    b: torch.Tensor


@dataclass(frozen=True, slots=True)
class DeviceSegment:
    """Tokens `start` to `stop` use these pairs, by number of the target module; None where the adapter has none."""

    start: int
    stop: int
    pairs: tuple[LoraPair | None, ...]


@dataclass(slots=True)
class ActiveAdapters:
    """The segments of the step that is running. Written by the runner before each forward pass."""

    segments: list[DeviceSegment] = field(default_factory=list)


class LoraLinear(nn.Module):
    """A linear layer of the base, plus the delta of each segment's adapter.

    Args:
        base: the layer; x [1, T, in_features] -> [1, T, out_features].
        number: its place among the target modules.
        active: the model's segments.
    """

    def __init__(self, base: nn.Module, number: int, active: ActiveAdapters) -> None:
        super().__init__()
        self.base = base
        self._number = number
        self._active = active

    @property
    def weight(self) -> torch.Tensor:
        """The base's weight: some models look at its dtype."""
        weight = self.base.weight
        assert isinstance(weight, torch.Tensor)
        return weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.base(x)
        if self._active.segments:
            self._add_deltas(x, y)
        return y

    def _add_deltas(self, x: torch.Tensor, y: torch.Tensor) -> None:
        rows_in, rows_out = x.view(-1, x.shape[-1]), y.view(-1, y.shape[-1])
        for segment in self._active.segments:
            pair = segment.pairs[self._number]
            if pair is not None:
                part = slice(segment.start, segment.stop)
                rows_out[part].addmm_(rows_in[part] @ pair.a.t(), pair.b.t())


def wrap_targets(model: nn.Module, layer_count: int, active: ActiveAdapters) -> tuple[TargetModule, ...]:
    """Wraps the linear layers of the decoder's layers, in order of the model; returns them.

    The decoder's layers are the module list with one entry per layer; embeddings and the head lie outside of it.
    """
    targets: list[TargetModule] = []
    for list_name, layers in list(model.named_modules()):
        if not isinstance(layers, nn.ModuleList) or len(layers) != layer_count:
            continue
        for name, module in list(layers.named_modules(prefix=list_name)):
            widths = _widths(module)
            if widths is None:
                continue
            parent, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(parent), attribute, LoraLinear(module, len(targets), active))
            targets.append(TargetModule(name, *widths))
    return tuple(targets)


def _widths(module: nn.Module) -> tuple[int, int] | None:
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    if isinstance(module, Conv1D):
        return module.weight.shape[0], module.weight.shape[1]
    return None
