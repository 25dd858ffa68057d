"""Brings artifacts up to DISK and to the HOST tier: once however many ask, and waiting for room where there is none.

Owned by the manager and called on its event loop; state changes only between awaits. Blocking file work goes to a thread.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Callable, Collection, Coroutine, Iterable, Set
from dataclasses import dataclass, field
from typing import Any

from cache.artifact import Artifact
from cache.builder import Origin
from cache.costs import TO_HOST
from cache.disk_room import DiskRoom
from cache.errors import AdapterTooLarge, ArtifactDamaged, TierFull, VersionNotFound
from cache.failures import Failure, Failures
from cache.fetcher import Fetcher
from cache.holdings import ON_DISK, Holdings
from cache.plan import Policy, Resident, Wanted, plan
from cache.residency import Move, Place
from cache.tiers import ArtifactKey
from servicekit.errors import Internal, ServiceError
from servicekit.tracing import context_from, end_span, start_span

_log = logging.getLogger(__name__)

# The move a job begins with -> the moves it ends with: when it did what it should, and when it did not.
_ENDS = {Move.FETCH: (Move.STORE, Move.FAIL), Move.STAGE: (Move.STAGED, Move.UNSTAGE)}


@dataclass
class Wish:
    """An artifact that should come to the host tier.

    Attributes:
        patient: an engine wants it, and waits until there is room.
        waiters: callers who are told when it is there, or that there is no room.
    """

    traceparent: str
    patient: bool = False
    waiters: list[asyncio.Future[None]] = field(default_factory=list)


class Shelf:
    """See the module.

    Args:
        origin_of: where a version came from; None when no adapter points to it.
        changed: called with a digest whose place has changed, or for which a wish has ended.
        policy: in which order the host tier gives up what nobody needs.
    """

    def __init__(
        self,
        holdings: Holdings,
        room: DiskRoom,
        fetcher: Fetcher,
        origin_of: Callable[[str], Origin | None],
        changed: Callable[[str], None],
        policy: Policy,
    ) -> None:
        self._holdings, self._room, self._fetcher = holdings, room, fetcher
        self._origin_of, self._changed, self._policy = origin_of, changed, policy
        self._wishes: dict[ArtifactKey, Wish] = {}
        self._failures = Failures(random.random)
        self._jobs: dict[ArtifactKey, asyncio.Task[ServiceError | None]] = {}

    async def close(self) -> None:
        """Ends what is under way."""
        for job in self._jobs.values():
            job.cancel()
        await asyncio.gather(*self._jobs.values(), return_exceptions=True)

    # What is wrong

    def failure(self, digest: str) -> ServiceError | None:
        """Why a version cannot be brought up now; None when it may be tried."""
        return self._failures.error(digest, time.monotonic())

    def last_failure(self, digest: str) -> Failure | None:
        """Why a version could not be brought up last, and when that is tried again; None when nothing was wrong."""
        return self._failures.last(digest)

    def fail(self, digest: str, error: ServiceError) -> None:
        """Notes that a version could not be brought up; it is tried again later and later."""
        _log.warning("version %s cannot be brought up: %s", digest[:12], error.message)
        self._failures.note(digest, error, time.monotonic())

    def forgive(self, digest: str) -> None:
        """Forgets that a version could not be brought up."""
        self._failures.forgive(digest)

    # Bringing artifacts up

    @property
    def wished(self) -> set[str]:
        """The versions that should come to the host tier."""
        return {key.digest for key in self._wishes}

    async def store(self, artifact: Artifact, dtype: str) -> None:
        """Puts an artifact on disk, unless it is there. Raises TierFull or TierFailed."""
        key = ArtifactKey(artifact.digest, dtype)
        while self._holdings.place(key) not in ON_DISK:
            if key in self._jobs:
                # Someone else's failure says nothing about this content.
                await asyncio.shield(self._jobs[key])
                continue
            error = await asyncio.shield(self._start(key, Move.FETCH, self._room.write(key, artifact.packed)))
            if error is not None:
                raise error
        self.forgive(artifact.digest)

    async def bring_to_disk(self, key: ArtifactKey) -> None:
        """Returns when an artifact is on disk, or raises why it cannot be."""
        if self._holdings.place(key) not in ON_DISK:
            error = await asyncio.shield(self._jobs.get(key) or self._start_fetch(key, ""))
            if error is not None:
                raise error

    async def bring_to_host(self, key: ArtifactKey) -> None:
        """Returns when an artifact is in the host tier, or raises why it cannot be; does not wait for room."""
        self.forgive(key.digest)
        if self._holdings.place(key) is not Place.HOST:
            told: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._wishes.setdefault(key, Wish("")).waiters.append(told)
            self._changed(key.digest)
            await told

    def wish(self, key: ArtifactKey, traceparent: str) -> None:
        """Asks for an artifact to be in the host tier, as soon as there is room; nothing while it must not be tried."""
        if self._holdings.place(key) is not Place.HOST and self.failure(key.digest) is None:
            self._wishes.setdefault(key, Wish(traceparent)).patient = True

    def used(self, key: ArtifactKey, times: int) -> None:
        """Notes that an artifact is being used, and that it was asked for so many times more."""
        self._holdings.touch(key)
        for _ in range(times):
            self._policy.used(key.name, self._holdings.size(key), 0.0)
        if times:
            self._room.used(key)

    def advance(self, needed: Collection[ArtifactKey]) -> None:
        """Moves every wish a step on; never evicts from the host tier what is `needed` there or wished for."""
        for key, wish in list(self._wishes.items()):
            if self._holdings.place(key) is Place.HOST:
                self._end(key, None)
            elif self._holdings.place(key) in (Place.REMOTE, Place.FAILED):
                self._start_fetch(key, wish.traceparent)
        names = {key.name: key for key in self._wishes if self._holdings.place(key) is Place.DISK}
        while names:
            wanted = [Wanted(name, self._holdings.size(key), urgent=True) for name, key in names.items()]
            decided = plan(self._residents(needed), wanted, self._holdings.host.budget_bytes, self._policy)
            for name in decided.hopeless:
                key = names.pop(name)
                error = AdapterTooLarge("host", self._holdings.size(key), self._holdings.host.budget_bytes)
                self.fail(key.digest, error)
                self._end(key, error)
                self._changed(key.digest)
            for name in decided.loads:
                key = names.pop(name)
                self._start(key, Move.STAGE, self._stage(key, self._wishes[key].traceparent))
            for name in decided.evictions:
                self._holdings.unstage(ArtifactKey.of(name))
            if not decided.evictions:
                break
        if names and not self._holdings.count(Place.STAGING):
            self._give_up_waiting(list(names.values()))

    def collect(self, alive: Set[str]) -> None:
        """Removes what no one points to any more."""
        for key in self._holdings.known():
            if key.digest not in alive and key not in self._jobs and key not in self._wishes:
                self._holdings.forget(key)
                self._changed(key.digest)
        self._failures.keep_only(alive)

    # Jobs: at most one per artifact, each begins with one move and ends with another

    def _start(
        self, key: ArtifactKey, begin: Move, work: Coroutine[Any, Any, int]
    ) -> asyncio.Task[ServiceError | None]:
        self._holdings.move(key, begin)
        self._jobs[key] = job = asyncio.create_task(self._job(key, begin, work))
        return job

    def _start_fetch(self, key: ArtifactKey, traceparent: str) -> asyncio.Task[ServiceError | None]:
        return self._start(key, Move.FETCH, self._fetch(key, traceparent))

    async def _job(self, key: ArtifactKey, begin: Move, work: Coroutine[Any, Any, int]) -> ServiceError | None:
        """Does work that returns an artifact's bytes; returns why it failed, which it also has told everyone who waits."""
        done, undone = _ENDS[begin]
        error: ServiceError | None = None
        size = 0
        try:
            size = await work
        except ServiceError as refused:
            error = refused
        except Exception:  # noqa: BLE001 - an artifact must not stay half-way for ever
            _log.exception("bringing up %s failed", key.digest[:12])
            error = Internal("bringing the adapter up failed, see the cache's log", "LOAD_FAILED")
        finally:
            del self._jobs[key]
        if error is None:
            self._holdings.move(key, done, size)
            if done is Move.STAGED:
                self.forgive(key.digest)
        else:
            damaged = isinstance(error, ArtifactDamaged)
            self._holdings.move(key, Move.FAIL if damaged else undone)
            if damaged and key.digest not in self._failures:
                # Mended by fetching again, and that at once; the second time in a row it waits like any failure.
                self._failures.note(key.digest, error, time.monotonic(), at_once=True)
            else:
                self.fail(key.digest, error)
                self._end(key, error)
        self._changed(key.digest)
        return error

    async def _fetch(self, key: ArtifactKey, traceparent: str) -> int:
        """Makes a version once more from its source: it was never here, or its file is lost."""
        origin = self._origin_of(key.digest)
        if origin is None:
            raise VersionNotFound(key.digest)
        return await self._fetcher.fetch(key, origin, traceparent)

    async def _stage(self, key: ArtifactKey, traceparent: str) -> int:
        span = start_span("adapter.load host", parent=context_from(traceparent))
        span.set_attributes({"loraplex.adapter_digest": key.digest, "loraplex.adapter_bytes": self._holdings.size(key)})
        try:
            size = await asyncio.to_thread(self._holdings.host.copy_from, self._holdings.disk, key)
        except BaseException as error:
            end_span(span, error)
            raise
        end_span(span)
        return size

    def _end(self, key: ArtifactKey, error: ServiceError | None) -> None:
        """Ends a wish, fulfilled or not."""
        wish = self._wishes.pop(key, None)
        for told in wish.waiters if wish else ():
            if not told.done():
                told.set_exception(error) if error else told.set_result(None)

    def _give_up_waiting(self, keys: Iterable[ArtifactKey]) -> None:
        """Tells callers that there is no room, and nothing on its way that could make some; engines go on waiting."""
        host = self._holdings.host
        for key in keys:
            wish = self._wishes[key]
            if wish.waiters:
                self._end(key, TierFull(host.name, self._holdings.size(key), host.free_bytes))
                if wish.patient:
                    self._wishes[key] = Wish(wish.traceparent, patient=True)

    def _residents(self, needed: Collection[ArtifactKey]) -> list[Resident]:
        return [
            Resident(
                key.name,
                held.size_bytes,
                held.last_used,
                kept=held.place is Place.STAGING or key in needed or key in self._wishes,
                cost=TO_HOST.cost(held.size_bytes),
            )
            for key, held in self._holdings.at((Place.STAGING, Place.HOST))
        ]
