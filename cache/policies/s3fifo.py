"""S3-FIFO: a small queue on probation, a main queue, and a memory of who failed the probation."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence

from cache.plan import Resident

SMALL_SHARE = 0.1
MOST_USES = 3


class S3Fifo:
    """New artifacts enter the small queue; those used there move to the main queue, the others go and are remembered.

    Who is asked for again while it is remembered enters the main queue, which is a FIFO with re-insertion. Yang, Zhang, Qiu,
    Yue, Rashmi, "FIFO Queues are All You Need for Cache Eviction", SOSP 2023. Queues are measured in bytes.
    """

    def __init__(self, budget_bytes: int) -> None:
        self._small_bytes = budget_bytes * SMALL_SHARE
        # Oldest first. digest -> uses since it entered, at most MOST_USES.
        self._small: dict[str, int] = {}
        self._main: dict[str, int] = {}
        self._ghosts: deque[str] = deque()
        self._sizes: dict[str, int] = {}

    def used(self, digest: str, size_bytes: int, cost: float) -> None:
        """Counts a use of what is there."""
        for queue in (self._small, self._main):
            if digest in queue:
                queue[digest] = min(queue[digest] + 1, MOST_USES)

    def entered(self, digest: str, size_bytes: int) -> None:
        """On probation, unless it is remembered; the use that brought it does not count."""
        if digest in self._sizes:
            return
        self._sizes[digest] = size_bytes
        (self._main if digest in self._ghosts else self._small)[digest] = 0

    def left(self, digest: str) -> None:
        """Makes the moves that an eviction of this one brings about."""
        if digest not in self._sizes:
            return
        failed_probation = digest in self._small and self._small[digest] <= 1
        next(_victims(self._small, self._main, self._sizes, self._small_bytes, {digest}), None)
        self._small.pop(digest, None)
        self._main.pop(digest, None)
        del self._sizes[digest]
        if failed_probation:
            self._ghosts.append(digest)
        while len(self._ghosts) > max(len(self._main), 1):
            self._ghosts.popleft()

    def order(self, candidates: Iterable[Resident]) -> Sequence[Resident]:
        """The candidates as the two queues would give them up."""
        by_digest = {one.digest: one for one in candidates}
        unknown = [one for digest, one in by_digest.items() if digest not in self._sizes]
        known = by_digest.keys() & self._sizes.keys()
        victims = _victims(dict(self._small), dict(self._main), self._sizes, self._small_bytes, known)
        return unknown + [by_digest[digest] for digest in victims]


def _victims(
    small: dict[str, int], main: dict[str, int], sizes: dict[str, int], small_bytes: float, may_go: Iterable[str]
) -> Iterator[str]:
    """Those that may go, in turn; changes the queues as the evictions would. Those that may not are passed by."""
    left = set(may_go)
    small_held = sum(sizes[digest] for digest in small)
    while left:
        from_small = small_held >= small_bytes and not left.isdisjoint(small)
        if from_small or left.isdisjoint(main):
            digest = next(digest for digest in small if digest in left or small[digest] > 1)
            uses = small.pop(digest)
            small_held -= sizes[digest]
            if uses > 1:
                main[digest] = 0
                continue
        else:
            digest = next(digest for digest in main if digest in left or main[digest] > 0)
            uses = main.pop(digest)
            if uses > 0:
                main[digest] = uses - 1
                continue
        left.discard(digest)
        yield digest
