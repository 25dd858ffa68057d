"""All sources behind one: by scheme, each with its limit of readers, its deadline and the right credentials."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import NamedTuple

from cache.artifact import AdapterFiles
from cache.errors import SourceTooSlow
from cache.sources.credentials import GivenCredentials
from cache.sources.source import NO_CREDENTIALS, Credentials, Limits, Source, scheme_of

# Looking costs a source little, and is done in every call.
LOOKS_PER_READER = 4


class _Room(NamedTuple):
    """What one source may be asked at the same time."""

    looks: asyncio.Semaphore
    reads: asyncio.Semaphore


class Sources:
    """See the module; itself a Source.

    Args:
        served: scheme -> source.
    """

    def __init__(
        self, served: Mapping[str, Source], limits: Limits | None = None, given: GivenCredentials | None = None
    ) -> None:
        self._served = dict(served)
        self._limits = limits or Limits()
        self._given = given or GivenCredentials()
        # Sources that serve two schemes share their room.
        rooms = {id(source): self._room() for source in self._served.values()}
        self._rooms = {scheme: rooms[id(source)] for scheme, source in self._served.items()}

    def _room(self) -> _Room:
        at_once = self._limits.at_once
        return _Room(asyncio.Semaphore(at_once * LOOKS_PER_READER), asyncio.Semaphore(at_once))

    @property
    def schemes(self) -> tuple[str, ...]:
        """What is served."""
        return tuple(self._served)

    async def look(self, source_uri: str, credentials: Credentials = NO_CREDENTIALS, revision: str = "") -> str:
        """See Source.look."""
        room = self._rooms[scheme_of(source_uri, self.schemes)].looks
        async with room, self._timed(source_uri, self._limits.idle_seconds + self._limits.connect_seconds) as source:
            return await source.look(source_uri, self._rights(source_uri, credentials), revision)

    async def fetch(self, source_uri: str, revision: str, credentials: Credentials = NO_CREDENTIALS) -> AdapterFiles:
        """See Source.fetch. Waiting for other readers of the source does not count as time."""
        room = self._rooms[scheme_of(source_uri, self.schemes)].reads
        async with room, self._timed(source_uri, self._limits.total_seconds) as source:
            return await source.fetch(source_uri, revision, self._rights(source_uri, credentials))

    def _rights(self, source_uri: str, credentials: Credentials) -> Credentials:
        return credentials if credentials != NO_CREDENTIALS else self._given.of(source_uri)

    @asynccontextmanager
    async def _timed(self, source_uri: str, seconds: float) -> AsyncIterator[Source]:
        source = self._served[scheme_of(source_uri, self.schemes)]
        try:
            async with asyncio.timeout(seconds):
                yield source
        except TimeoutError:
            raise SourceTooSlow(source_uri, seconds) from None

    async def close(self) -> None:
        """Closes the sources' connections."""
        for source in self._served.values():
            await source.close()
