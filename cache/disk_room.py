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
from collections.abc import Callable, Set
from contextlib import suppress

from cache import metrics
from cache.builder import Builder, Origin
from cache.costs import TO_DISK
from cache.demand import Demand
from cache.errors import SourceTooSlow, TierFull
from cache.failures import Failures
from cache.holdings import ON_DISK, Held, Holdings
from cache.plan import Policy, Resident, make_room
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
        policy: in which order artifacts go that nobody needs.
    """

    def __init__(
        self,
        holdings: Holdings,
        builder: Builder,
        origin_of: Callable[[str], Origin | None],
        demand: Callable[[], Demand],
        policy: Policy,
    ) -> None:
        self._holdings, self._builder, self._policy = holdings, builder, policy
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
        here = self._holdings.at(ON_DISK)
        being_written = disk.budget_bytes - disk.free_bytes - sum(held.size_bytes for _, held in here)
        return being_written > 0 or any(key.digest in passing or held.place is Place.STAGING for key, held in here)

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
        demand, now = self._demand(), time.monotonic()
        kept = demand.kept | demand.passing
        here = dict(self._holdings.at(ON_DISK))
        place = {digest: number for number, digest in enumerate(demand.soon)}
        soon = sorted((key for key in here if key.digest in place), key=lambda key: place[key.digest])
        residents = [self._resident(key, held, kept, now) for key, held in here.items()]
        free = self._holdings.disk.free_bytes
        names = make_room(residents, size, [key.name for key in soon], free, self._policy)
        return [ArtifactKey.of(name) for name in names]

    def _resident(self, key: ArtifactKey, held: Held, kept: Set[str], now: float) -> Resident:
        origin = self._origin_of(key.digest)
        lasting = origin is not None and origin.restorable and self._lost.error(key.digest, now) is None
        return Resident(
            key.name,
            held.size_bytes,
            held.last_used,
            kept=held.place is Place.STAGING or key.digest in kept or not lasting,
            cost=TO_DISK.cost(held.size_bytes),
        )

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
