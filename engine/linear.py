"""The base's linear layers: stored for speed, joined where they read the same input, open for adapters.

`install` runs the model once and sees which linear layers read the very same tensor; those are computed as one
projection, found by what they read, not by what they are called. It also sees which layers do not get all tokens of a
step in order (experts, for example): adapters cannot target those.

How weights are stored is measured, not assumed: which library multiplies a few rows fastest, and from which layout,
differs by a factor of two between processors. oneDNN's packed layout is reached through the operators that
torch.compile emits; where they are missing, it is not a candidate.
"""

from __future__ import annotations

import contextlib
import logging
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from engine.lora import Projection, StepDeltas, TargetModule

_log = logging.getLogger(__name__)

# Rows of the products that are timed: decode alone, decode of a few and of many, prefill.
TIMED_ROWS = (1, 8, 32, 256)
# The largest layer that is timed has as many weights, so that choosing takes well under a second.
TIMED_WEIGHTS = 4 << 20
TIMED_RUNS = 12

Product = Callable[[torch.Tensor], torch.Tensor]
# From weight [out, in] and bias to the product x [T, in] -> [T, out].
Storage = Callable[[torch.Tensor, torch.Tensor | None], Product]


def as_given(weight: torch.Tensor, bias: torch.Tensor | None) -> Product:
    """The weight as models store it."""
    return lambda x: functional.linear(x, weight, bias)


def input_major(weight: torch.Tensor, bias: torch.Tensor | None) -> Product:
    """The weight as [in, out], which a product of few rows reads in order."""
    turned = weight.t().contiguous().t()
    return lambda x: functional.linear(x, turned, bias)


def onednn(weight: torch.Tensor, bias: torch.Tensor | None) -> Product:
    """The weight in the layout that oneDNN prefers for it."""
    packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), 32)
    multiply = torch.ops.mkldnn._linear_pointwise
    return lambda x: multiply(x, packed, bias, "none", [], "")


STORAGES: dict[str, Storage] = {"as given": as_given, "input-major": input_major, "onednn": onednn}


