"""What a step adds where adapters are rows of a store: the launches, and what they read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from engine.kernels.lora import launch
from engine.kernels.lora.form import Form
from engine.lora import DeviceAdapter
from engine.rank_layout import Kind
from engine.rank_load import has_passed
from engine.rank_rows import RowPool, Rows, RowTable
from engine.rank_work import Block


@dataclass(eq=False)
class Arena:
    """Rows of all kinds with the same number of layers.

    Attributes:
        tensor: [layers, rows, width].
        table: int32 [rows], lists of scattered rows.
    """

    tensor: torch.Tensor
    table: torch.Tensor
    pool: RowPool
    lists: RowTable


@dataclass(frozen=True, eq=False)
class RankedAdapter(DeviceAdapter):
    """An adapter whose tensors are rows of a store.

    Attributes:
        give_back: takes the rows when the adapter goes.
        rows: by arena; None where it has none.
        ranks: by kind and target.
        totals: by kind, the ranks of all targets.
        offsets: by kind, where its block begins among the rows.
        blocks: by kind, as they were made for the places that its rows begin at, by arena.
        arrivals: by projection, what a stream waits for before it reads the projection's rows; empty once all are there.
    """

    give_back: Callable[[Sequence[Rows | None]], None] = field(kw_only=True)
    rows: tuple[Rows | None, ...] = field(kw_only=True)
    ranks: tuple[tuple[int, ...], ...] = field(kw_only=True)
    totals: tuple[int, ...] = field(kw_only=True)
    offsets: tuple[int, ...] = field(kw_only=True)
    blocks: dict[tuple[int, ...], tuple[Block | None, ...]] = field(default_factory=dict, kw_only=True)
    arrivals: dict[int, torch.cuda.Event] = field(kw_only=True)

    @property
    def is_coming(self) -> bool:
        """Whether some of its layers may not be there yet."""
        if self.arrivals and all(map(has_passed, self.arrivals.values())):
            self.arrivals.clear()
        return bool(self.arrivals)

    def release(self) -> None:
        """Frees the rows. No later step may use the adapter; steps that were launched may still read it."""
        self.give_back(self.rows)


@dataclass(frozen=True, slots=True)
class Work:
    """Launches of one kind in one step."""

    kind: Kind
    arena: Arena
    shrink: torch.Tensor
    expand: torch.Tensor
    z: torch.Tensor


@dataclass(frozen=True, slots=True)
class RankStep:
    """What the segments of a step add: two launches for each projection that any of them touches.

    Attributes:
        works: by kind; None where no adapter of the step has any rank.
        kinds: by projection, its kind and its layer among those of the kind.
        coming: adapters of which some layers may still be on their way.
    """

    form: Form
    works: tuple[Work | None, ...]
    kinds: tuple[tuple[int, int], ...]
    coming: tuple[RankedAdapter, ...]

    def add(self, number: int, x: torch.Tensor, y: torch.Tensor) -> None:
        kind, layer = self.kinds[number]
        work = self.works[kind]
        if work is None:
            return
        for adapter in self.coming:
            if number in adapter.arrivals:
                torch.cuda.current_stream().wait_event(adapter.arrivals[number])
        rows, table = work.arena.tensor[layer], work.arena.table
        launch.shrink(x, rows, table, work.shrink, work.z, self.form)
        launch.expand(work.z, rows, table, work.expand, y, work.kind.columns, self.form)
