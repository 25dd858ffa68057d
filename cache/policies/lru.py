"""Least recently used."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from cache.plan import Resident


class Lru:
    """Gives up what was not used for longest. Needs to learn nothing: residents know their last use."""

    def used(self, digest: str, size_bytes: int, cost: float) -> None:
        """Nothing."""

    def entered(self, digest: str, size_bytes: int) -> None:
        """Nothing."""

    def left(self, digest: str) -> None:
        """Nothing."""

    def order(self, candidates: Iterable[Resident]) -> Sequence[Resident]:
        """The candidates by the time of their last use."""
        return sorted(candidates, key=lambda resident: (resident.last_used, resident.digest))
