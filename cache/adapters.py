"""What callers ask of the registry: to register, change, delete and preload adapters."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable
from dataclasses import replace

from cache.artifact import Artifact, BaseDescription
from cache.engines import Engine, Evict, Expected
from cache.errors import AdapterNotFound, BaseMismatch, BaseUnknown, DigestMismatch, NoEngine, RegistryUnreachable
from cache.manager import Manager
from cache.registry import AdapterRecord
from cache.residency import DeviceMove, DevicePlace, Place
from cache.tiers import ArtifactKey


class Adapters:
    """See the module. Every change is made in Redis first, and is in the view when the call returns."""

    def __init__(self, manager: Manager) -> None:
        self._manager = manager
        self._link, self._view, self._shelf = manager.link, manager.view, manager.shelf
        self._drains: dict[str, asyncio.Task[None]] = {}

    def resume(self) -> None:
        """Goes on with the deletions that an earlier process has begun."""
        for record in self._view.records.values():
            if record.state == "draining":
                self._drain(record.adapter_id, force=False)

    async def register(self, asked: AdapterRecord, expected_digest: str | None) -> AdapterRecord:
        """Validates, stores and registers an adapter; `asked` holds what the caller said, the rest is filled in."""
        base = self._link.base
        if not self._link.reachable:
            raise RegistryUnreachable
        if base is None:
            raise BaseUnknown
        # Asked before the work is done: a registry that was just lost shows here.
        await self._link.registry.read(asked.adapter_id)
        artifact = await self._manager.builder.build(asked.source_uri, base)
        if expected_digest is not None and artifact.digest != expected_digest:
            raise DigestMismatch(expected_digest, artifact.digest)
        with self._manager.protected(artifact.digest):
            await self._shelf.store(artifact, base.dtype)
            await self._shelf.bring_to_host(ArtifactKey(artifact.digest, base.dtype))
            return await self._point(asked, artifact, base)

    async def _point(self, asked: AdapterRecord, artifact: Artifact, base: BaseDescription) -> AdapterRecord:
        """Makes a version the one that an id answers with."""
        while True:
            if self._link.base is None or self._link.base.digest != base.digest:
                # The base was replaced while the adapter was validated against the former one.
                raise BaseMismatch(self._link.base.digest if self._link.base else "", base.digest)
            before = await self._link.registry.read(asked.adapter_id)
            same = before is not None and before.digest == artifact.digest
            complete = replace(
                asked,
                digest=artifact.digest,
                base_model=artifact.base_model,
                base_digest=base.digest,
                rank=artifact.rank,
                size_bytes=len(artifact.packed),
                chat_template=artifact.chat_template,
                target_modules=artifact.target_modules,
                create_time_ms=before.create_time_ms if before and same else asked.create_time_ms,
            )
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
            for engine in self._manager.engines.values():
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
        here = any(record.digest in engine.in_use for engine in self._manager.engines.values())
        return self._is_sole(record) and (here or record.digest in self._link.leases_elsewhere)

    # Preloading

    async def preload(self, record: AdapterRecord, tier: Place | DevicePlace) -> None:
        """Brings a version to a tier (the device's: on every engine attached) and returns when it is there."""
        if tier is DevicePlace.DEVICE:
            return await self._preload_devices(record.digest)
        if self._link.base is None:
            raise BaseUnknown
        key = ArtifactKey(record.digest, self._link.base.dtype)
        return await (self._shelf.bring_to_host(key) if tier is Place.HOST else self._shelf.bring_to_disk(key))

    async def _preload_devices(self, digest: str) -> None:
        engines = list(self._manager.engines.values())
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
        return there or digest not in engine.expected or self._manager.engines.get(engine.engine_id) is not engine
