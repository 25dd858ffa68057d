"""Which of `n` things is where in an array without holes, and what has to be copied when the set of things changes."""

from __future__ import annotations

from collections.abc import Collection, Hashable
from dataclasses import dataclass
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)


@dataclass(frozen=True, slots=True)
class Write(Generic[K]):
    """Slot `slot` becomes `key`'s: copied from slot `source`, or filled anew where that is None."""

    slot: int
    key: K
    source: int | None = None


class Slots(Generic[K]):
    """Keys in slots 0 to len(self) - 1, each in one."""

    def __init__(self) -> None:
        self._keys: list[K] = []
        self._places: dict[K, int] = {}

    def __len__(self) -> int:
        return len(self._keys)

    def __getitem__(self, key: K) -> int:
        return self._places[key]

    def update(self, wanted: Collection[K]) -> list[Write[K]]:
        """Makes the keys exactly those wanted; returns the fewest writes that do it, to be done in this order.

        New keys take the places of those that go; what is left over is filled from the end.
        """
        keep = set(wanted)
        holes = [place for place, key in enumerate(self._keys) if key not in keep]
        writes: list[Write[K]] = []
        for key in wanted:
            if key not in self._places:
                place = holes.pop(0) if holes else len(self._keys)
                writes.append(Write(place, key))
                self._put(place, key)
        for place in reversed(holes):
            last = self._keys.pop()
            if place < len(self._keys):
                writes.append(Write(place, last, len(self._keys)))
                self._put(place, last)
            else:
                del self._places[last]
        return writes

    def _put(self, place: int, key: K) -> None:
        if place == len(self._keys):
            self._keys.append(key)
        else:
            gone = self._keys[place]
            if self._places.get(gone) == place:
                del self._places[gone]
            self._keys[place] = key
        self._places[key] = place
