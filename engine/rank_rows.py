"""Which rows of a pool are whose. PURE: tensors are in rank_store.py.

Any free rows will do for an adapter; those side by side are preferred, because kernels then need no table to find
them. So nothing fragments: as long as as many rows are free as are asked for, they are given.

Every row carries the generation of the allotment it belongs to, and every step compares them for all rows it is about
to read. That two allotments share a row must be impossible; if it happens, the step fails instead of answering with
another adapter's weights.
"""

from __future__ import annotations

import sys
from array import array
from bisect import bisect_left, insort
from dataclasses import dataclass

from engine.errors import RowsCorrupt, RowsFull, StaleRows

FREE = 0
_SIZE = array("q").itemsize


@dataclass(frozen=True, slots=True)
class Rows:
    """An allotment: runs of rows `start` to `stop`, in the order of what they hold, and their generation."""

    generation: int
    runs: tuple[tuple[int, int], ...]

    @property
    def count(self) -> int:
        """How many rows."""
        return sum(stop - start for start, stop in self.runs)

    @property
    def is_scattered(self) -> bool:
        """Whether they are not all side by side."""
        return len(self.runs) > 1

    def listed(self) -> list[int]:
        """The rows one by one."""
        return [row for start, stop in self.runs for row in range(start, stop)]


class RowPool:
    """Rows 0 to total - 1."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.free_count = total
        # Sorted, with rows in use between any two of them.
        self._free: list[tuple[int, int]] = [(0, total)] if total else []
        self._generations = array("q", [FREE]) * total
        self._bytes = memoryview(self._generations).cast("B")
        self._generation = FREE

    def allot(self, count: int) -> Rows:
        """Takes `count` rows, side by side if there are such; raises RowsFull, with nothing changed, if too few are free.

        Of the runs that hold them all, the smallest is used; if there is none, the largest ones are used up.
        """
        if count > self.free_count:
            raise RowsFull(count, self.free_count, self.total)
        runs, left = [], count
        while left:
            enough = [run for run in self._free if run[1] - run[0] >= left]
            chosen = min(enough, key=_length) if enough else max(self._free, key=_length)
            start, stop = chosen[0], min(chosen[1], chosen[0] + left)
            self._free.remove(chosen)
            if stop < chosen[1]:
                insort(self._free, (stop, chosen[1]))
            runs.append((start, stop))
            left -= stop - start
        self.free_count -= count
        self._generation += 1
        for start, stop in runs:
            self._generations[start:stop] = array("q", [self._generation]) * (stop - start)
        return Rows(self._generation, tuple(runs))

    def release(self, rows: Rows) -> None:
        """Gives rows back; raises RowsCorrupt, with nothing changed, unless they are of their generation."""
        if self._found(rows) is not None:
            raise RowsCorrupt(f"rows of generation {rows.generation} are given back, but are not held")
        for start, stop in rows.runs:
            self._generations[start:stop] = array("q", [FREE]) * (stop - start)
            self._merge(start, stop)
        self.free_count += rows.count

    def check(self, rows: Rows, digest: str) -> None:
        """Raises StaleRows unless every one of the rows is still of the generation it was allotted with."""
        found = self._found(rows)
        if found is not None:
            raise StaleRows(digest, rows.generation, found)

    def check_integrity(self) -> None:
        """Raises RowsCorrupt unless free runs are apart, in order, and exactly the rows of no generation."""
        free = sum(stop - start for start, stop in self._free)
        apart = all(one[1] < other[0] for one, other in zip(self._free, self._free[1:], strict=False))
        unowned = all(self._generations[row] == FREE for start, stop in self._free for row in range(start, stop))
        if not (apart and unowned and free == self.free_count == self._generations.count(FREE)):
            raise RowsCorrupt(f"{self.free_count} rows should be free")

    def _found(self, rows: Rows) -> int | None:
        """A generation other than theirs that one of the rows has."""
        for start, stop in rows.runs:
            # Compared as bytes, without making numbers of them: about a microsecond for a thousand rows.
            expected = rows.generation.to_bytes(_SIZE, sys.byteorder) * (stop - start)
            if self._bytes[start * _SIZE : stop * _SIZE].tobytes() != expected:
                return next(g for g in self._generations[start:stop] if g != rows.generation)
        return None

    def _merge(self, start: int, stop: int) -> None:
        place = bisect_left(self._free, (start, stop))
        if place < len(self._free) and self._free[place][0] == stop:
            stop = self._free.pop(place)[1]
        if place and self._free[place - 1][1] == start:
            start = self._free.pop(place - 1)[0]
        insort(self._free, (start, stop))


def _length(run: tuple[int, int]) -> int:
    return run[1] - run[0]


class RowTable:
    """Where the rows of scattered allotments are listed for the kernels: in one table of as many entries as rows.

    A list stays where it is while steps use it. When the table is full, it is begun anew with the lists of one step,
    which always fit: allotments share no rows.

    Attributes:
        epoch: how often it was begun anew; lists are elsewhere since.
    """

    def __init__(self, total: int) -> None:
        self.epoch = 0
        self._total = total
        self._places: dict[int, int] = {}
        self._used = 0

    def place(self, wanted: list[Rows]) -> list[tuple[int, Rows]]:
        """Gives all of these a place; returns those that are to be written, and where."""
        wanted = list({rows.generation: rows for rows in wanted}.values())
        new = [rows for rows in wanted if rows.generation not in self._places]
        if self._used + sum(rows.count for rows in new) > self._total:
            self._places.clear()
            self._used, new = 0, wanted
            self.epoch += 1
        writes = []
        for rows in new:
            self._places[rows.generation] = self._used
            writes.append((self._used, rows))
            self._used += rows.count
        return writes

    def start_of(self, rows: Rows) -> int:
        """Where the list of an allotment begins that was given a place."""
        return self._places[rows.generation]
