"""Segments of a step brought together: adapters of the same shape share one batched product.

A segment of a few tokens is bound by reading its adapter, and by the overhead of a call for each of them. So adapters
of the same shape whose segments are short are kept as copies side by side, in a pack, and one product serves them all.
A pack follows the set of active adapters: one that comes is copied in, one that goes leaves its place to another; while
the set stays, as it does from one decode step to the next, nothing is copied.

Nothing is padded to a largest rank: adapters of other shapes are in other packs.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from engine.lora import Delta, DeviceAdapter, DeviceSegment, Part, StepDeltas
from engine.slots import Slots

# Longer segments are worth calls of their own.
MAX_PACKED_TOKENS = 8
# A pack that was not used for so many steps is given up.
IDLE_STEPS = 256


@dataclass(frozen=True, slots=True)
class Alone:
    """One segment on its own."""

    segment: DeviceSegment

    def add(self, number: int, x: torch.Tensor, y: torch.Tensor) -> None:
        segment = self.segment
        delta = segment.adapter.deltas[number]
        if delta is None:
            return
        if segment.start == 0 and segment.stop == len(x):
            delta.add(x, y)
        else:
            delta.add(x[segment.start : segment.stop], y[segment.start : segment.stop])


@dataclass(frozen=True, slots=True)
class Together:
    """Segments of a pack: n of them, each of `width` tokens, the last one repeated where it has fewer.

    Attributes:
        deltas: the pack's, stacked: a [n, ranks, in], b [n, rank, out].
        tokens: [n * width] which tokens.
        places: the tokens in order, each once.
        order: where each of those is in `tokens`.
        run: the same as `places`, when no other token lies between them.
    """

    deltas: Sequence[Delta | None]
    width: int
    tokens: torch.Tensor
    run: slice | None
    order: torch.Tensor
    places: torch.Tensor

    def add(self, number: int, x: torch.Tensor, y: torch.Tensor) -> None:
        delta = self.deltas[number]
        if delta is None:
            return
        rows = x.index_select(0, self.tokens).view(-1, self.width, x.shape[-1])
        # [n, ranks, in] · [n, in, width]: this way round the large operand is read in order.
        z = torch.bmm(delta.a, rows.transpose(1, 2)).transpose(1, 2)
        added = [torch.bmm(z[:, :, part.ranks], part.b) for part in delta.parts]
        if delta.span is not None:
            # One addition over all columns costs a third of one for each part.
            self._scatter(y[:, delta.span], torch.cat(added, -1) if len(added) > 1 else added[0])
            return
        for part, one in zip(delta.parts, added, strict=True):
            self._scatter(y[:, part.columns], one)

    def _scatter(self, y: torch.Tensor, added: torch.Tensor) -> None:
        rows = added.flatten(0, 1).index_select(0, self.order)
        if self.run is not None:  # the usual case, at half the cost of the other
            y[self.run].add_(rows)
        else:
            y.index_add_(0, self.places, rows)


class Pack:
    """Copies of adapters of one shape, side by side."""

    def __init__(self) -> None:
        # By serial number, not by adapter: a pack must not keep alive what was evicted.
        self._slots: Slots[int] = Slots()
        self._storage: list[Delta | None] = []
        self._capacity = 0
        self._views: list[Delta | None] = []
        self.last_used = 0

    @property
    def size_bytes(self) -> int:
        """Memory of the copies, with the places that are free."""
        return sum(delta.size_bytes for delta in self._storage if delta is not None)

    def hold(self, segments: Sequence[DeviceSegment], width: int, device: torch.device) -> Together:
        """Makes the pack hold exactly these segments' adapters."""
        before = len(self._slots)
        adapters = {segment.adapter.serial: segment.adapter for segment in segments}
        if len(adapters) > self._capacity:
            self._grow(segments[0].adapter, len(adapters), before)
        for write in self._slots.update(adapters):
            source = adapters[write.key].deltas if write.source is None else self._at(write.source)
            for stored, delta in zip(self._at(write.slot), source, strict=True):
                if stored is not None and delta is not None:
                    _copy(stored, delta)
        if len(self._slots) != before or len(self._views) != len(self._storage):
            self._views = [_stacked(delta, slice(0, len(self._slots))) for delta in self._storage]

        tokens: list[int] = [0] * (len(segments) * width)
        order: dict[int, int] = {}
        for segment in segments:
            first = self._slots[segment.adapter.serial] * width
            mine = range(segment.start, segment.stop)
            tokens[first : first + width] = [*mine, *[mine[-1]] * (width - len(mine))]
            order.update(zip(mine, range(first, first + width), strict=False))
        places = sorted(order)
        run = slice(places[0], places[-1] + 1)
        return Together(
            self._views,
            width,
            torch.tensor(tokens, device=device),
            run if run.stop - run.start == len(places) else None,
            torch.tensor([order[place] for place in places], device=device),
            torch.tensor(places, device=device),
        )

    def _grow(self, like: DeviceAdapter, count: int, kept: int) -> None:
        self._capacity = max(4, 1 << (count - 1).bit_length())
        old, self._storage = self._storage, [delta and _room(delta, self._capacity) for delta in like.deltas]
        for stored, delta in zip(self._storage, old, strict=False):
            if stored is not None and delta is not None:
                _copy(_stacked(stored, slice(0, kept)), _stacked(delta, slice(0, kept)))
        self._views = []

    def _at(self, slot: int) -> list[Delta | None]:
        return [_stacked(delta, slot) for delta in self._storage]


