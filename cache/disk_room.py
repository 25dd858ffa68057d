"""Room on disk. What its source would give again goes when something else needs the room, and only as much as it needs.

What cannot be had again stays until it is deleted: what a caller registered with his own rights, which are not kept, and what
its source does not hold any more. So a source is asked before anything goes, and one that answers no is not asked again for a
while. What goes is REMOTE from then on: who needs it next has it fetched like anything that was never here.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Callable, Iterable
from contextlib import closing, suppress

from cache import metrics
from cache.builder import Builder, Origin
from cache.costs import TO_DISK
from cache.demand import Demand
from cache.errors import SourceTooSlow, TierFull
from cache.failures import Failures
from cache.holdings import ON_DISK, Holdings
from cache.plan import Resident, make_room
from cache.popularity import Popularity
from cache.ranking import Ranking
from cache.residency import Place
from cache.tiers import ArtifactKey, Incoming
from servicekit.errors import ServiceError

_log = logging.getLogger(__name__)

# A source that does not answer so soon may not give it again either.
CONFIRM_SECONDS = 5.0
# So long a source that has answered is not asked again.
SURE_SECONDS = 5.0
# So long it is tried to make room for one who needs it, while there is hope.
PATIENCE_SECONDS = 10.0
LOOK_AGAIN_SECONDS = 0.05
FORGET_SECONDS = 600.0


class DiskRoom:
    """See the module. Everything that is written to the disk tier is written here. Called on the event loop.

    Args:
        origin_of: where a version came from; None when no adapter points to it.
        demand: what the node needs now.
        popularity: what it gives up first of what nobody needs.
    """

    def __init__(
        self,
        holdings: Holdings,
        builder: Builder,
        origin_of: Callable[[str], Origin | None],
        demand: Callable[[], Demand],
        popularity: Popularity,
    ) -> None:
        self._holdings, self._builder = holdings, builder
        self._ranking = Ranking(popularity, TO_DISK.cost, lambda name: holdings.last_used(ArtifactKey.of(name)))
        self._origin_of, self._demand = origin_of, demand
        self._lost = Failures(random.random)
        # What its source would give again -> when that was said.
        self._sure: dict[ArtifactKey, float] = {}
        # Bytes that all who wait for room need.
        self._needed = 0
        self._making = asyncio.Lock()

    async def write(self, key: ArtifactKey, content: bytes) -> int:
        """Stores an artifact; returns its bytes. Raises TierFull or TierFailed."""
        await self._reserve(key, len(content))
        return await asyncio.to_thread(self._holdings.disk.write, key, content)

    async def receive(self, key: ArtifactKey, size: int, checksum: str) -> Incoming:
        """Makes room for an artifact that comes in pieces; see Incoming. Raises TierFull or TierFailed."""
        await self._reserve(key, size)
        return await asyncio.to_thread(self._holdings.disk.receive, key, size, checksum)

    async def _reserve(self, key: ArtifactKey, size: int) -> None:
        disk = self._holdings.disk
        with suppress(TierFull):
            return disk.reserve(key, size)
        until = time.monotonic() + PATIENCE_SECONDS
        self._needed += size
        try:
            # One after another, so that nothing goes for room that another has made already.
            async with self._making:
                await self._make(size, until)
                while disk.free_bytes < size <= disk.budget_bytes and self._is_moving() and time.monotonic() < until:
                    await asyncio.sleep(LOOK_AGAIN_SECONDS)
                    await self._make(size, until)
                disk.reserve(key, size)
        finally:
            self._needed -= size

    def _is_moving(self) -> bool:
        """Whether something has room that may go once it is where it goes to now."""
        disk, passing = self._holdings.disk, self._demand().passing
        being_written = disk.budget_bytes - disk.free_bytes - self._holdings.disk_bytes
        passes = any(self._holdings.on_disk(digest) for digest in passing)
        return being_written > 0 or passes or self._holdings.count(Place.STAGING) > 0

    async def _make(self, size: int, until: float) -> None:
        """Gives up what makes room for so many bytes, if that can be done in time."""
        now = time.monotonic()
        self._lost.forget_before(now - FORGET_SECONDS)
        self._sure = {key: at for key, at in self._sure.items() if at > now - SURE_SECONDS}
        # Decided anew after every question: the world may have moved on while a source was asked.
        while unsure := set(chosen := self._choose(size)) - self._sure.keys():
            if time.monotonic() > until:
                return
            # For all who wait together, since sources are slow.
            unsure |= set(self._choose(self._needed)) - self._sure.keys()
            await asyncio.gather(*(self._ask(key) for key in unsure))
        for key in chosen:
            self._give_up(key)

    def _choose(self, size: int) -> list[ArtifactKey]:
        """What would go for so many bytes. Looks at no more than it must: there may be very many."""
        self.keep_account()
        demand, now = self._demand(), time.monotonic()
        asked = set(demand.soon)
        kept = demand.kept | demand.passing

        def may_go(key: ArtifactKey) -> bool:
            return key.digest not in kept and self._is_lasting(key, now)

        soon = [key for digest in demand.soon for key in self._holdings.on_disk(digest) if may_go(key)]
        unasked = self._ranking.in_order(lambda name: (key := ArtifactKey.of(name)).digest not in asked and may_go(key))
        with closing(unasked):
            residents = (self._resident(ArtifactKey.of(name)) for name in unasked)
            names = make_room(residents, [*map(self._resident, soon)], size, self._holdings.disk.free_bytes)
        return [ArtifactKey.of(name) for name in names]

    def used(self, key: ArtifactKey) -> None:
        """Notes that an artifact was asked for, after popularity has learned of it."""
        self._ranking.used(key.name)

    def keep_account(self, changed: Iterable[str] = ()) -> None:
        """Takes over what has come to the disk and what has left it, and versions whose adapters have `changed`."""
        for key in self._holdings.news().union(*map(self._holdings.on_disk, changed)):
            origin = self._origin_of(key.digest)
            # Whose base is not known yet may be had again.
            if self._holdings.place(key) in ON_DISK and (origin is None or origin.restorable):
                self._ranking.enter(key.name, self._holdings.size(key))
            else:
                self._ranking.leave(key.name)

    def _resident(self, key: ArtifactKey) -> Resident:
        return Resident(key.name, self._holdings.size(key), self._holdings.last_used(key))

    def _is_lasting(self, key: ArtifactKey, now: float) -> bool:
        """Whether an artifact can be had again once it is gone, and nothing is being done with it."""
        if self._holdings.place(key) is Place.STAGING or self._lost.error(key.digest, now) is not None:
            return False
        origin = self._origin_of(key.digest)
        return origin is not None and origin.restorable

    async def _ask(self, key: ArtifactKey) -> None:
        """Asks a version's source whether it would give it again, and notes what it says."""
        origin = self._origin_of(key.digest)
        if origin is None:
            return
        try:
            async with asyncio.timeout(CONFIRM_SECONDS):
                await self._builder.confirm(key.digest, origin)
        except TimeoutError:
            error: ServiceError = SourceTooSlow(origin.source_uri, CONFIRM_SECONDS)
        except ServiceError as refused:
            error = refused
        else:
            self._lost.forgive(key.digest)
            self._sure[key] = time.monotonic()
            return
        _log.warning("version %s stays on disk, it could not be had again: %s", key.digest[:12], error.message)
        self._lost.note(key.digest, error, time.monotonic())

    def _give_up(self, key: ArtifactKey) -> None:
        _log.info("version %s goes from the disk to make room", key.digest[:12])
        self._sure.pop(key, None)
        self._holdings.drop(key)
        metrics.EVICTIONS.labels("disk").inc()
