"""The value of keeping: how likely an artifact is asked for next, times what it costs to bring it back, per byte."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from cache.plan import Resident
from cache.popularity import Popularity


def value(chance: float, cost: float, size_bytes: int) -> float:
    """What an artifact is worth per byte."""
    return chance * cost / max(1, size_bytes)


class Value:
    """Gives up what is worth least per byte. What is known to be coming is the plan's business; this judges the rest.

    Chances are learned of everything that was ever asked for, also of what is not in the tier, so an artifact that comes back
    is judged by its history, and one that was asked for once is on probation. See cache/popularity.py.
    Where there are very many, cache/ranking.py gives the same order bit by bit.
    """

    def __init__(self) -> None:
        self.popularity = Popularity()

    def used(self, digest: str, size_bytes: int, cost: float) -> None:
        """Learns."""
        self.popularity.note(digest)

    def entered(self, digest: str, size_bytes: int) -> None:
        """Nothing: it is not used yet."""

    def left(self, digest: str) -> None:
        """Nothing: its history stays."""

    def order(self, candidates: Iterable[Resident]) -> Sequence[Resident]:
        """The candidates by value per byte; of equals the one not used for longest."""
        chance = self.popularity.chance
        return sorted(
            candidates,
            key=lambda one: (value(chance(one.digest), one.cost, one.size_bytes), one.last_used, one.digest),
        )
