"""The DEVICE tiers of a node: what its engines say, and what each is told to load and to evict.

An engine is the truth about its device: what it reports is taken over, whatever was expected.
"""

from __future__ import annotations

import logging
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Set

from cache import metrics
from cache.costs import cost_to_device
from cache.engines import LOOK_AHEAD_SECONDS, Engine, Evict, Expected, Load, Worth
from cache.errors import AdapterTooLarge, BaseMismatch, EngineAttached, RankTooLarge, VersionNotFound
from cache.holdings import ON_DISK, Holdings
from cache.plan import Policy
from cache.registry import AdapterRecord
from cache.registry_link import RegistryLink
from cache.residency import DeviceMove, DevicePlace, Place
from cache.shelf import Shelf
from cache.tiers import ArtifactKey
from servicekit.errors import ServiceError
from servicekit.tracing import context_from, start_span, traceparent_of

_log = logging.getLogger(__name__)


class Devices:
    """See the module. Called on the manager's event loop.

    Args:
        policy: makes what a device of so many bytes gives adapters up by.
        tenant_share: the part of a device above which a tenant gives up its own adapters first.
        announce: called with digests whose place has changed.
        wake: called when there is something new to plan for.

    Attributes:
        engines: the engines attached, by id.
    """

    def __init__(
        self,
        link: RegistryLink,
        holdings: Holdings,
        shelf: Shelf,
        *,
        policy: Callable[[int], Policy],
        tenant_share: float,
        announce: Callable[..., None],
        wake: Callable[[], None],
    ) -> None:
        self._link, self._view, self._holdings, self._shelf = link, link.view, holdings, shelf
        self._policy, self._tenant_share = policy, tenant_share
        self._announce, self._wake = announce, wake
        self.engines: dict[str, Engine] = {}

    # A step towards what is wanted

    def advance(self, now: float) -> None:
        """Moves every device a step on."""
        for engine in self.engines.values():
            self._advance(engine, now)

    def _advance(self, engine: Engine, now: float) -> None:
        """Carries out what the plan for one engine's device says."""
        engine.settle(now)
        for digest in {*engine.wants, *engine.expected}:
            if (error := self._obstacle(engine, digest)) is not None:
                engine.refuse(digest, error)
        pinned = {digest for digest in self._view.pinned if self._obstacle(engine, digest) is None}
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
        for record in self._view.with_digest(digest):
            base = self._base_digest(record)
            if base != engine.base.digest:
                return BaseMismatch(base, engine.base.digest)
            if record.rank > engine.base.max_rank:
                return RankTooLarge(record.adapter_id, record.rank, engine.base.max_rank)
        if digest not in self._view.digests and self._holdings.place(engine.key(digest)) not in ON_DISK:
            return VersionNotFound(digest)
        return self._shelf.failure(digest)

    def _load(self, engine: Engine, digest: str, traceparent: str, now: float) -> None:
        """Has an engine load an artifact, or has it brought to the host tier first."""
        key = engine.key(digest)
        if self._holdings.place(key) is not Place.HOST:
            self._shelf.wish(key, traceparent)
            return
        size = self._holdings.size(key)
        engine.move(digest, DeviceMove.LOAD, size, now)
        span = start_span("adapter.load", parent=context_from(traceparent))
        span.set_attributes({"loraplex.adapter_digest": digest, "loraplex.engine_id": engine.engine_id})
        engine.load_spans[digest] = span
        engine.commands.put_nowait(Load(digest, str(self._holdings.host.path(key)), size, traceparent_of(span)))
        self._holdings.touch(key)
        metrics.LOADS.inc()

    def _evict(self, engine: Engine, digest: str) -> None:
        engine.move(digest, DeviceMove.EVICT)
        engine.commands.put_nowait(Evict(digest, force=False))

    def collect(self, alive: Set[str]) -> set[str]:
        """Has what is not alive removed from devices unless requests need it; returns what is there and what they need."""
        held: set[str] = set()
        for engine in self.engines.values():
            for digest in [d for d in engine.resident if d not in alive | engine.needed]:
                self._evict(engine, digest)
                engine.forget(digest)
            held |= engine.device.keys() | engine.needed
        return held

    def needed_on_host(self) -> set[ArtifactKey]:
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

    def _appraise(self, key: ArtifactKey) -> Worth:
        size = self._holdings.size(key) or next((r.size_bytes for r in self._view.with_digest(key.digest)), 0)
        return Worth(size, cost_to_device(self._holdings.place(key), size))

    # What engines say

    async def attach(self, engine: Engine, resident: Iterable[str]) -> None:
        """Takes a new engine in. Raises EngineAttached or, when its base is not known yet, RegistryUnreachable."""
        await self._link.describe_base(engine.base)
        if engine.engine_id in self.engines:
            raise EngineAttached(engine.engine_id)
        engine.policy, engine.tenant_share = self._policy(engine.budget_bytes), self._tenant_share
        engine.describe(resident, self._appraise, time.monotonic())
        self.engines[engine.engine_id] = engine
        _log.info("engine %s attached with %d adapters on its device", engine.engine_id, len(engine.device))
        self._announce(*engine.device)
        # So that the other nodes know what is served.
        self._link.beat_soon()

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
        self._wake()

    def prefetch(self, digest: str, engine_id: str, traceparent: str, tenant: str) -> None:
        """Brings a version to an engine, or to the one of its base with most room when none is named.

        Raises VersionNotFound or, when the engine that is named serves another base, BaseMismatch.
        """
        records = self._view.with_digest(digest)
        if not records:
            raise VersionNotFound(digest)
        base = self._link.bases.of(records[0])
        engine = self.engines.get(engine_id) if engine_id else self._roomiest(digest)
        if engine is not None and not self.serves(engine, digest):
            raise BaseMismatch(self._base_digest(records[0]), engine.base.digest)
        if engine is not None:
            now = time.monotonic()
            engine.expect(digest, Expected(traceparent, now + LOOK_AHEAD_SECONDS, now, tenant))
        elif base is not None:
            # No engine yet: half of the way is what can be done.
            self._shelf.wish(ArtifactKey(digest, base.dtype), traceparent)
        self._wake()

    def look_ahead(self, router_id: str, queue: Iterable[tuple[str, str, Expected]]) -> None:
        """What waits in a router's queue: digest, engine_id or "", and for whom. Engines of another base are left out."""
        of_engine: defaultdict[str, dict[str, Expected]] = defaultdict(dict)
        for digest, engine_id, expected in queue:
            engine = self.engines.get(engine_id) if engine_id else self._roomiest(digest)
            if engine is not None and self.serves(engine, digest):
                of_engine[engine.engine_id][digest] = expected
        for engine in self.engines.values():
            engine.look_ahead(router_id, of_engine[engine.engine_id])
        self._wake()

    def _roomiest(self, digest: str) -> Engine | None:
        """The engine that has a version or waits for it, else the one of its base with most free room."""
        engines = [engine for engine in self.engines.values() if self.serves(engine, digest)]
        at_it = [engine for engine in engines if digest in engine.device or digest in engine.expected]
        return next(iter(at_it), None) or max(engines, key=lambda engine: engine.free_bytes, default=None)

    def serves(self, engine: Engine, digest: str) -> bool:
        """Whether an adapter points to a version, and an engine serves the base it was validated against."""
        records = self._view.with_digest(digest)
        return bool(records) and self._base_digest(records[0]) == engine.base.digest

    def _base_digest(self, record: AdapterRecord) -> str:
        base = self._link.bases.of(record)
        return base.digest if base else record.base_digest

    def loaded(self, engine: Engine, digest: str, device_bytes: int) -> None:
        """An engine has brought an artifact to its device."""
        engine.end_load_span(digest)
        if engine.place(digest) is DevicePlace.LOADING:
            engine.move(digest, DeviceMove.LOADED, device_bytes)
        elif engine.place(digest) is DevicePlace.ABSENT:
            # Begun before its stream broke, or for a cache that has gone.
            engine.move(digest, DeviceMove.REPORTED, device_bytes, time.monotonic())
        self._shelf.forgive(digest)
        self._announce(digest)

    def load_failed(self, engine: Engine, digest: str, error: ServiceError) -> None:
        """An engine could not bring an artifact to its device."""
        engine.end_load_span(digest, error)
        if engine.place(digest) is DevicePlace.LOADING:
            engine.move(digest, DeviceMove.LOAD_FAILED)
        self._shelf.fail(digest, error)
        engine.refuse(digest, error)
        self._wake()

    def evicted(self, engine: Engine, digest: str, done: bool) -> None:
        """An engine has removed an artifact, or keeps it because it is in use."""
        if done and engine.place(digest) in (DevicePlace.EVICTING, DevicePlace.DEVICE):
            engine.move(digest, DeviceMove.EVICTED)
            metrics.EVICTIONS.labels("device").inc()
        elif not done and engine.place(digest) is DevicePlace.EVICTING:
            engine.move(digest, DeviceMove.KEPT)
        self._announce(digest)

    def in_use(self, engine: Engine, digests: frozenset[str], begun: Mapping[str, int]) -> None:
        """All the digests that an engine's sequences use or wait for, and how many have begun with each since the last time."""
        ended = engine.in_use - digests
        uses = engine.use(digests, begun, self._appraise, time.monotonic())
        self._link.used(uses.keys() | digests)
        for digest in uses.keys() | digests:
            self._shelf.used(engine.key(digest), uses.get(digest, 0))
        if any(record.state == "draining" for digest in ended for record in self._view.with_digest(digest)):
            self._link.beat_soon()
        self._wake()
