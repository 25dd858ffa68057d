"""In which order artifacts are given up that nobody needs, without sorting them all: only as far as someone reads.

The order is that of cache/policies/value.py: chance of use times cost per byte, of equals the one not used for longest. Chances
change with every use of anything, so no order can be kept. A bound can: the counts of the slowest memory (cache/popularity.py)
fade for all alike, so by that count times cost per byte artifacts stay in order until they are used, and what this memory gives
to a chance is never more than all of it. So they are taken by that bound, and one is given out once no other can be worth less.

It is quick because what is worth least was not used for long, and then hardly anything but the slowest memory knows it.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Generator
from typing import NamedTuple

from cache.policies.value import value
from cache.popularity import Popularity

# Floating point: what is to be exact is compared with a little room.
SLACK = 1e-9
# So many old places more than there are artifacts are put up with.
SPARE = 1000


class _Entry(NamedTuple):
    """Artifacts are taken by `rank`, which only rises with use, then by their last use, as both were when this was made."""

    rank: float
    last_used: float
    digest: str


class Ranking:
    """See the module.

    Args:
        cost: seconds to bring an artifact of so many bytes back.
        last_used: when an artifact was used last, any unit that grows.
    """

    def __init__(self, popularity: Popularity, cost: Callable[[int], float], last_used: Callable[[str], float]) -> None:
        self._popularity, self._cost, self._last_used = popularity, cost, last_used
        self._sizes: dict[str, int] = {}
        self._entries: dict[str, _Entry] = {}
        self._heap: list[_Entry] = []
        # What is forgotten is worth nothing, so its old place is too high.
        popularity.when_forgotten = self.used

    def enter(self, digest: str, size_bytes: int) -> None:
        """Takes an artifact in."""
        self._sizes[digest] = size_bytes
        self._place(digest)

    def used(self, digest: str) -> None:
        """Puts an artifact where it belongs after it was used; where that is left out, once it is come across."""
        if digest in self._sizes:
            self._place(digest)

    def leave(self, digest: str) -> None:
        """Forgets an artifact."""
        self._sizes.pop(digest, None)
        self._entries.pop(digest, None)

    def in_order(self, may_go: Callable[[str], bool]) -> Generator[str]:
        """Those that may go, the first to go first. Nothing may be used, enter or leave while this is read; close it then."""
        taken: list[str] = []
        ready: list[tuple[float, float, str]] = []
        try:
            while self._heap or ready:
                while self._heap and (not ready or self._may_be_before(self._heap[0], *ready[0])):
                    entry = heapq.heappop(self._heap)
                    if self._entries.get(entry.digest) is not entry:
                        continue
                    taken.append(entry.digest)
                    if may_go(entry.digest):
                        heapq.heappush(ready, self._now(entry.digest))
                if ready:
                    yield heapq.heappop(ready)[2]
        finally:
            for digest in taken:
                self._place(digest)

    def _now(self, digest: str) -> tuple[float, float, str]:
        """What artifacts are ordered by in the end."""
        size = self._sizes[digest]
        return value(self._popularity.chance(digest), self._cost(size), size), self._last_used(digest), digest

    def _may_be_before(self, entry: _Entry, least_value: float, last_used: float, digest: str) -> bool:
        """Whether an artifact may go before one of that value, last use and digest."""
        if entry.rank == -math.inf:
            return least_value > 0.0 or (entry.last_used, entry.digest) <= (last_used, digest)
        # A rank has the cost per byte in it, so this is a value.
        return self._popularity.at_least(entry.rank) <= least_value * (1 + SLACK)

    def _place(self, digest: str) -> None:
        per_byte = value(1.0, self._cost(self._sizes[digest]), self._sizes[digest])
        rank = self._popularity.rank(digest) + (math.log(per_byte) if per_byte else -math.inf)
        self._entries[digest] = entry = _Entry(rank, self._last_used(digest), digest)
        heapq.heappush(self._heap, entry)
        if len(self._heap) > 2 * len(self._entries) + SPARE:
            self._heap = list(self._entries.values())
            heapq.heapify(self._heap)
