"""Where the numbers of an adapter go in a pool of rows. PURE.

A row is `width` numbers, once in every layer; row 7 of one layer and row 7 of another belong to the same adapter and to
the same place in it. So what a step must know of an adapter is the same for all layers.

Projections of the same shape, at the same place in their layers, are of one kind. A rank of a module takes one row for
each `width` numbers of its row of A, and one for each `width` numbers of its row of Bᵀ. So rows are the one currency of
all kinds: an adapter of any rank, on any modules, takes as many as it has numbers for, wherever they are free.

    block of an adapter and kind      logical row         holds
    R ranks over all targets          c · R + r           chunk c of row r of A, the targets' A on top of each other
    R_j of target j                   base_j + c · R_j+r  chunk c of row r of Bᵀ of target j

An adapter that leaves out some layers, or has smaller ranks in them, has zeros there.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from engine.projection import Projection

NARROWEST, WIDEST = 16, 1024
# Wider rows mean shorter tables, so a little may be lost to the last chunk of each vector.
TOLERATED_LOSS = 1.01


@dataclass(frozen=True, slots=True)
class Kind:
    """Projections that are computed alike.

    Attributes:
        projections: their numbers, one for each layer.
        columns: where the targets' outputs begin, and where the last one's end.
    """

    projections: tuple[int, ...]
    in_features: int
    columns: tuple[int, ...]

    @property
    def outs(self) -> tuple[int, ...]:
        """Output features of each target."""
        return tuple(stop - first for first, stop in pairwise(self.columns))

    def rows_of(self, ranks: Sequence[int], width: int) -> int:
        """Rows of a block with these ranks by target."""
        in_chunks = chunks(self.in_features, width)
        return sum(rank * (in_chunks + chunks(out, width)) for rank, out in zip(ranks, self.outs, strict=True))

    def bases(self, ranks: Sequence[int], width: int) -> tuple[int, ...]:
        """First logical row of Bᵀ of each target."""
        found, base = [], sum(ranks) * chunks(self.in_features, width)
        for rank, out in zip(ranks, self.outs, strict=True):
            found.append(base)
            base += rank * chunks(out, width)
        return tuple(found)


def chunks(size: int, width: int) -> int:
    """Rows that a vector of so many numbers takes."""
    return -(-size // width)


def kinds_of(projections: Sequence[Projection]) -> tuple[Kind, ...]:
    """The kinds of a base, in the order they are computed."""
    groups: defaultdict[object, list[int]] = defaultdict(list)
    for number, projection in enumerate(projections):
        place = tuple(
            (re.sub(r"\d+", "#", target.name), target.in_features, target.out_features) for target in projection.targets
        )
        groups[place].append(number)
    kinds = []
    for numbers in groups.values():
        like = projections[numbers[0]]
        columns = (0, *(columns.stop for columns in like.columns))
        kinds.append(Kind(tuple(numbers), like.targets[0].in_features, columns))
    return tuple(kinds)


def row_width(kinds: Sequence[Kind]) -> int:
    """The widest rows that waste next to nothing: a power of two, as a tile of a kernel must not cross rows."""
    sizes = [size for kind in kinds for out in kind.outs for size in (kind.in_features, out)]

    def taken(width: int) -> int:
        return sum(chunks(size, width) * width for size in sizes)

    width = WIDEST
    while width > NARROWEST and taken(width) > TOLERATED_LOSS * sum(sizes):
        width //= 2
    return width


def layer_of(name: str) -> int:
    """Number of the layer a module is in: the first number of its path."""
    return next(int(part) for part in name.split(".") if part.isdecimal())
