"""Which part of an artifact's file becomes which rows. PURE.

An artifact's tensors are sorted by name, so those of one layer lie side by side and one copy brings them all. They are
then placed piece by piece: a piece is A or B of one target. B lies in the file as [out, rank] and in rows as [rank, out].
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from engine.projection import Projection
from engine.rank_layout import Kind, chunks, layer_of

PIECE = 8


@dataclass(frozen=True, slots=True)
class Extent:
    """Where a tensor lies: bytes `start` to `stop` of the numbers of a file; and its rank."""

    start: int
    stop: int
    rank: int


@dataclass(frozen=True, slots=True)
class Placing:
    """Rows of one layer of one arena: `pieces` as the kernel takes them, the largest of them has `most_rows`."""

    arena: int
    layer: int
    pieces: tuple[tuple[int, ...], ...]

    def most_rows(self, width: int) -> int:
        """Rows of the largest piece."""
        return max(chunks(size, width) * ranks for size, ranks, *_ in self.pieces)


@dataclass(slots=True)
class Layer:
    """One layer of an artifact: bytes `start` to `stop` of its numbers, what they become, and for which projections."""

    start: int = 0
    stop: int = 0
    placings: list[Placing] = field(default_factory=list)
    projections: list[int] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Plan:
    """How artifacts of one shape are brought to the device.

    Attributes:
        ranks: by kind and target.
        offsets: by kind, where its block begins among the rows of its arena.
        rows: by arena, how many.
        layers: in the order the model computes them.
    """

    ranks: tuple[tuple[int, ...], ...]
    offsets: tuple[int, ...]
    rows: tuple[int, ...]
    layers: tuple[Layer, ...]


@dataclass(frozen=True, slots=True)
class Layout:
    """How a store lays out adapters.

    Attributes:
        arena_of: by kind.
        width: of a row.
        itemsize: bytes of a number.
    """

    projections: Sequence[Projection]
    kinds: Sequence[Kind]
    arena_of: Sequence[int]
    width: int
    itemsize: int

    def plan(self, extents: Mapping[str, Extent]) -> Plan:
        """For artifacts whose tensors are at these places, all of which fit the base."""
        ranks = self.ranks_of(extents)
        offsets, rows = tuple(self.offsets(ranks)), tuple(self.rows_of(ranks))
        return Plan(ranks, offsets, rows, tuple(self.layers_of(extents)))

    def rows_of(self, ranks: Sequence[Sequence[int]]) -> list[int]:
        """By arena, the rows of an adapter with these ranks by kind and target."""
        counts = [0] * (max(self.arena_of) + 1)
        for kind, its, arena in zip(self.kinds, ranks, self.arena_of, strict=True):
            counts[arena] += kind.rows_of(its, self.width)
        return counts

    def offsets(self, ranks: Sequence[Sequence[int]]) -> list[int]:
        """By kind, the logical row in its arena at which its block begins."""
        counts, found = [0] * (max(self.arena_of) + 1), []
        for kind, its, arena in zip(self.kinds, ranks, self.arena_of, strict=True):
            found.append(counts[arena])
            counts[arena] += kind.rows_of(its, self.width)
        return found

    def ranks_of(self, extents: Mapping[str, Extent]) -> tuple[tuple[int, ...], ...]:
        """Of an artifact, by kind and target: the largest of any layer."""

        def largest(kind: Kind, place: int) -> int:
            names = [f"{self.projections[number].targets[place].name}.A" for number in kind.projections]
            return max((extents[name].rank for name in names if name in extents), default=0)

        return tuple(tuple(largest(kind, place) for place in range(len(kind.outs))) for kind in self.kinds)

    def layers_of(self, extents: Mapping[str, Extent]) -> list[Layer]:
        """What is to be copied and placed, in the order the model computes it."""
        ranks = self.ranks_of(extents)
        offsets = self.offsets(ranks)
        numbers: defaultdict[int, list[tuple[int, int, int]]] = defaultdict(list)
        places = {n: (k, layer) for k, kind in enumerate(self.kinds) for layer, n in enumerate(kind.projections)}
        for number, projection in enumerate(self.projections):
            kind, layer = places[number]
            if any(ranks[kind]):
                numbers[layer_of(projection.targets[0].name)].append((number, kind, layer))
        return [self._layer(its, extents, ranks, offsets) for its in numbers.values()]

    def _layer(
        self,
        numbers: list[tuple[int, int, int]],
        extents: Mapping[str, Extent],
        ranks: tuple[tuple[int, ...], ...],
        offsets: list[int],
    ) -> Layer:
        names = [target.name for number, _, _ in numbers for target in self.projections[number].targets]
        held = [extents[f"{name}.{half}"] for name in names for half in "AB" if f"{name}.{half}" in extents]
        start = min((extent.start for extent in held), default=0)
        made = Layer(start, max((extent.stop for extent in held), default=0))
        together: defaultdict[tuple[int, int], list[tuple[int, ...]]] = defaultdict(list)
        for number, kind, layer in numbers:
            pieces = self._pieces(
                self.projections[number], self.kinds[kind], ranks[kind], offsets[kind], extents, start
            )
            together[self.arena_of[kind], layer] += pieces
            made.projections.append(number)
        made.placings = [Placing(*where, tuple(pieces)) for where, pieces in together.items()]
        return made

    def _pieces(
        self,
        projection: Projection,
        kind: Kind,
        ranks: tuple[int, ...],
        block: int,
        extents: Mapping[str, Extent],
        start: int,
    ) -> list[tuple[int, ...]]:
        pieces: list[tuple[int, ...]] = []
        first, total = 0, sum(ranks)
        for target, rank, base in zip(projection.targets, ranks, kind.bases(ranks, self.width), strict=True):
            if not rank:
                continue
            a, b = (extents.get(f"{target.name}.{half}", Extent(start, start, 0)) for half in "AB")
            offset_a, offset_b = ((extent.start - start) // self.itemsize for extent in (a, b))
            size = target.in_features
            pieces.append((size, rank, block + first, total, a.rank, offset_a, size, 1))
            pieces.append((target.out_features, rank, block + base, rank, a.rank, offset_b, 1, a.rank))
            first += rank
        return pieces
