"""Adapters as rows on the device, and the LoRA kernels of a step. What is where is decided in rank_rows.py and rank_layout.py.

Memory of the step that graphs may rely on: arenas and row tables never move, and what a bucket uses (items, planes) is
made once for it. `prepare` writes a step's items with one upload; then the same launches compute it.

Loading does not wait for the device, and the step thread does not wait for loading: copies run on a stream of their
own, layer by layer, each followed by an event; a step that uses an adapter which is still coming waits, on the device,
before each of its layers.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from engine.errors import DeviceFull, RowsFull
from engine.kernels.lora.form import Form, table_for
from engine.lora import DeviceSegment
from engine.projection import Projection
from engine.rank_layout import kinds_of, row_width
from engine.rank_load import Destination, Loader
from engine.rank_pieces import Extent, Layout, Plan
from engine.rank_rows import RowPool, Rows, RowTable
from engine.rank_step import Arena, RankedAdapter, RankStep, Work
from engine.rank_work import SHRINK_ITEM, Block, Bucket, Ints, Span, bucket_of, expand_item, items_of


@dataclass(slots=True)
class _Buffers:
    """Memory of a bucket, and what was written to it last."""

    items: torch.Tensor
    works: tuple[Work | None, ...]
    written: object = None


class RankStore:
    """The adapters of one device, within a budget of bytes.

    `load` may run on any thread beside the one that runs steps; the rest belongs to the latter.
    """

    def __init__(
        self, projections: Sequence[Projection], budget_bytes: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.device = device
        self.kinds = kinds_of(projections)
        self.width = row_width(self.kinds)
        layer_counts = sorted({len(kind.projections) for kind in self.kinds})
        arena_of = tuple(layer_counts.index(len(kind.projections)) for kind in self.kinds)
        self.layout = Layout(projections, self.kinds, arena_of, self.width, dtype.itemsize)
        # As an adapter on all modules takes them.
        rows = self.layout.rows_of([(1,) * len(kind.outs) for kind in self.kinds])
        self.row_bytes = [layers * self.width * dtype.itemsize for layers in layer_counts]
        together = sum(count * each for count, each in zip(rows, self.row_bytes, strict=True))
        self.arenas = tuple(
            _arena(layers, budget_bytes * count * each // together, self.width, dtype, device)
            for layers, count, each in zip(layer_counts, rows, self.row_bytes, strict=True)
        )
        places = {n: (k, layer) for k, kind in enumerate(self.kinds) for layer, n in enumerate(kind.projections)}
        self._places = tuple(places[number] for number in range(len(projections)))
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
        self._table = table_for(name)
        self._lock = threading.Lock()
        self._loader = Loader(device)
        self._buffers: dict[Bucket, _Buffers] = {}
        self._planes: dict[int, torch.Tensor] = {}
        self._last: tuple[object, Bucket] | None = None

    def plan(self, extents: Mapping[str, Extent]) -> Plan:
        """How artifacts whose tensors are at these places are loaded; all of them must fit the base."""
        return self.layout.plan(extents)

    def load(self, digest: str, numbers: torch.Tensor, plan: Plan) -> RankedAdapter:
        """Takes rows for an adapter and starts to fill them.

        Raises DeviceFull, with nothing changed, when too few rows are free.

        Args:
            numbers: uint8, the artifact's file behind its header; read until the last arrival.
            plan: for artifacts of this shape.
        """
        rows = self._allot(plan.rows)
        to = [Destination(arena.tensor, held) if held else None for arena, held in zip(self.arenas, rows, strict=True)]
        try:
            arrivals = self._loader.fill(numbers, plan.layers, to)
        except BaseException:
            self._give_back(rows)
            raise
        return RankedAdapter(
            digest, (), sum(count * each for count, each in zip(plan.rows, self.row_bytes, strict=True)),
            give_back=self._give_back, rows=rows, ranks=plan.ranks, totals=tuple(map(sum, plan.ranks)), offsets=plan.offsets,
            arrivals=arrivals,
        )  # fmt: skip

    def arrange(self, segments: Sequence[DeviceSegment]) -> list[RankStep]:
        """How these segments of a step are computed: nothing for none."""
        touching = [segment for segment in segments if any(_ranked(segment).totals)]
        return [self.prepare(touching, self.bucket(touching))] if touching else []

    def bucket(self, segments: Sequence[DeviceSegment]) -> Bucket:
        """The bucket of a step with at least one segment. Its rows may be anywhere."""
        identity = _identity(segments)
        if self._last is None or self._last[0] != identity:
            tokens = [segment.stop - segment.start for segment in segments]
            totals = [_ranked(segment).totals for segment in segments]
            self._last = (identity, bucket_of(tokens, totals, self.kinds, self._table))
        return self._last[1]

    def prepare(self, segments: Sequence[DeviceSegment], bucket: Bucket) -> RankStep:
        """Writes the items of a step into the memory of a bucket that it fits.

        Raises StaleRows when rows of an adapter are no longer of the generation it was given.
        """
        self._loader.steps_on_this_stream()
        adapters = {segment.adapter.serial: _ranked(segment) for segment in segments}.values()
        self._check(adapters)
        self._list(adapters)
        buffers = self._buffers.get(bucket) or self._make_buffers(bucket)
        # From one decode step to the next nothing changes, as a rule: then nothing is made or sent.
        wanted = (_identity(segments), tuple(arena.lists.epoch for arena in self.arenas))
        if buffers.written != wanted:
            buffers.written = None  # should the upload fail
            spans = [Span(segment.start, segment.stop, self._blocks(_ranked(segment))) for segment in segments]
            touched = [(number, kind) for number, kind in enumerate(self.kinds) if bucket.touched[number]]
            items = [part for number, kind in touched for part in items_of(number, kind, spans, bucket)]
            self._upload(np.concatenate([part.reshape(-1) for part in items]), buffers.items)
            buffers.written = wanted
        coming = tuple(adapter for adapter in adapters if adapter.is_coming)
        return RankStep(bucket.form, buffers.works, self._places, coming)

    def wait(self, segments: Sequence[DeviceSegment]) -> None:
        """Makes the current stream wait until all layers of these adapters are there: before a graph, which cannot."""
        for segment in segments:
            arrivals = _ranked(segment).arrivals
            for event in set(arrivals.values()):
                torch.cuda.current_stream().wait_event(event)
            # Whatever is launched from here on comes after them.
            arrivals.clear()

    @property
    def free_bytes(self) -> int:
        """Memory of the rows that are free."""
        return sum(arena.pool.free_count * each for arena, each in zip(self.arenas, self.row_bytes, strict=True))

    def _allot(self, counts: Sequence[int]) -> tuple[Rows | None, ...]:
        taken: list[Rows | None] = []
        with self._lock:
            try:
                for arena, count in zip(self.arenas, counts, strict=True):
                    taken.append(arena.pool.allot(count) if count else None)
            except RowsFull as error:
                for arena, rows in zip(self.arenas, taken, strict=False):
                    if rows:
                        arena.pool.release(rows)
                arena_bytes = self.row_bytes[len(taken)]
                raise DeviceFull(
                    error.needed * arena_bytes, error.free * arena_bytes, error.total * arena_bytes
                ) from None
        return tuple(taken)

    def _give_back(self, rows: Sequence[Rows | None]) -> None:
        with self._lock:
            for arena, held in zip(self.arenas, rows, strict=True):
                if held:
                    arena.pool.release(held)

    def _check(self, adapters: Iterable[RankedAdapter]) -> None:
        with self._lock:
            for adapter in adapters:
                for arena, rows in zip(self.arenas, adapter.rows, strict=True):
                    if rows:
                        arena.pool.check(rows, adapter.digest)

    def _list(self, adapters: Iterable[RankedAdapter]) -> None:
        """Lists rows that are scattered, where they are not listed yet."""
        for number, arena in enumerate(self.arenas):
            scattered = [rows for adapter in adapters if (rows := adapter.rows[number]) and rows.is_scattered]
            for place, rows in arena.lists.place(scattered):
                self._upload(np.array(rows.listed(), dtype=np.int32), arena.table[place : place + rows.count])

    def _blocks(self, adapter: RankedAdapter) -> tuple[Block | None, ...]:
        """Of an adapter whose rows are listed, where they are scattered."""
        starts = tuple(
            (arena.lists.start_of(rows) if rows.is_scattered else rows.runs[0][0]) if rows else 0
            for arena, rows in zip(self.arenas, adapter.rows, strict=True)
        )
        if starts not in adapter.blocks:
            adapter.blocks.clear()
            adapter.blocks[starts] = tuple(self._block(adapter, number, starts) for number in range(len(self.kinds)))
        return adapter.blocks[starts]

    def _block(self, adapter: RankedAdapter, number: int, starts: tuple[int, ...]) -> Block | None:
        arena = self.layout.arena_of[number]
        rows = adapter.rows[arena]
        if rows is None or not adapter.totals[number]:
            return None
        start = starts[arena] + adapter.offsets[number]
        return Block(self.kinds[number], self.width, start, rows.is_scattered, adapter.ranks[number])

    def _make_buffers(self, bucket: Bucket) -> _Buffers:
        sizes: list[int] = []
        for kind, touched in zip(self.kinds, bucket.touched, strict=True):
            sizes += [bucket.shrink_items(kind) * SHRINK_ITEM, bucket.tiles * expand_item(kind)] if touched else [0, 0]
        items = torch.zeros(sum(sizes), dtype=torch.int32, device=self.device)
        parts = torch.split(items, sizes)
        works: list[Work | None] = []
        for number, kind in enumerate(self.kinds):
            if not bucket.touched[number]:
                works.append(None)
                continue
            shrink, expand = parts[2 * number].view(-1, SHRINK_ITEM), parts[2 * number + 1].view(bucket.tiles, -1)
            arena = self.arenas[self.layout.arena_of[number]]
            works.append(Work(kind, arena, shrink, expand, self._z(bucket.form, len(shrink))))
        self._buffers[bucket] = _Buffers(items, tuple(works))
        return self._buffers[bucket]

    def _z(self, form: Form, items: int) -> torch.Tensor:
        """Planes for so many items. Launches follow each other, so those of one size share their memory."""
        shape = (form.splits, items, form.token_tile, form.rank_tile)
        numbers = math.prod(shape)
        size = 1 << (numbers - 1).bit_length()
        if size not in self._planes:
            self._planes[size] = torch.empty(size, dtype=torch.float32, device=self.device)
        return self._planes[size][:numbers].view(shape)

    def _upload(self, numbers: Ints, to: torch.Tensor) -> None:
        host = torch.from_numpy(numbers)
        to.copy_(host.pin_memory() if self.device.type == "cuda" else host, non_blocking=True)


def _arena(layers: int, budget_bytes: int, width: int, dtype: torch.dtype, device: torch.device) -> Arena:
    count = budget_bytes // (layers * width * dtype.itemsize)
    tensor = torch.empty(layers, count, width, dtype=dtype, device=device)
    table = torch.zeros(count, dtype=torch.int32, device=device)
    return Arena(tensor, table, RowPool(count), RowTable(count))


def _ranked(segment: DeviceSegment) -> RankedAdapter:
    assert isinstance(segment.adapter, RankedAdapter)
    return segment.adapter


def _identity(segments: Sequence[DeviceSegment]) -> object:
    """Equal for steps with the same tokens of the same adapters."""
    return tuple((segment.start, segment.stop, segment.adapter.serial) for segment in segments)
