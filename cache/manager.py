"""The cache's one owner of state: the view of the registry, the tiers, the engines attached, and the loop that moves artifacts.

Everything runs on one event loop and changes state only between awaits. Blocking file work goes to a thread; what it brings
back is looked at anew, since the world may have moved on. One load per digest, however many ask (`_jobs`).
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Iterable
from dataclasses import dataclass, replace
from typing import Any

from opentelemetry.trace import Span

from cache import metrics
from cache.artifact import AdapterFiles, Artifact, BaseDescription, build_artifact
from cache.engines import Engine, Evict, Load, Refuse
from cache.errors import BaseMismatch, BaseUnknown, DigestMismatch, RegistryUnreachable, VersionNotFound
from cache.registry import AdapterRecord, Registry
from cache.residency import DeviceMove, DevicePlace, LeastRecentlyUsed, Place, Wanted, plan, retry_delay
from cache.sources import Source
from cache.tiers import FileTier
from cache.watchers import Change, Watcher
from servicekit.errors import Exhausted, ServiceError
from servicekit.tracing import context_from, end_span, start_span, traceparent_of

_log = logging.getLogger(__name__)

HEARTBEAT_SECONDS = 2.0


@dataclass
class Failure:
    """A version that could not be brought up: why, how often in a row, and when it is tried again."""

    error: ServiceError
    count: int
    retry_at: float


class Manager:
    """See the module. Public methods are called on the event loop.

    Attributes:
        records: the local view of the registry: adapter_id -> record.
        base: what adapters are validated against; None until an engine has said.
        reachable: whether Redis answered last time.
    """

    def __init__(self, registry: Registry, source: Source, disk: FileTier, host: FileTier, node_id: str) -> None:
        self.registry, self.node_id = registry, node_id
        self.disk, self.host = disk, host
        self.records: dict[str, AdapterRecord] = {}
        self.base: BaseDescription | None = None
        self.reachable = False
        self.engines: dict[str, Engine] = {}
        self._source = source
        self._policy = LeastRecentlyUsed()
        self._epoch = ""
        self._jobs: dict[str, asyncio.Task[None]] = {}
        self._failures: dict[str, Failure] = {}
        self._loading: dict[tuple[str, str], Span] = {}
        self._watchers: set[Watcher] = set()
        self._wake = asyncio.Event()
        self._changed = asyncio.Condition()
        self._tasks: set[asyncio.Task[None]] = set()
        self._on_disk: dict[str, int] = {}
        self._on_host: dict[str, int] = {}
        self._registering: Counter[str] = Counter()
        self._elsewhere: dict[str, dict[str, list[str]]] = {}

    # Life cycle

    async def start(self) -> None:
        """Reads the registry and the tiers. Raises RegistryUnreachable."""
        await self._reconcile()
        self._spawn(self._run())
        self._spawn(self._keep_in_touch())
        self._spawn(self._listen())

    async def stop(self) -> None:
        """Ends the engines' streams and everything under way."""
        for engine in self.engines.values():
            engine.commands.put_nowait(None)
        pending: set[asyncio.Task[None]] = {*self._tasks, *self._jobs.values()}
        while pending:
            # More than once: a Redis read that times out just then answers a cancellation with its timeout.
            for task in pending:
                task.cancel()
            _, pending = await asyncio.wait(pending, timeout=0.2)
        await self.registry.close()

    def _spawn(self, coroutine: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # The loop

    async def _run(self) -> None:
        """Whenever something changed: moves every engine's device a step towards what is wanted, and cleans up."""
        while True:
            await self._wake.wait()
            self._wake.clear()
            try:
                for engine in self.engines.values():
                    self._advance(engine)
                self._collect_garbage()
                self._measure()
            except Exception:  # noqa: BLE001 - the loop must outlive a bug in one plan
                _log.exception("the plan failed; trying again with the next change")
            async with self._changed:
                self._changed.notify_all()

    def _advance(self, engine: Engine) -> None:
        pinned = frozenset(record.digest for record in self.records.values() if record.pinned)
        for digest in pinned:
            engine.wanted.setdefault(digest, "")
        for digest in [digest for digest in engine.wanted if engine.place(digest) is DevicePlace.DEVICE]:
            del engine.wanted[digest]
        wanted = [Wanted(digest, self._size_of(digest)) for digest in engine.wanted if self._usable(engine, digest)]
        decided = plan(engine.residents(pinned), wanted, engine.budget_bytes, self._policy)
        for digest in decided.hopeless:
            size = self._size_of(digest)
            message = f"the artifact has {size} bytes, the device's adapter memory {engine.budget_bytes}"
            self._refuse(engine, digest, Exhausted(message, "ADAPTER_TOO_LARGE", limit=engine.budget_bytes))
        for digest in decided.loads:
            if self._name(digest) in self._on_host:
                self._load(engine, digest)
            else:
                self._bring_up(digest, engine.wanted[digest])
        for digest in decided.evictions:
            engine.move(digest, DeviceMove.EVICT)
            engine.commands.put_nowait(Evict(digest, force=False))

    def _usable(self, engine: Engine, digest: str) -> bool:
        """Whether a wanted digest can be had; tells the engine when it cannot."""
        failure = self._failures.get(digest)
        if digest not in {record.digest for record in self.records.values()}:
            if self._name(digest) not in self._on_host and self._name(digest) not in self._on_disk:
                self._refuse(engine, digest, VersionNotFound(digest))
                return False
        elif failure is not None and failure.retry_at > time.monotonic():
            self._refuse(engine, digest, failure.error)
            return False
        return True

    def _refuse(self, engine: Engine, digest: str, error: ServiceError) -> None:
        engine.wanted.pop(digest, None)
        engine.commands.put_nowait(Refuse(digest, error))

    def _load(self, engine: Engine, digest: str) -> None:
        size = self._on_host[self._name(digest)]
        span = start_span("adapter.load", parent=context_from(engine.wanted[digest]))
        span.set_attributes({"loraplex.adapter_digest": digest, "loraplex.engine_id": engine.engine_id})
        self._loading[engine.engine_id, digest] = span
        engine.move(digest, DeviceMove.LOAD, size, time.monotonic())
        path = str(self.host.path(digest, engine.base.dtype))
        engine.commands.put_nowait(Load(digest, path, size, traceparent_of(span)))
        metrics.LOADS.inc()

    def _collect_garbage(self) -> None:
        """Removes the files of versions that no adapter points to and no engine has."""
        alive = {record.digest for record in self.records.values()} | set(self._jobs) | set(+self._registering)
        for engine in self.engines.values():
            for digest in [d for d in engine.resident if d not in alive and d not in engine.in_use]:
                engine.move(digest, DeviceMove.EVICT)
                engine.commands.put_nowait(Evict(digest, force=False))
            alive |= set(engine.device) | engine.in_use
        for name in {*self._on_disk, *self._on_host}:
            digest, _, dtype = name.removesuffix(".safetensors").partition(".")
            # A view that was never complete must not cost anyone their files.
            if self._epoch and digest not in alive:
                self._on_disk.pop(name, None)
                self._on_host.pop(name, None)
                self.host.remove(digest, dtype)
                self.disk.remove(digest, dtype)

    def _measure(self) -> None:
        metrics.RESIDENT.labels("disk").set(len(self._on_disk))
        metrics.RESIDENT.labels("host").set(len(self._on_host))
        metrics.RESIDENT.labels("device").set(sum(len(engine.resident) for engine in self.engines.values()))
        metrics.REGISTERED.set(len(self.records))
        metrics.ENGINES.set(len(self.engines))
        metrics.REGISTRY_REACHABLE.set(self.reachable)

    # Bringing artifacts up to the host tier

    def _bring_up(self, digest: str, traceparent: str) -> asyncio.Task[None]:
        """Starts bringing a version to the host tier, or joins those who did."""
        if digest not in self._jobs:
            task = asyncio.create_task(self._bring_up_once(digest, traceparent))
            self._jobs[digest] = task
            task.add_done_callback(lambda _: self._job_done(digest))
        return self._jobs[digest]

    def _job_done(self, digest: str) -> None:
        del self._jobs[digest]
        self._wake.set()

    async def _bring_up_once(self, digest: str, traceparent: str) -> None:
        try:
            if self._name(digest) not in self._on_disk:
                await self._fetch_again(digest, traceparent)
            span = start_span("adapter.load host", parent=context_from(traceparent))
            try:
                await self._make_room_on_host(digest)
                await self._stage(digest)
            finally:
                end_span(span)
            self._failures.pop(digest, None)
        except ServiceError as error:
            count = self._failures[digest].count + 1 if digest in self._failures else 1
            retry_at = time.monotonic() + retry_delay(count, random.random)
            self._failures[digest] = Failure(error, count, retry_at)
            _log.warning("version %s cannot be brought up: %s", digest[:12], error.message)
            for engine in self.engines.values():
                if digest in engine.wanted:
                    self._refuse(engine, digest, error)

    async def _fetch_again(self, digest: str, traceparent: str) -> None:
        """Reads a version from its source once more: its file on disk is lost."""
        record = next((record for record in self.records.values() if record.digest == digest), None)
        if record is None:
            raise VersionNotFound(digest)
        artifact = await self._fetch(record.source_uri, traceparent)
        if artifact.digest != digest:
            raise DigestMismatch(digest, artifact.digest)
        await self._store(artifact)

    async def _fetch(self, source_uri: str, traceparent: str = "") -> Artifact:
        base = self.base
        if base is None:
            raise BaseUnknown
        span = start_span("adapter.load disk", parent=context_from(traceparent))

        def read_and_build() -> Artifact:
            files: AdapterFiles = self._source.read(source_uri)
            return build_artifact(files, base)

        try:
            artifact = await asyncio.to_thread(read_and_build)
        except ServiceError as error:
            metrics.FETCHES.labels(error.reason).inc()
            end_span(span, error)
            raise
        metrics.FETCHES.labels("ok").inc()
        end_span(span)
        return artifact

    async def _store(self, artifact: Artifact) -> None:
        await asyncio.to_thread(self.disk.write, artifact.digest, self._dtype, artifact.packed)
        self._on_disk[self._name(artifact.digest)] = len(artifact.packed)

    async def _stage(self, digest: str) -> None:
        name = self._name(digest)
        try:
            self._on_host[name] = await asyncio.to_thread(self.host.copy_from, self.disk, digest, self._dtype)
        except ServiceError:
            self._on_disk = await asyncio.to_thread(self.disk.sizes)
            raise
        self._announce(digest)

    async def _make_room_on_host(self, digest: str) -> None:
        """Removes from the host tier what no engine is loading, least recently used first."""
        needed = self._on_disk.get(self._name(digest), 0)
        loading = {
            d for e in self.engines.values() for d, entry in e.device.items() if entry.place is DevicePlace.LOADING
        }
        wanted = {digest for engine in self.engines.values() for digest in engine.wanted} | set(self._jobs)
        free = self.host.budget_bytes - sum(self._on_host.values())
        for name in list(self._on_host):
            if free >= needed:
                return
            other, _, dtype = name.removesuffix(".safetensors").partition(".")
            if other not in loading and other not in wanted:
                free += self._on_host.pop(name)
                await asyncio.to_thread(self.host.remove, other, dtype)
                metrics.EVICTIONS.labels("host").inc()

    @property
    def _dtype(self) -> str:
        return self.base.dtype if self.base else "float32"

    def _name(self, digest: str) -> str:
        return self.host.path(digest, self._dtype).name

    def _size_of(self, digest: str) -> int:
        name = self._name(digest)
        known = self._on_host.get(name) or self._on_disk.get(name)
        return known or next((r.size_bytes for r in self.records.values() if r.digest == digest), 0)

    # What engines say

    def attach(self, engine: Engine, resident: Iterable[str]) -> None:
        """Takes a new engine in; a stream that the same engine left behind is ended."""
        former = self.engines.get(engine.engine_id)
        if former is not None:
            former.commands.put_nowait(None)
        for digest in resident:
            engine.move(digest, DeviceMove.LOAD, self._size_of(digest) or 1, time.monotonic())
            engine.move(digest, DeviceMove.LOADED)
        self.engines[engine.engine_id] = engine
        _log.info("engine %s attached with %d adapters on its device", engine.engine_id, len(engine.device))
        self._announce(*engine.device)

    def detach(self, engine: Engine) -> None:
        """Forgets an engine whose stream has ended."""
        if self.engines.get(engine.engine_id) is engine:
            del self.engines[engine.engine_id]
            _log.info("engine %s detached", engine.engine_id)
            self._announce(*engine.device)

    def want(self, engine: Engine, digests: Iterable[str], traceparent: str = "") -> None:
        """Notes that digests should come to an engine's device."""
        for digest in digests:
            if engine.place(digest) is not DevicePlace.DEVICE:
                engine.wanted[digest] = engine.wanted.get(digest) or traceparent
        self._wake.set()

    def prefetch(self, digest: str, engine_id: str, traceparent: str) -> None:
        """A router's look-ahead: brings a version to an engine, or to all when none is named."""
        if digest not in {record.digest for record in self.records.values()}:
            raise VersionNotFound(digest)
        for engine in self.engines.values():
            if engine_id in ("", engine.engine_id):
                self.want(engine, [digest], traceparent)

    def loaded(self, engine: Engine, digest: str, device_bytes: int) -> None:
        """An engine has brought an artifact to its device."""
        engine.move(digest, DeviceMove.LOADED, device_bytes)
        engine.touch([digest], time.monotonic())
        self._end_load(engine, digest, None)
        self._announce(digest)

    def load_failed(self, engine: Engine, digest: str, error: ServiceError) -> None:
        """An engine could not bring an artifact to its device."""
        engine.move(digest, DeviceMove.LOAD_FAILED)
        self._end_load(engine, digest, error)
        self._failures[digest] = Failure(error, 1, time.monotonic() + retry_delay(1, random.random))
        self._refuse(engine, digest, error)
        self._wake.set()

    def evicted(self, engine: Engine, digest: str, done: bool) -> None:
        """An engine has removed an artifact, or keeps it because it is in use."""
        if engine.place(digest) is not DevicePlace.EVICTING:
            return
        engine.move(digest, DeviceMove.EVICTED if done else DeviceMove.KEPT)
        if done:
            metrics.EVICTIONS.labels("device").inc()
        self._announce(digest)

    def in_use(self, engine: Engine, digests: frozenset[str]) -> None:
        """All the digests that an engine's sequences use or wait for."""
        engine.touch([*digests, *engine.in_use], time.monotonic())
        engine.in_use = digests
        self._wake.set()

    def _end_load(self, engine: Engine, digest: str, error: ServiceError | None) -> None:
        span = self._loading.pop((engine.engine_id, digest), None)
        if span is not None:
            end_span(span, error)

    async def describe_base(self, base: BaseDescription) -> None:
        """Checks an engine's base against the registry's, or makes it the registry's."""
        try:
            in_force = await self.registry.describe_base(base)
        except RegistryUnreachable:
            if self.base is None:
                raise
            in_force = self.base
        if in_force.digest != base.digest:
            raise BaseMismatch(in_force.digest, base.digest)
        self.base = base

    # What callers ask

    async def register(self, record: AdapterRecord, expected_digest: str | None) -> AdapterRecord:
        """Validates, stores and registers an adapter; `record` holds what the caller said, the rest is filled in."""
        if not self.reachable:
            raise RegistryUnreachable
        if self.base is None:
            raise BaseUnknown
        artifact = await self._fetch(record.source_uri)
        if expected_digest is not None and artifact.digest != expected_digest:
            raise DigestMismatch(expected_digest, artifact.digest)
        # Until its record is written, no adapter points to the version: keep the garbage collection off it.
        self._registering[artifact.digest] += 1
        try:
            await self._store(artifact)
            self._failures.pop(artifact.digest, None)
            await self._bring_up(artifact.digest, "")
            if (failure := self._failures.get(artifact.digest)) is not None:
                raise failure.error
            return await self._write(record, artifact)
        finally:
            self._registering[artifact.digest] -= 1

    async def _write(self, record: AdapterRecord, artifact: Artifact) -> AdapterRecord:
        while True:
            before = await self.registry.read(record.adapter_id)
            same = before is not None and before.digest == artifact.digest
            complete = replace(
                record,
                digest=artifact.digest,
                base_model=artifact.base_model,
                rank=artifact.rank,
                size_bytes=len(artifact.packed),
                chat_template=artifact.chat_template,
                target_modules=artifact.target_modules,
                create_time_ms=before.create_time_ms if before and same else record.create_time_ms,
            )
            kind = "updated" if same else "registered"
            if complete == before or await self.registry.put(complete, before, kind):
                self._take(complete)
                return complete

    async def update(self, adapter_id: str, change: Callable[[AdapterRecord], AdapterRecord]) -> AdapterRecord | None:
        """Changes a record; None when there is none."""
        while True:
            before = await self.registry.read(adapter_id)
            if before is None:
                self._forget(adapter_id)
                return None
            after = change(before)
            if after == before or await self.registry.put(after, before, "updated"):
                self._take(after)
                return after

    async def delete(self, adapter_id: str, force: bool) -> bool:
        """Removes an adapter once nothing uses it, or at once with force; False when there is none."""
        record = await self.update(adapter_id, lambda before: replace(before, state="draining"))
        if record is None:
            return False
        shared = any(r.digest == record.digest for r in self.records.values() if r.adapter_id != adapter_id)
        if not shared:
            if force:
                for engine in self.engines.values():
                    if engine.place(record.digest) is DevicePlace.DEVICE:
                        engine.move(record.digest, DeviceMove.EVICT)
                        engine.commands.put_nowait(Evict(record.digest, force=True))
            else:
                await self.wait_for(lambda: all(record.digest not in e.in_use for e in self.engines.values()))
        if await self.registry.delete(record):
            self._forget(adapter_id)
        return True

    async def wait_for(self, condition: Callable[[], bool]) -> None:
        """Returns once something changed so that the condition holds."""
        async with self._changed:
            await self._changed.wait_for(condition)

    async def bring_to_host(self, digest: str) -> None:
        """Returns once a version is in the host tier, or raises why it cannot be."""
        if self._name(digest) in self._on_host:
            return
        await asyncio.shield(self._bring_up(digest, ""))
        if (failure := self._failures.get(digest)) is not None:
            raise failure.error

    def failure_of(self, digest: str) -> ServiceError | None:
        """Why a version cannot be brought up, if it cannot."""
        failure = self._failures.get(digest)
        return failure.error if failure else None

    def residency(self, digest: str) -> list[tuple[str, str, Place | DevicePlace]]:
        """Where a version is: (node_id, engine_id or "", place), this node first."""
        here: list[tuple[str, str, Place | DevicePlace]] = []
        if self._name(digest) in self._on_disk:
            here.append((self.node_id, "", Place.DISK))
        if self._name(digest) in self._on_host:
            here.append((self.node_id, "", Place.HOST))
        for engine in self.engines.values():
            if engine.place(digest) in (DevicePlace.DEVICE, DevicePlace.EVICTING):
                here.append((self.node_id, engine.engine_id, DevicePlace.DEVICE))
        for node, held in self._elsewhere.items():
            for tier in held.get(digest, ()):
                engine_id, _, place = tier.rpartition("/")
                here.append((node, engine_id, DevicePlace(place) if engine_id else Place(place)))
        return here

    # Watching

    def watch(self) -> Watcher:
        """A new watcher; `unwatch` it."""
        watcher = Watcher(self.records.values())
        self._watchers.add(watcher)
        return watcher

    def unwatch(self, watcher: Watcher) -> None:
        """Forgets a watcher."""
        self._watchers.discard(watcher)

    def _announce(self, *digests: str) -> None:
        """Tells watchers that the residency of versions has changed, and the loop that something did."""
        changed = set(digests)
        for record in self.records.values():
            if record.digest in changed:
                for watcher in self._watchers:
                    watcher.notify(Change.RESIDENCY, record)
        self._wake.set()

    def _take(self, record: AdapterRecord) -> None:
        """Takes a record into the view."""
        before = self.records.get(record.adapter_id)
        if record == before:
            return
        self.records[record.adapter_id] = record
        new = before is None or before.digest != record.digest
        for watcher in self._watchers:
            watcher.notify(Change.REGISTERED if new else Change.UPDATED, record)
        self._wake.set()

    def _forget(self, adapter_id: str) -> None:
        """Takes a record out of the view."""
        record = self.records.pop(adapter_id, None)
        if record is not None:
            for watcher in self._watchers:
                watcher.notify(Change.DELETED, record)
            self._wake.set()

    # Redis: keeping in touch, losing it, finding it again

    async def _keep_in_touch(self) -> None:
        while True:
            await asyncio.sleep(HEARTBEAT_SECONDS if self.reachable else 0.25)
            try:
                if not self.reachable:
                    await self._reconcile()
                held: dict[str, list[str]] = {}
                for digest in {record.digest for record in self.records.values()}:
                    places = [(e, p) for node, e, p in self.residency(digest) if node == self.node_id]
                    held[digest] = [
                        f"{engine_id}/{place.value}" if engine_id else place.value for engine_id, place in places
                    ]
                leases = [(e.engine_id, digest) for e in self.engines.values() for digest in e.in_use]
                nodes = await self.registry.heartbeat(self.node_id, held, leases)
                self._elsewhere = {node: tiers for node, tiers in nodes.items() if node != self.node_id}
            except RegistryUnreachable:
                if self.reachable:
                    _log.warning("Redis does not answer; serving what is known, refusing registrations")
                self.reachable = False
            self._wake.set()

    async def _listen(self) -> None:
        """Takes over what other caches changed."""
        while True:
            try:
                async for adapter_id in self.registry.events():
                    if adapter_id is None:
                        await self._reconcile()
                    elif (record := await self.registry.read(adapter_id)) is not None:
                        self._take(record)
                    else:
                        self._forget(adapter_id)
            except RegistryUnreachable:
                await asyncio.sleep(0.25)

    async def _reconcile(self) -> None:
        """Makes the view the registry's again; a registry that was emptied gets the view's adapters back."""
        epoch, found = await self.registry.epoch(), await self.registry.load()
        if self._epoch and epoch != self._epoch:
            _log.warning("Redis was emptied; restoring %d adapters from this node's view", len(self.records))
            if self.base is not None:
                await self.registry.describe_base(self.base)
            for record in self.records.values():
                if record.adapter_id not in found:
                    await self.registry.restore(record)
            found = await self.registry.load()
        if not self._epoch:
            self._on_disk = await asyncio.to_thread(self.disk.sizes)
            self._on_host = await asyncio.to_thread(self.host.sizes)
        self.base = self.base or await self.registry.base()
        for adapter_id in [adapter_id for adapter_id in self.records if adapter_id not in found]:
            self._forget(adapter_id)
        for record in found.values():
            self._take(record)
        if not self.reachable:
            _log.info("registry in Redis at %s: %d adapters", self.registry.url, len(found))
        self._epoch, self.reachable = epoch, True
        self._wake.set()
