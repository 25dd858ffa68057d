"""The value of keeping: how likely an artifact is asked for next, times what it costs to bring it back, per byte."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from cache.plan import Resident
from cache.popularity import Popularity


class Value:
    """Gives up what is worth least per byte. What is known to be coming is the plan's business; this judges the rest.

    Chances are learned of everything that was ever asked for, also of what is not in the tier, so an artifact that comes back
    is judged by its history, and one that was asked for once is on probation. See cache/popularity.py.
    """

    def __init__(self) -> None:
        self._popularity = Popularity()

    def used(self, digest: str, size_bytes: int, cost: float) -> None:
        """Learns."""
        self._popularity.note(digest)

    def entered(self, digest: str, size_bytes: int) -> None:
        """Nothing: it is not used yet."""

    def left(self, digest: str) -> None:
        """Nothing: its history stays."""

    def order(self, candidates: Iterable[Resident]) -> Sequence[Resident]:
        """The candidates by value per byte; of equals the one not used for longest."""
        chance = self._popularity.chance
        return sorted(
            candidates,
            key=lambda one: (chance(one.digest) * one.cost / max(1, one.size_bytes), one.last_used, one.digest),
        )
