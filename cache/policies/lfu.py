"""Least frequently used, with ageing."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from cache.plan import Resident


class Lfu:
    """LFU with dynamic ageing: an artifact's key is its uses while it is in the tier plus the age of the tier at the last one.

    The age is the key of the last artifact that left, so what was popular long ago falls behind by itself.
    Arlitt, Cherkasova, Dilley, Friedrich, Jin, "Evaluating Content Management Techniques for Web Proxy Caches",
    Performance Evaluation Review 27(4), 2000 (LFU-DA).
    """

    def __init__(self) -> None:
        self._age = 0.0
        self._uses: dict[str, int] = {}
        self._keys: dict[str, float] = {}

    def used(self, digest: str, size_bytes: int, cost: float) -> None:
        """One use more, of the present age."""
        self._uses[digest] = self._uses.get(digest, 0) + 1
        self._keys[digest] = self._age + self._uses[digest]

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