@torch.inference_mode()
def fastest_storage(weight: torch.Tensor) -> tuple[str, dict[str, float]]:
    """Name of the storage that multiplies this weight fastest, and the mean seconds of each."""
    weight = weight[: max(1, TIMED_WEIGHTS // weight.shape[1])]
    inputs = [weight.new_ones(rows, weight.shape[1]) for rows in TIMED_ROWS]
    best: dict[str, list[float]] = {}
    for name, store in STORAGES.items():
        with contextlib.suppress(RuntimeError, AttributeError, NotImplementedError):
            product = store(weight, None)
            best[name] = [_best_seconds(product, x) for x in inputs]
    # The geometric mean: each number of rows weighs the same, whatever it costs.
    seconds = {name: statistics.geometric_mean(times) for name, times in best.items()}
    return min(seconds, key=seconds.__getitem__), seconds


def _best_seconds(product: Product, x: torch.Tensor) -> float:
    """The best of several: whatever else the machine does only ever makes it slower."""
    best = math.inf
    for _ in range(TIMED_RUNS):
        began = time.perf_counter()
        product(x)
        best = min(best, time.perf_counter() - began)
    return best


@dataclass(slots=True)
class ActiveAdapters:
    """What the adapters of the running step add. Written by the runner before each forward pass."""

    deltas: Sequence[StepDeltas] = ()


class FusedProjection:
    """A projection of the base. Its targets ask for their columns one after the other, with the same input."""

    def __init__(self, projection: Projection, product: Product, number: int, active: ActiveAdapters) -> None:
        self._columns = projection.columns
        self._product = product
        self._number = number
        self._active = active
        self._input: torch.Tensor | None = None
        self._output: torch.Tensor | None = None
        self._unread: set[int] = set()

    def output_of(self, place: int, x: torch.Tensor) -> torch.Tensor:
        """Columns of target `place` of the projection for x [1, T, in] or [T, in]."""
        if x is not self._input or place not in self._unread:
            self._compute(x)
        assert self._output is not None
        output = self._output[..., self._columns[place]]
        self._unread.discard(place)
        if not self._unread:
            self._input = self._output = None
        return output

    def _compute(self, x: torch.Tensor) -> None:
        rows = x.flatten(0, -2)
        y = self._product(rows)
        for delta in self._active.deltas:
            delta.add(self._number, rows, y)
        self._input, self._output = x, y.view(*x.shape[:-1], -1)
        self._unread = set(range(len(self._columns)))


class Target(nn.Module):
    """Stands where a linear layer was."""

    def __init__(self, projection: FusedProjection, place: int, weight: torch.Tensor) -> None:
        super().__init__()
        self._projection = projection
        self._place = place
        # Shape and dtype, which some models look at; the numbers are in the projection.
        self.weight = nn.Parameter(weight.to("meta"), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._projection.output_of(self._place, x)


class Stored(nn.Module):
    """A linear layer that no adapter targets, stored for speed: the head."""

    def __init__(self, product: Product, weight: torch.Tensor) -> None:
        super().__init__()
        self._product = product
        self.weight = weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not x.numel():  # no row of the step yields a token
            return x.new_empty(*x.shape[:-1], self.weight.shape[0])
        return self._product(x.flatten(0, -2)).view(*x.shape[:-1], -1)


@dataclass(slots=True)
class _Reading:
    """One linear layer, and the tensor it was called with."""

    name: str
    module: Any
    inputs: list[torch.Tensor] = field(default_factory=list)


def install(
    model: Any, layer_count: int, tokens: int, run: Callable[[], None], active: ActiveAdapters
) -> tuple[tuple[TargetModule, ...], tuple[Projection, ...]]:
    """Replaces the linear layers of the decoder's layers; returns them in order of the model, and joined.

    Args:
        tokens: how many tokens `run` sends through the model.
        run: one forward pass.

    The decoder's layers are the module list with one entry per layer; embeddings and the head lie outside of it.
    """
    readings = _readings(model, layer_count)
    hooks = [
        reading.module.register_forward_pre_hook(lambda _, given, inputs=reading.inputs: inputs.append(given[0]))
        for reading in readings
    ]
    run()
    for hook in hooks:
        hook.remove()
    # A layer that is not called once with every token gets other tokens than the step's: an expert, or a router's own.
    served = [r for r in readings if len(r.inputs) == 1 and r.inputs[0].shape[:-1].numel() == tokens]
    targets = tuple(_target(reading) for reading in served)
    groups = _groups(served)
    del readings, served
    store = _storage_for(model, groups)
    projections = []
    for number, group in enumerate(groups):
        projection = Projection(tuple(_target(reading) for reading in group))
        fused = FusedProjection(projection, store(*_joined(group)), number, active)
        for place, reading in enumerate(group):
            parent, _, attribute = reading.name.rpartition(".")
            setattr(model.get_submodule(parent), attribute, Target(fused, place, _weight(reading.module)))
            reading.module = None  # or the whole base would be in memory twice before the end
        projections.append(projection)
    head = model.get_output_embeddings()
    if isinstance(head, nn.Linear):
        model.set_output_embeddings(Stored(store(head.weight, head.bias), head.weight))
    return targets, tuple(projections)


def _readings(model: Any, layer_count: int) -> list[_Reading]:
    # By name: a list inside of a layer may be as long as the list of layers.
    found: dict[str, _Reading] = {}
    for list_name, layers in list(model.named_modules()):
        if isinstance(layers, nn.ModuleList) and len(layers) == layer_count:
            for name, module in layers.named_modules(prefix=list_name):
                # Not isinstance: some models derive routers from nn.Linear that compute something else.
                if type(module).forward in (nn.Linear.forward, Conv1D.forward):
                    found.setdefault(name, _Reading(name, module))
    return list(found.values())


def _groups(readings: list[_Reading]) -> list[list[_Reading]]:
    """Neighbours that read the same tensor."""
    groups: list[list[_Reading]] = []
    for reading in readings:
        if groups and groups[-1][0].inputs[0] is reading.inputs[0] and _joinable(groups[-1][0].module, reading.module):
            groups[-1].append(reading)
        else:
            groups.append([reading])
    return groups


def _joinable(one: Any, other: Any) -> bool:
    return (one.bias is None) == (other.bias is None) and one.weight.dtype == other.weight.dtype


def _joined(group: list[_Reading]) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Weight [out, in] and bias [out] of a whole projection."""
    biases = [reading.module.bias for reading in group]
    bias = None if biases[0] is None else torch.cat([torch.as_tensor(bias) for bias in biases])
    return torch.cat([_weight(reading.module) for reading in group]), bias


def _weight(module: Any) -> torch.Tensor:
    """As [out, in]."""
    weight: torch.Tensor = module.weight
    return weight.t() if isinstance(module, Conv1D) else weight


def _target(reading: _Reading) -> TargetModule:
    outputs, inputs = _weight(reading.module).shape
    return TargetModule(reading.name, inputs, outputs)


def _storage_for(model: Any, groups: list[list[_Reading]]) -> Storage:
    if model.device.type != "cpu" or not groups:
        return as_given
    largest = max(groups, key=lambda group: sum(_weight(reading.module).numel() for reading in group))
    name, seconds = fastest_storage(_joined(largest)[0])
    times = ", ".join(f"{other} {1e6 * mean:.0f} µs" for other, mean in seconds.items())
    _log.info("weights are stored %s; mean time of a product: %s", name, times)
    return STORAGES[name]
