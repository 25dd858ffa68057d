"""What callers ask of the registry: to register, change, delete and preload adapters."""

from __future__ import annotations

import asyncio
import math
import random
import time
from collections.abc import Callable
from dataclasses import replace

from cache.artifact import Artifact, BaseDescription
from cache.engines import Engine, Evict, Expected
from cache.errors import (
    AdapterNotFound,
    BaseUnknown,
    DigestMismatch,
    NoEngine,
    RegistryUnreachable,
    SourceMoved,
)
from cache.failures import Failures
from cache.manager import Manager
from cache.registry import AdapterRecord
from cache.residency import DeviceMove, DevicePlace, Place
from cache.sources import NO_CREDENTIALS, Credentials, scheme_of
from cache.tiers import ArtifactKey
from servicekit.errors import InvalidField, NotServable, ServiceError

# What a version is, whichever id points to it.
FACTS = ("digest", "base_model", "base_digest", "method", "rank", "size_bytes", "chat_template", "target_modules")
FORGET_BROKEN_SECONDS = 600.0


class Adapters:
    """See the module. Every change is made in Redis first, and is in the view when the call returns."""

    def __init__(self, manager: Manager) -> None:
        self._manager, self._devices = manager, manager.devices
        self._link, self._view, self._shelf = manager.link, manager.view, manager.shelf
        self._drains: dict[str, asyncio.Task[None]] = {}
        self._broken = Failures(random.random)

    def resume(self) -> None:
        """Goes on with the deletions that an earlier process has begun."""
        for record in self._view.records.values():
            if record.state == "draining":
                self._drain(record.adapter_id, force=False)

    async def register(
        self,
        asked: AdapterRecord,
        expected_digest: str | None,
        credentials: Credentials = NO_CREDENTIALS,
        base_model: str = "",
    ) -> AdapterRecord:
        """Validates, stores and registers an adapter; `asked` holds what the caller said, the rest is filled in.

        Args:
            base_model: name or digest of the base it is for; without one the adapter's own files say, where that is
                not plain.

        The source is asked every time whether this caller may read the adapter, also when its bytes are here. They are
        read only when no adapter has the same source and revision, and by one caller at a time.
        """
        if not self._link.reachable:
            raise RegistryUnreachable
        await self._link.learn_bases()
        base = self._link.bases.named(base_model)
        if expected_digest is None and scheme_of(asked.source_uri) in ("https", "http"):
            raise InvalidField("expected_digest", "must be set for https:// sources", "DIGEST_REQUIRED")
        # Asked before the work is done: a registry that was just lost shows here.
        await self._link.registry.read(asked.adapter_id)
        revision = await self._manager.builder.source.look(asked.source_uri, credentials)
        restorable = credentials == NO_CREDENTIALS
        digest = base.digest if base else ""
        asked = replace(asked, source_revision=revision, base_digest=digest, restorable=restorable)
        if not revision:
            return await self._read(asked, expected_digest, credentials, base)
        if (error := self._broken.error(self._attempt(asked), time.monotonic())) is not None:
            raise error
        async with self._manager.flights.alone("register", *_content_of(asked).split("\n")) as waited:
            known = await self._known(asked, base, waited)
            if known is not None and expected_digest in (None, known.digest):
                return await self._share(asked, known)
            return await self._read(asked, expected_digest, credentials, base)

    async def _read(
        self, asked: AdapterRecord, expected_digest: str | None, credentials: Credentials, base: BaseDescription | None
    ) -> AdapterRecord:
        """Registers what is at the source, for a base, or for the one that the adapter says."""
        bases = self._link.bases
        try:
            artifact = await self._manager.builder.build(
                asked.source_uri,
                lambda own: base or bases.for_adapter(own),
                revision=asked.source_revision,
                credentials=credentials,
            )
        except (InvalidField, NotServable) as error:
            if asked.source_revision and not isinstance(error, SourceMoved):
                # The same bytes are not read again to say the same, until then.
                self._broken.forget_before(time.monotonic() - FORGET_BROKEN_SECONDS)
                self._broken.note(self._attempt(asked), error, time.monotonic())
            raise
        if expected_digest is not None and artifact.digest != expected_digest:
            raise DigestMismatch(expected_digest, artifact.digest)
        with self._manager.protected(artifact.digest):
            await self._shelf.store(artifact, artifact.base.dtype)
            await self._shelf.bring_to_host(ArtifactKey(artifact.digest, artifact.base.dtype))
            return await asyncio.shield(self._point(_described(asked, artifact)))

    def _attempt(self, asked: AdapterRecord) -> str:
        """What the outcome of reading an adapter depends on."""
        return _content_of(asked) if asked.base_digest else f"{_content_of(asked)}{self._link.bases.state()}"

    async def _known(self, asked: AdapterRecord, base: BaseDescription | None, waited: bool) -> AdapterRecord | None:
        """An adapter that was read from the same source at the same revision, on any node, and is to be had."""
        if waited:
            # Whoever was waited for may have registered it on another node, and the news may still be on its way.
            await self._link.reconcile()
        origin = _origin_of(asked)
        same = (record for record in self._view.records.values() if _origin_of(record) == origin)
        known = next((record for record in same if self._is_for(record, base)), None)
        if known is None:
            return None
        with self._manager.protected(known.digest):
            try:
                await self._shelf.bring_to_disk(self._key(known))
            except ServiceError:
                # This caller may read it at the source, whoever cannot any more.
                return None
        return known

    def _is_for(self, record: AdapterRecord, base: BaseDescription | None) -> bool:
        """Whether a record is for a base; for the one that the adapter says, when none is given."""
        # The record has the name that the adapter's own files say.
        return record.base_digest == (base or self._link.bases.for_adapter(record.base_model)).digest

    async def _share(self, asked: AdapterRecord, known: AdapterRecord) -> AdapterRecord:
        """Registers a version that is here."""
        with self._manager.protected(known.digest):
            await self._shelf.bring_to_host(self._key(known))
            facts = {name: getattr(known, name) for name in FACTS}
            return await asyncio.shield(self._point(replace(asked, **facts)))

    async def _point(self, asked: AdapterRecord) -> AdapterRecord:
        """Makes a version the one that an id answers with.

        Goes on when the caller has gone: the record may be written already, and its artifact must not be collected meanwhile.
        """
        with self._manager.protected(asked.digest):
            return await self._write(asked)

    async def _write(self, asked: AdapterRecord) -> AdapterRecord:
        while True:
            before = await self._link.registry.read(asked.adapter_id)
            same = before is not None and before.digest == asked.digest
            complete = replace(asked, create_time_ms=before.create_time_ms if before and same else asked.create_time_ms)
            stored = before if complete == before else await self._link.put(complete, before)
            if stored is not None:
                return stored

    async def update(self, adapter_id: str, change: Callable[[AdapterRecord], AdapterRecord]) -> AdapterRecord:
        """Changes a record. Raises AdapterNotFound."""
        while True:
            before = await self._link.registry.read(adapter_id)
            if before is None:
                raise AdapterNotFound(adapter_id)
            after = change(before)
            stored = before if after == before else await self._link.put(after, before)
            if stored is not None:
                return stored

    # Deleting

    async def delete(self, adapter_id: str, force: bool) -> None:
        """Removes an adapter once nothing uses it, or at once with force. Raises AdapterNotFound."""
        record = await self.update(adapter_id, lambda before: replace(before, state="draining"))
        if force and self._is_sole(record):
            for engine in self._devices.engines.values():
                self._expel(engine, record.digest)
        # The drain goes on when the caller does not wait for its end.
        await asyncio.shield(self._drain(adapter_id, force))

    def _expel(self, engine: Engine, digest: str) -> None:
        """Has an engine fail the sequences that use or wait for a version, and give it up."""
        place = engine.place(digest)
        if place is DevicePlace.DEVICE:
            engine.move(digest, DeviceMove.EVICT)
        if place is not DevicePlace.ABSENT or digest in engine.in_use:
            engine.commands.put_nowait(Evict(digest, force=True))

    def _drain(self, adapter_id: str, force: bool) -> asyncio.Task[None]:
        """Starts removing an adapter that is marked as draining, or joins who did; force does not wait for sequences."""
        task = self._drains.get(adapter_id)
        if task is None or force:
            task = self._manager.spawn(self._drain_once(adapter_id, force))
            self._drains[adapter_id] = task
            task.add_done_callback(lambda done: self._drained(adapter_id, done))
        return task

    def _drained(self, adapter_id: str, task: asyncio.Task[None]) -> None:
        if self._drains.get(adapter_id) is task:
            del self._drains[adapter_id]

    async def _drain_once(self, adapter_id: str, force: bool) -> None:
        while (record := self._view.records.get(adapter_id)) is not None and record.state == "draining":
            if not force:
                await self._until_unused(record)
            try:
                # It may have changed meanwhile: its weight, or it was registered anew and lives on.
                now = await self._link.registry.read(adapter_id)
                if now is None or now.state != "draining" or await self._link.delete(now):
                    return
            except RegistryUnreachable:
                await asyncio.sleep(1.0)

    async def _until_unused(self, record: AdapterRecord) -> None:
        await self._manager.wait_for(lambda: not self._is_in_use(record))

    def _is_sole(self, record: AdapterRecord) -> bool:
        """Whether no other adapter answers with the same version."""
        return all(other.adapter_id == record.adapter_id for other in self._view.with_digest(record.digest))

    def _is_in_use(self, record: AdapterRecord) -> bool:
        """Whether sequences may still run as this adapter, here or on other nodes."""
        here = any(record.digest in engine.in_use for engine in self._devices.engines.values())
        return self._is_sole(record) and (here or record.digest in self._link.leases_elsewhere)

    # Preloading

    async def preload(self, record: AdapterRecord, tier: Place | DevicePlace) -> None:
        """Brings a version to a tier and returns when it is there; to the device on every engine of its base."""
        if tier is DevicePlace.DEVICE:
            return await self._preload_devices(record.digest)
        key = self._key(record)
        return await (self._shelf.bring_to_host(key) if tier is Place.HOST else self._shelf.bring_to_disk(key))

    def _key(self, record: AdapterRecord) -> ArtifactKey:
        """The artifact of an adapter, as engines of its base load it. Raises BaseUnknown."""
        base = self._link.bases.of(record)
        if base is None:
            raise BaseUnknown(record.base_digest)
        return ArtifactKey(record.digest, base.dtype)

    async def _preload_devices(self, digest: str) -> None:
        engines = [each for each in self._devices.engines.values() if self._devices.serves(each, digest)]
        if not engines:
            raise NoEngine
        self._shelf.forgive(digest)
        for engine in engines:
            engine.expect(digest, Expected("", until=math.inf, since=time.monotonic()))
        self._manager.wake()
        await self._manager.wait_for(lambda: all(self._is_settled(engine, digest) for engine in engines))
        for engine in engines:
            if digest in engine.refused:
                raise engine.refused[digest]
        if not any(engine.place(digest) is DevicePlace.DEVICE for engine in engines):
            raise NoEngine

    def _is_settled(self, engine: Engine, digest: str) -> bool:
        """Whether an engine has a version on its device, or will not get it."""
        there = engine.place(digest) is DevicePlace.DEVICE
        return there or digest not in engine.expected or self._devices.engines.get(engine.engine_id) is not engine


def _described(asked: AdapterRecord, artifact: Artifact) -> AdapterRecord:
    """A record with what an artifact says of itself."""
    return replace(
        asked,
        digest=artifact.digest,
        base_model=artifact.base_model,
        base_digest=artifact.base.digest,
        rank=artifact.rank,
        size_bytes=len(artifact.packed),
        chat_template=artifact.chat_template,
        target_modules=artifact.target_modules,
    )


def _content_of(record: AdapterRecord) -> str:
    """What names the bytes that a record was made from, and what they were validated against."""
    return f"{_origin_of(record)}\n{record.base_digest}"


def _origin_of(record: AdapterRecord) -> str:
    """What names the bytes that a record was made from."""
    return f"{record.source_uri}\n{record.source_revision}"
