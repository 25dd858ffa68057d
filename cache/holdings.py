"""What this node holds: where each artifact is, and the files that make it so.

Places change here only, by the table in cache/residency.py. Removing a file is quick and done on the event loop.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from cache import metrics
from cache.artifact import TARGET_DTYPES
from cache.residency import Move, Place, moved
from cache.tiers import ArtifactKey, FileTier

ON_DISK = frozenset({Place.DISK, Place.STAGING, Place.HOST})


@dataclass
class Held:
    """Where one artifact is on this node; one that was never heard of is REMOTE."""

    place: Place
    size_bytes: int = 0
    last_used: float = 0.0


class Holdings:
    """See the module.

    Args:
        changed: called with a digest whose place has changed by what was removed.

    Attributes:
        disk_bytes: what the artifacts on disk take.
    """

    def __init__(self, disk: FileTier, host: FileTier, changed: Callable[[str], None]) -> None:
        self.disk, self.host = disk, host
        self._changed = changed
        self._held: dict[ArtifactKey, Held] = {}
        self._by_place: dict[Place, dict[ArtifactKey, Held]] = {place: {} for place in Place}
        self.disk_bytes = 0
        self._news: set[ArtifactKey] = set()

    async def find(self) -> None:
        """Finds what an earlier process left in the tiers."""
        on_disk = await asyncio.to_thread(self.disk.sizes)
        on_host = await asyncio.to_thread(self.host.sizes)
        for key, size in on_disk.items():
            self.move(key, Move.FIND, size)
        for key, size in on_host.items():
            # Shared memory outlives the process that wrote it, and engines only read it; still, what is served is looked at.
            if on_disk.get(key) != size or not await asyncio.to_thread(self.host.verify, key):
                self.host.remove(key)
                continue
            self.move(key, Move.STAGE)
            self.move(key, Move.STAGED)

    def place(self, key: ArtifactKey) -> Place:
        """Where an artifact is."""
        held = self._held.get(key)
        return held.place if held else Place.REMOTE

    def places(self, digest: str) -> list[Place]:
        """The tiers that hold a version in any number type."""
        found = {self.place(ArtifactKey(digest, dtype)) for dtype in TARGET_DTYPES}
        return [tier for tier, at in ((Place.DISK, ON_DISK), (Place.HOST, {Place.HOST})) if found & at]

    def size(self, key: ArtifactKey) -> int:
        """Bytes of an artifact; 0 when it was never here."""
        held = self._held.get(key)
        return held.size_bytes if held else 0

    def count(self, place: Place) -> int:
        """How many artifacts are in a place."""
        return len(self._by_place[place])

    def at(self, places: Iterable[Place]) -> list[tuple[ArtifactKey, Held]]:
        """The artifacts that are in one of these places."""
        return [each for place in places for each in self._by_place[place].items()]

    def on_disk(self, digest: str) -> list[ArtifactKey]:
        """The artifacts of a version that are on disk, one for each number type."""
        keys = (ArtifactKey(digest, dtype) for dtype in TARGET_DTYPES)
        return [key for key in keys if self.place(key) in ON_DISK]

    def last_used(self, key: ArtifactKey) -> float:
        """When an artifact was used last, monotonic seconds; 0 for never."""
        held = self._held.get(key)
        return held.last_used if held else 0.0

    def news(self) -> set[ArtifactKey]:
        """The artifacts that have come to the disk or left it since this was asked last."""
        news, self._news = self._news, set()
        return news

    def touch(self, key: ArtifactKey) -> None:
        """Notes that an artifact is being used."""
        if key in self._held:
            self._held[key].last_used = time.monotonic()

    def move(self, key: ArtifactKey, move: Move, size_bytes: int = 0) -> None:
        """Makes a move of the table. Raises IllegalMove."""
        held = self._held.get(key) or Held(Place.REMOTE)
        before, place = held.place, moved(held.place, move)
        self._by_place[before].pop(key, None)
        self.disk_bytes -= held.size_bytes if before in ON_DISK else 0
        held.place, held.size_bytes = place, size_bytes or held.size_bytes
        self._held[key] = self._by_place[place][key] = held
        self.disk_bytes += held.size_bytes if place in ON_DISK else 0
        if (before in ON_DISK) != (place in ON_DISK):
            self._news.add(key)
        if move in (Move.STORE, Move.STAGED):
            held.last_used = time.monotonic()

    def unstage(self, key: ArtifactKey) -> None:
        """Gives the room of an artifact in the host tier back; an engine that has mapped it keeps its mapping."""
        self.host.remove(key)
        self.move(key, Move.UNSTAGE)
        metrics.EVICTIONS.labels("host").inc()
        self._changed(key.digest)

    def drop(self, key: ArtifactKey) -> None:
        """Removes an artifact from the disk, and from the host tier, which holds nothing that is not on disk."""
        if self.place(key) is Place.HOST:
            self.unstage(key)
        self.disk.remove(key)
        self.move(key, Move.DROP)
        self._changed(key.digest)

    def forget(self, key: ArtifactKey) -> None:
        """Removes what there is of an artifact that nothing is being done with."""
        if self.place(key) in (Place.DISK, Place.HOST):
            self.drop(key)
        del self._by_place[self._held.pop(key).place][key]

    def known(self) -> list[ArtifactKey]:
        """All artifacts that were heard of."""
        return list(self._held)
