"""Brings an artifact to the disk tier: from a neighbour where one has it, else from its source, alone among all nodes."""

from __future__ import annotations

from dataclasses import replace

from cache import metrics
from cache.builder import Builder, Origin
from cache.disk_room import DiskRoom
from cache.errors import SourceChanged
from cache.flights import Flights
from cache.neighbours import Neighbours
from cache.tiers import ArtifactKey


class Fetcher:
    """See the module."""

    def __init__(self, builder: Builder, flights: Flights, neighbours: Neighbours, room: DiskRoom) -> None:
        self._builder, self._flights, self._neighbours, self._room = builder, flights, neighbours, room

    async def fetch(self, key: ArtifactKey, origin: Origin, traceparent: str) -> int:
        """Puts a version on disk; returns its bytes.

        Raises:
            SourceChanged: no neighbour has it, and its source holds another version by now.
            TierFull, TierFailed: there is no room, or the disk has trouble.
            what Builder.build raises.
        """
        size = await self._from_neighbour(key, everyone=False)
        if size is not None:
            return size
        async with self._flights.alone(key.name) as waited:
            if waited and (size := await self._from_neighbour(key, everyone=True)) is not None:
                return size
            base = replace(origin.base, dtype=key.dtype)
            artifact = await self._builder.build(
                origin.source_uri, lambda _: base, traceparent, origin.revision, is_needed=True
            )
            if artifact.digest != key.digest:
                raise SourceChanged(origin.source_uri, key.digest, artifact.digest)
            # Within the flight: whoever waits for it finds the artifact here.
            return await self._room.write(key, artifact.packed)

    async def _from_neighbour(self, key: ArtifactKey, everyone: bool) -> int | None:
        size = await self._neighbours.fetch(key, everyone)
        if size is not None:
            metrics.FETCHES.labels("neighbour").inc()
        return size
