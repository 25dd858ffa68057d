"""The cache's one owner of state, and its one loop.

Whenever something changed, the loop moves every engine's device and the host tier a step towards what is wanted, and removes
what no one points to. Everything runs on one event loop and changes state only between awaits; what an await brings back is
looked at anew, since the world may have moved on.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Coroutine, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from cache import metrics
from cache.builder import Builder, Origin
from cache.costs import cost_to_device
from cache.demand import Demand, demand_of
from cache.disk_room import DiskRoom
from cache.engines import LOOK_AHEAD_SECONDS, Engine, Evict, Expected, Load, Worth
from cache.errors import AdapterTooLarge, BaseMismatch, EngineAttached, RankTooLarge, VersionNotFound
from cache.fetcher import Fetcher
from cache.flights import Flights
from cache.holdings import ON_DISK, Holdings
from cache.neighbours import Neighbours
from cache.policies import POLICIES, Value
from cache.registry import AdapterRecord, Registry
from cache.registry_link import NodeReport, RegistryLink
from cache.residency import DeviceMove, DevicePlace, Place
from cache.shelf import Shelf
from cache.sources import Source
from cache.tiers import ArtifactKey, FileTier
from cache.view import View
from servicekit.errors import ServiceError
from servicekit.tracing import context_from, start_span, traceparent_of

_log = logging.getLogger(__name__)


class Manager:
    """See the module. Its methods are called on the event loop.

    Args:
        policy: the one of POLICIES by which devices give adapters up.
        tenant_share: the part of a device above which a tenant gives up its own adapters first.

    Attributes:
        view: the local view of the registry.
        link: what keeps it right.
        holdings: the artifacts of this node.
        shelf: what brings them up.
        engines: the engines attached, by id.
    """

    def __init__(
        self,
        registry: Registry,
        source: Source,
        disk: FileTier,
        host: FileTier,
        node_id: str,
        *,
        policy: str = "value",
        tenant_share: float = 1.0,
    ) -> None:
        self.node_id = node_id
        self.view = View()
        self.link = RegistryLink(registry, self.view, node_id, self._report, self._held, self._served, self.wake)
        self.builder = Builder(source)
        self.flights = Flights(registry, node_id)
        self.holdings = Holdings(disk, host, self._announce)
        # Of one mind about both tiers: it knows versions, not tiers.
        self._policy = Value()
        room = DiskRoom(self.holdings, self.builder, self._origin_of, self._demand, self._policy)
        fetcher = Fetcher(self.builder, self.flights, Neighbours(self.link, room), room)
        self.shelf = Shelf(self.holdings, room, fetcher, self._origin_of, self._announce)
        self.engines: dict[str, Engine] = {}
        self._device_policy, self._tenant_share = POLICIES[policy], tenant_share
        self._protected: Counter[str] = Counter()
        self._wake = asyncio.Event()
        self._changed = asyncio.Condition()
        self._tasks: set[asyncio.Task[Any]] = set()

    # Life cycle

    async def start(self) -> None:
        """Reads the registry and the tiers. Raises RegistryUnreachable."""
        await self.link.reconcile()
        await self.holdings.find()
        for forever in (self._run(), self.link.keep_in_touch(), self.link.listen(), self.link.tell_moves()):
            self.spawn(forever)

    async def stop(self) -> None:
        """Ends the engines' streams and everything under way."""
        for engine in self.engines.values():
            engine.commands.put_nowait(None)
        pending = set(self._tasks)
        while pending:
            # More than once: a Redis read that times out just then answers a cancellation with its timeout.
            for task in pending:
                task.cancel()
            _, pending = await asyncio.wait(pending, timeout=0.2)
        await self.shelf.close()
        await self.link.registry.close()

    # The loop

    async def _run(self) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            try:
                now = time.monotonic()
                for engine in self.engines.values():
                    self._advance(engine, now)
                self.shelf.advance(self._needed_on_host(), self._policy)
                self._collect_garbage()
                self._measure()
            except Exception:  # noqa: BLE001 - the loop must outlive a bug in one plan
                _log.exception("the plan failed; trying again with the next change")
            async with self._changed:
                self._changed.notify_all()

    def _advance(self, engine: Engine, now: float) -> None:
        """Carries out what the plan for one engine's device says."""
        engine.settle(now)
        for digest in {*engine.wants, *engine.expected}:
            if (error := self._obstacle(engine, digest)) is not None:
                engine.refuse(digest, error)
        pinned = {record.digest for record in self.view.records.values() if record.pinned}
        pinned = {digest for digest in pinned if self._obstacle(engine, digest) is None}
        decided = engine.plan(pinned, self._appraise)
        for digest in decided.hopeless:
            if digest in engine.wants or digest in engine.expected:
                engine.refuse(
                    digest,
                    AdapterTooLarge("device", self._appraise(engine.key(digest)).size_bytes, engine.budget_bytes),
                )
        for digest in decided.loads:
            expected = engine.expected.get(digest)
            self._load(engine, digest, expected.traceparent if expected else "", now)
        for digest in decided.evictions:
            self._evict(engine, digest)

    def _obstacle(self, engine: Engine, digest: str) -> ServiceError | None:
        """Why a version cannot come to an engine's device now, if it cannot."""
        for record in self.view.with_digest(digest):
            base = self._base_digest(record)
            if base != engine.base.digest:
                return BaseMismatch(base, engine.base.digest)
            if record.rank > engine.base.max_rank:
                return RankTooLarge(record.adapter_id, record.rank, engine.base.max_rank)
        if digest not in self.view.digests and self.holdings.place(engine.key(digest)) not in ON_DISK:
            return VersionNotFound(digest)
        return self.shelf.failure(digest)

    def _load(self, engine: Engine, digest: str, traceparent: str, now: float) -> None:
        """Has an engine load an artifact, or has it brought to the host tier first."""
        key = engine.key(digest)
        if self.holdings.place(key) is not Place.HOST:
            self.shelf.wish(key, traceparent)
            return
        size = self.holdings.size(key)
        engine.move(digest, DeviceMove.LOAD, size, now)
        span = start_span("adapter.load", parent=context_from(traceparent))
        span.set_attributes({"loraplex.adapter_digest": digest, "loraplex.engine_id": engine.engine_id})
        engine.load_spans[digest] = span
        engine.commands.put_nowait(Load(digest, str(self.holdings.host.path(key)), size, traceparent_of(span)))
        self.holdings.touch(key)
        metrics.LOADS.inc()

    def _evict(self, engine: Engine, digest: str) -> None:
        engine.move(digest, DeviceMove.EVICT)
        engine.commands.put_nowait(Evict(digest, force=False))

    def _needed_on_host(self) -> set[ArtifactKey]:
        """What engines are copying from the host tier, or will."""
        return {
            engine.key(digest)
            for engine in self.engines.values()
            for digest in (
                *engine.wants,
                *engine.expected,
                *(d for d, entry in engine.device.items() if entry.place is DevicePlace.LOADING),
            )
        }

    def _collect_garbage(self) -> None:
        """Gives back what versions take that no adapter points to and no sequence uses."""
        if not self.link.reachable:
            # A record may have been written whose answer was lost: until the registry is read again no one knows.
            return
        alive = set(self.view.digests) | self._protected.keys()
        for engine in self.engines.values():
            for digest in [d for d in engine.resident if d not in alive | engine.needed]:
                self._evict(engine, digest)
                engine.forget(digest)
            alive |= engine.device.keys() | engine.needed
        self.shelf.collect(alive)

    def _measure(self) -> None:
        for place in (Place.DISK, Place.HOST):
            metrics.RESIDENT.labels(place.value).set(self.holdings.count(place))
        metrics.RESIDENT.labels("device").set(sum(len(engine.resident) for engine in self.engines.values()))
        metrics.REGISTERED.set(len(self.view.records))
        metrics.ENGINES.set(len(self.engines))
        metrics.REGISTRY_REACHABLE.set(self.link.reachable)

    def _announce(self, *digests: str) -> None:
        """Tells watchers that the residency of versions has changed, and the loop that something did."""
        self.view.residency_changed(digests)
        self.link.moved(digests)
        self._wake.set()

    def _appraise(self, key: ArtifactKey) -> Worth:
        size = self.holdings.size(key) or next((r.size_bytes for r in self.view.with_digest(key.digest)), 0)
        return Worth(size, cost_to_device(self.holdings.place(key), size))

    def _origin_of(self, digest: str) -> Origin | None:
        best = max(self.view.with_digest(digest), key=lambda record: record.restorable, default=None)
        base = self.link.bases.of(best) if best else None
        return Origin(best.source_uri, base, best.source_revision, best.restorable) if best and base else None

    def _demand(self) -> Demand:
        """What this node needs of its artifacts."""
        pinned = {record.digest for record in self.view.records.values() if record.pinned}
        return demand_of(self.engines.values(), pinned, self._protected.keys() | self.shelf.wished)

    # What engines say. An engine is the truth about its device: what it reports is taken over, whatever was expected.

    async def attach(self, engine: Engine, resident: Iterable[str]) -> None:
        """Takes a new engine in. Raises EngineAttached or, when its base is not known yet, RegistryUnreachable."""
        await self.link.describe_base(engine.base)
        if engine.engine_id in self.engines:
            raise EngineAttached(engine.engine_id)
        engine.policy, engine.tenant_share = self._device_policy(engine.budget_bytes), self._tenant_share
        engine.describe(resident, self._appraise, time.monotonic())
        self.engines[engine.engine_id] = engine
        _log.info("engine %s attached with %d adapters on its device", engine.engine_id, len(engine.device))
        self._announce(*engine.device)
        # So that the other nodes know what is served.
        self.link.beat_soon()

    def detach(self, engine: Engine) -> None:
        """Forgets an engine whose stream has ended."""
        if self.engines.get(engine.engine_id) is engine:
            del self.engines[engine.engine_id]
            for digest in list(engine.load_spans):
                engine.end_load_span(digest, ConnectionError("the engine's stream ended"))
            _log.info("engine %s detached", engine.engine_id)
            self._announce(*engine.device)

    def want(self, engine: Engine, digests: Iterable[str]) -> None:
        """Sequences of an engine wait for these, the first most."""
        for digest in digests:
            engine.want(digest)
        self._wake.set()

    def prefetch(self, digest: str, engine_id: str, traceparent: str, tenant: str) -> None:
        """Brings a version to an engine, or to the one of its base with most room when none is named.

        Raises VersionNotFound or, when the engine that is named serves another base, BaseMismatch.
        """
        records = self.view.with_digest(digest)
        if not records:
            raise VersionNotFound(digest)
        base = self.link.bases.of(records[0])
        engine = self.engines.get(engine_id) if engine_id else self._roomiest(digest)
        if engine is not None and not self.serves(engine, digest):
            raise BaseMismatch(self._base_digest(records[0]), engine.base.digest)
        if engine is not None:
            now = time.monotonic()
            engine.expect(digest, Expected(traceparent, now + LOOK_AHEAD_SECONDS, now, tenant))
        elif base is not None:
            # No engine yet: half of the way is what can be done.
            self.shelf.wish(ArtifactKey(digest, base.dtype), traceparent)
        self._wake.set()

    def look_ahead(self, router_id: str, queue: Iterable[tuple[str, str, Expected]]) -> None:
        """What waits in a router's queue: digest, engine_id or "", and for whom. Engines of another base are left out."""
        of_engine: defaultdict[str, dict[str, Expected]] = defaultdict(dict)
        for digest, engine_id, expected in queue:
            engine = self.engines.get(engine_id) if engine_id else self._roomiest(digest)
            if engine is not None and self.serves(engine, digest):
                of_engine[engine.engine_id][digest] = expected
        for engine in self.engines.values():
            engine.look_ahead(router_id, of_engine[engine.engine_id])
        self._wake.set()

    def _roomiest(self, digest: str) -> Engine | None:
        """The engine that has a version or waits for it, else the one of its base with most free room."""
        engines = [engine for engine in self.engines.values() if self.serves(engine, digest)]
        at_it = [engine for engine in engines if digest in engine.device or digest in engine.expected]
        return next(iter(at_it), None) or max(engines, key=lambda engine: engine.free_bytes, default=None)

    def serves(self, engine: Engine, digest: str) -> bool:
        """Whether an adapter points to a version, and an engine serves the base it was validated against."""
        records = self.view.with_digest(digest)
        return bool(records) and self._base_digest(records[0]) == engine.base.digest

    def _base_digest(self, record: AdapterRecord) -> str:
        base = self.link.bases.of(record)
        return base.digest if base else record.base_digest

    def loaded(self, engine: Engine, digest: str, device_bytes: int) -> None:
        """An engine has brought an artifact to its device."""
        engine.end_load_span(digest)
        if engine.place(digest) is DevicePlace.LOADING:
            engine.move(digest, DeviceMove.LOADED, device_bytes)
        elif engine.place(digest) is DevicePlace.ABSENT:
            # Begun before its stream broke, or for a cache that has gone.
            engine.move(digest, DeviceMove.REPORTED, device_bytes, time.monotonic())
        self.shelf.forgive(digest)
        self._announce(digest)

    def load_failed(self, engine: Engine, digest: str, error: ServiceError) -> None:
        """An engine could not bring an artifact to its device."""
        engine.end_load_span(digest, error)
        if engine.place(digest) is DevicePlace.LOADING:
            engine.move(digest, DeviceMove.LOAD_FAILED)
        self.shelf.fail(digest, error)
        engine.refuse(digest, error)
        self._wake.set()

    def evicted(self, engine: Engine, digest: str, done: bool) -> None:
        """An engine has removed an artifact, or keeps it because it is in use."""
        if done and engine.place(digest) in (DevicePlace.EVICTING, DevicePlace.DEVICE):
            engine.move(digest, DeviceMove.EVICTED)
            metrics.EVICTIONS.labels("device").inc()
        elif not done and engine.place(digest) is DevicePlace.EVICTING:
            engine.move(digest, DeviceMove.KEPT)
        self._announce(digest)

    def in_use(self, engine: Engine, digests: frozenset[str]) -> None:
        """All the digests that an engine's sequences use or wait for."""
        ended = engine.in_use - digests
        for digest in digests - engine.in_use:
            self._policy.used(engine.key(digest).name, 0, 0.0)
        engine.use(digests, self._appraise, time.monotonic())
        self.link.used(digests)
        for digest in digests:
            self.holdings.touch(engine.key(digest))
        if any(record.state == "draining" for digest in ended for record in self.view.with_digest(digest)):
            self.link.beat_soon()
        self._wake.set()

    # For those who ask on behalf of callers

    @contextmanager
    def protected(self, digest: str) -> Iterator[None]:
        """Keeps the garbage collection off a version that no adapter points to yet."""
        self._protected[digest] += 1
        try:
            yield
        finally:
            self._protected.subtract((digest,))
            # Forgets what has reached zero.
            self._protected += Counter()
            self._wake.set()

    def wake(self) -> None:
        """Something changed that the loop should look at."""
        self._wake.set()

    def spawn(self, coroutine: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Runs something until it ends or the manager stops."""
        task = asyncio.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def wait_for(self, condition: Callable[[], bool]) -> None:
        """Returns once something changed so that the condition holds."""
        async with self._changed:
            await self._changed.wait_for(condition)

    # Where things are

    def residency(self, digest: str) -> list[tuple[str, str, Place | DevicePlace]]:
        """Where a version is: (node_id, engine_id or "", place), this node first."""
        here = self._residency_here(digest)
        for node, held in self.link.elsewhere.items():
            for tier in held.get(digest, ()):
                engine_id, _, place = tier.rpartition("/")
                here.append((node, engine_id, DevicePlace(place) if engine_id else Place(place)))
        return here

    def _residency_here(self, digest: str) -> list[tuple[str, str, Place | DevicePlace]]:
        here: list[tuple[str, str, Place | DevicePlace]] = []
        here += [(self.node_id, "", place) for place in self.holdings.places(digest)]
        for engine in self.engines.values():
            if engine.place(digest) in (DevicePlace.DEVICE, DevicePlace.EVICTING):
                here.append((self.node_id, engine.engine_id, DevicePlace.DEVICE))
        return here

    def leases(self, digest: str) -> list[str]:
        """The engines whose sequences use or wait for a version: "node/engine", those of other nodes by their heartbeats."""
        here = [f"{self.node_id}/{each.engine_id}" for each in self.engines.values() if digest in each.in_use]
        mine = f"{self.node_id}/"
        return here + sorted(o for o, leased in self.link.leases if leased == digest and not o.startswith(mine))

    def _held(self, digest: str) -> list[str]:
        """The tiers that hold a version here, as the other nodes are told."""
        places = self._residency_here(digest)
        return [f"{engine}/{place.value}" if engine else place.value for _, engine, place in places]

    def _served(self) -> frozenset[str]:
        """Digests of the bases that the engines here serve."""
        return frozenset(engine.base.digest for engine in self.engines.values())

    def _report(self) -> NodeReport:
        """What the other nodes are told."""
        held = {digest: tiers for digest in self.view.digests if (tiers := self._held(digest))}
        leases = {(f"{self.node_id}/{e.engine_id}", digest) for e in self.engines.values() for digest in e.in_use}
        return NodeReport(held, frozenset(leases))
