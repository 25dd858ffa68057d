"""SIEVE: one queue, one bit each, one hand."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from cache.plan import Resident


class Sieve:
    """The hand moves from the oldest to the newest: who was used since it came by loses the bit and stays, who was not goes.

    Zhang, Yang, Yue, Vigfusson, Rashmi, "SIEVE is Simpler than LRU", NSDI 2024.
    """

    def __init__(self) -> None:
        # Oldest first; True where it was used since the hand came by. The hand is at number `_hand`.
        self._visited: dict[str, bool] = {}
        self._hand = 0

    def used(self, digest: str, size_bytes: int, cost: float) -> None:
        """Sets the bit of what is there; its place stays."""
        if digest in self._visited:
            self._visited[digest] = True

    def entered(self, digest: str, size_bytes: int) -> None:
        """Goes to the new end of the queue; the use that brought it does not count."""
        self._visited.setdefault(digest, False)

    def left(self, digest: str) -> None:
        """Moves the hand to where this one was, taking the bits of those on the way."""
        if digest not in self._visited:
            return
        for other in self._from_hand():
            if other == digest and not self._visited[other]:
                break
            self._visited[other] = False
        place = list(self._visited).index(digest)
        del self._visited[digest]
        self._hand = place if place < len(self._visited) else 0

    def order(self, candidates: Iterable[Resident]) -> Sequence[Resident]:
        """Those without the bit from the hand on, then those with it."""
        place = {digest: number for number, digest in enumerate(self._from_hand()) if number < len(self._visited)}
        return sorted(
            candidates, key=lambda one: (self._visited.get(one.digest, False), place.get(one.digest, 0), one.digest)
        )

    def _from_hand(self) -> list[str]:
        """Once round from the hand, and once more for those that had the bit the first time."""
        digests = list(self._visited)
        return (digests[self._hand :] + digests[: self._hand]) * 2
