"""The cache's one owner of state, and its one loop.

Whenever something changed, the loop moves every engine's device and the host tier a step towards what is wanted, and removes
what no one points to. Everything runs on one event loop and changes state only between awaits; what an await brings back is
looked at anew, since the world may have moved on.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import Any

from cache import metrics
from cache.builder import Builder, Origin
from cache.demand import Demand, demand_of
from cache.devices import Devices
from cache.disk_room import DiskRoom
from cache.fetcher import Fetcher
from cache.flights import Flights
from cache.holdings import Holdings
from cache.neighbours import Neighbours
from cache.policies import POLICIES, Value
from cache.registry import Registry
from cache.registry_link import NodeReport, RegistryLink
from cache.residency import DevicePlace, Place
from cache.shelf import Shelf
from cache.sources import Source
from cache.tiers import FileTier
from cache.view import View

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
        devices: the engines attached, and what is on their devices.
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
        tiers = Value()
        self._room = room = DiskRoom(self.holdings, self.builder, self._origin_of, self._demand, tiers.popularity)
        fetcher = Fetcher(self.builder, self.flights, Neighbours(self.link, room), room)
        self.shelf = Shelf(self.holdings, room, fetcher, self._origin_of, self._announce, tiers)
        self.devices = Devices(
            self.link,
            self.holdings,
            self.shelf,
            policy=POLICIES[policy],
            tenant_share=tenant_share,
            announce=self._announce,
            wake=self.wake,
        )
        self._protected: Counter[str] = Counter()
        self._wake = asyncio.Event()
        self._changed = asyncio.Condition()
        self._tasks: set[asyncio.Task[Any]] = set()

    # Life cycle

    async def start(self) -> None:
        """Reads the registry and the tiers. Raises RegistryUnreachable."""
        await self.link.reconcile()
        await self.holdings.find()
        self._room.keep_account()
        for forever in (self._run(), self.link.keep_in_touch(), self.link.listen(), self.link.tell_moves()):
            self.spawn(forever)

    async def stop(self) -> None:
        """Ends the engines' streams and everything under way."""
        for engine in self.devices.engines.values():
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
                self._room.keep_account(self.view.news())
                self.devices.advance(time.monotonic())
                self.shelf.advance(self.devices.needed_on_host())
                self._collect_garbage()
                self._measure()
            except Exception:  # noqa: BLE001 - the loop must outlive a bug in one plan
                _log.exception("the plan failed; trying again with the next change")
            async with self._changed:
                self._changed.notify_all()

    def _collect_garbage(self) -> None:
        """Gives back what versions take that no adapter points to and no sequence uses."""
        if not self.link.reachable:
            # A record may have been written whose answer was lost: until the registry is read again no one knows.
            return
        alive = set(self.view.digests) | self._protected.keys()
        self.shelf.collect(alive | self.devices.collect(alive))

    def _measure(self) -> None:
        for place in (Place.DISK, Place.HOST):
            metrics.RESIDENT.labels(place.value).set(self.holdings.count(place))
        metrics.RESIDENT.labels("device").set(sum(len(engine.resident) for engine in self.devices.engines.values()))
        metrics.REGISTERED.set(len(self.view.records))
        metrics.ENGINES.set(len(self.devices.engines))
        metrics.REGISTRY_REACHABLE.set(self.link.reachable)

    def _announce(self, *digests: str) -> None:
        """Tells watchers that the residency of versions has changed, and the loop that something did."""
        self.view.residency_changed(digests)
        self.link.moved(digests)
        self._wake.set()

    def _origin_of(self, digest: str) -> Origin | None:
        best = max(self.view.with_digest(digest), key=lambda record: record.restorable, default=None)
        base = self.link.bases.of(best) if best else None
        return Origin(best.source_uri, base, best.source_revision, best.restorable) if best and base else None

    def _demand(self) -> Demand:
        """What this node needs of its artifacts."""
        return demand_of(self.devices.engines.values(), self.view.pinned, self._protected.keys() | self.shelf.wished)

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
        for engine in self.devices.engines.values():
            if engine.place(digest) in (DevicePlace.DEVICE, DevicePlace.EVICTING):
                here.append((self.node_id, engine.engine_id, DevicePlace.DEVICE))
        return here

    def leases(self, digest: str) -> list[str]:
        """The engines whose sequences use or wait for a version: "node/engine", those of other nodes by their heartbeats."""
        here = [f"{self.node_id}/{each.engine_id}" for each in self.devices.engines.values() if digest in each.in_use]
        mine = f"{self.node_id}/"
        return here + sorted(o for o, leased in self.link.leases if leased == digest and not o.startswith(mine))

    def _held(self, digest: str) -> list[str]:
        """The tiers that hold a version here, as the other nodes are told."""
        places = self._residency_here(digest)
        return [f"{engine}/{place.value}" if engine else place.value for _, engine, place in places]

    def _served(self) -> frozenset[str]:
        """Digests of the bases that the engines here serve."""
        return frozenset(engine.base.digest for engine in self.devices.engines.values())

    def _report(self) -> NodeReport:
        """What the other nodes are told."""
        held = {digest: tiers for digest in self.view.digests if (tiers := self._held(digest))}
        leases = {
            (f"{self.node_id}/{e.engine_id}", digest) for e in self.devices.engines.values() for digest in e.in_use
        }
        return NodeReport(held, frozenset(leases))