class Packs:
    """The packs of one device. Used by one thread at a time."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._packs: dict[tuple[object, int], Pack] = {}
        self._step = 0

    @property
    def bytes_held(self) -> int:
        """Memory of the copies."""
        return sum(pack.size_bytes for pack in self._packs.values())

    def arrange(self, segments: Sequence[DeviceSegment]) -> list[StepDeltas]:
        """How these segments of a step are computed."""
        self._step += 1
        groups: defaultdict[tuple[object, int], list[DeviceSegment]] = defaultdict(list)
        arranged: list[StepDeltas] = []
        for segment in segments:
            tokens = segment.stop - segment.start
            if tokens > MAX_PACKED_TOKENS:
                arranged.append(Alone(segment))
            else:
                groups[segment.adapter.shape, 1 << (tokens - 1).bit_length()].append(segment)
        for key, group in groups.items():
            if len(group) == 1:
                arranged.append(Alone(group[0]))
                continue
            # Out of the way until it holds what its slots say: one that failed half-way must not be used again.
            pack = self._packs.pop(key, None) or Pack()
            arranged.append(pack.hold(group, key[1], self.device))
            pack.last_used = self._step
            self._packs[key] = pack
        if self._step % IDLE_STEPS == 0:
            for key in [key for key, pack in self._packs.items() if self._step - pack.last_used >= IDLE_STEPS]:
                del self._packs[key]
        return arranged


def _stacked(delta: Delta | None, at: slice | int) -> Delta | None:
    """The same delta at some slots."""
    if delta is None:
        return None
    return Delta(delta.a[at], tuple(Part(part.ranks, part.columns, part.b[at]) for part in delta.parts), delta.span)


def _room(delta: Delta, count: int) -> Delta:
    """Memory for `count` deltas of the same shape."""
    parts = tuple(Part(part.ranks, part.columns, part.b.new_empty(count, *part.b.shape)) for part in delta.parts)
    return Delta(delta.a.new_empty(count, *delta.a.shape), parts, delta.span)


def _copy(to: Delta | None, source: Delta | None) -> None:
    if to is None or source is None:
        return
    to.a.copy_(source.a)
    for mine, its in zip(to.parts, source.parts, strict=True):
        mine.b.copy_(its.b)
