"""Greedy dual, size, frequency."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from cache.plan import Resident


class Gdsf:
    """An artifact's key is the age of the tier at its last use plus uses times cost per byte; the lowest key goes.

    Cherkasova, "Improving WWW Proxies Performance with Greedy-Dual-Size-Frequency Caching Policy", HP Laboratories HPL-98-69R1,
    1998. The cost is the time to bring the artifact to the tier.
    """

    def __init__(self) -> None:
        self._age = 0.0
        self._uses: dict[str, int] = {}
        self._keys: dict[str, float] = {}

    def used(self, digest: str, size_bytes: int, cost: float) -> None:
        """One use more, of the present age."""
        self._uses[digest] = self._uses.get(digest, 0) + 1
        self._keys[digest] = self._age + self._uses[digest] * cost / max(1, size_bytes)

    def entered(self, digest: str, size_bytes: int) -> None:
        """Known from now on; it may have come without a use, by look-ahead."""
        self._uses.setdefault(digest, 0)
        self._keys.setdefault(digest, self._age)

    def left(self, digest: str) -> None:
        """The tier is as old as what it gives up."""
        self._age = max(self._age, self._keys.pop(digest, 0.0))
        self._uses.pop(digest, None)

    def order(self, candidates: Iterable[Resident]) -> Sequence[Resident]:
        """The candidates by their keys; of equals the one not used for longest."""
        return sorted(candidates, key=lambda one: (self._keys.get(one.digest, 0.0), one.last_used, one.digest))
