"""gRPC edge of the cache: messages to dataclasses and back, checks of what callers say."""

from __future__ import annotations

import asyncio
import base64
import binascii
import math
import re
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import replace
from typing import Any

import grpc

from cache.adapters import Adapters
from cache.devices import Devices
from cache.engines import Engine
from cache.errors import AdapterNotFound
from cache.manager import Manager
from cache.registry import AdapterRecord
from cache.sources import Credentials, scheme_of
from cache.watchers import Event
from cache.wire import KINDS, PLACES, adapter_message, command_message, engine_from, queue_from
from loraplex.cache.v1 import residency_pb2, residency_pb2_grpc
from loraplex.v1 import adapter_pb2, adapter_pb2_grpc
from servicekit.errors import Code, InvalidField, RemoteError

_ADAPTER_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,127}")
_DIGEST = re.compile(r"[0-9a-f]{64}")
MAX_PAGE_SIZE, DEFAULT_PAGE_SIZE = 1000, 100
MAX_WEIGHT = 1000.0
MOST_BEGUN = 1_000_000

Context = grpc.aio.ServicerContext[Any, Any]


class AdapterService(adapter_pb2_grpc.AdapterServiceServicer):
    """The registry of adapters."""

    def __init__(self, manager: Manager, adapters: Adapters) -> None:
        self._manager, self._view, self._adapters = manager, manager.view, adapters

    async def RegisterAdapter(
        self, request: adapter_pb2.RegisterAdapterRequest, context: Context
    ) -> adapter_pb2.RegisterAdapterResponse:
        _check_adapter_id(request.adapter_id)
        scheme_of(request.source_uri)
        weight = request.weight if request.HasField("weight") else 1.0
        _check_weight(weight)
        expected = request.expected_digest if request.HasField("expected_digest") else None
        if expected is not None and not _DIGEST.fullmatch(expected):
            raise InvalidField("expected_digest", "is not 64 lower-case hex digits", "MALFORMED_DIGEST")
        asked = AdapterRecord(
            adapter_id=request.adapter_id,
            source_uri=request.source_uri,
            digest="",
            base_model="",
            method="lora",
            rank=0,
            size_bytes=0,
            pinned=request.pinned,
            weight=weight,
            create_time_ms=int(time.time() * 1000),
            chat_template="",
            target_modules=(),
        )
        given = request.credentials
        credentials = Credentials(given.token, given.access_key_id, given.secret_access_key, given.session_token)
        record = await self._adapters.register(asked, expected, credentials, request.base_model)
        return adapter_pb2.RegisterAdapterResponse(adapter=self._adapter(record))

    async def GetAdapter(
        self, request: adapter_pb2.GetAdapterRequest, context: Context
    ) -> adapter_pb2.GetAdapterResponse:
        return adapter_pb2.GetAdapterResponse(adapter=self._adapter(self._record(request.adapter_id)))

    async def ListAdapters(
        self, request: adapter_pb2.ListAdaptersRequest, context: Context
    ) -> adapter_pb2.ListAdaptersResponse:
        if not 0 <= request.page_size <= MAX_PAGE_SIZE:
            message = f"{request.page_size} is not within 0 to {MAX_PAGE_SIZE}"
            raise InvalidField("page_size", message, "OUT_OF_RANGE", limit=MAX_PAGE_SIZE)
        size = request.page_size or DEFAULT_PAGE_SIZE
        after = _after(request.page_token)
        ids = sorted(adapter_id for adapter_id in self._view.records if adapter_id > after)
        page = [self._adapter(self._view.records[adapter_id]) for adapter_id in ids[:size]]
        token = _page_token(ids[size - 1]) if len(ids) > size else ""
        return adapter_pb2.ListAdaptersResponse(adapters=page, next_page_token=token)

    async def UpdateAdapter(
        self, request: adapter_pb2.UpdateAdapterRequest, context: Context
    ) -> adapter_pb2.UpdateAdapterResponse:
        _check_adapter_id(request.adapter_id)
        if request.HasField("weight"):
            _check_weight(request.weight)

        def change(record: AdapterRecord) -> AdapterRecord:
            return replace(
                record,
                pinned=request.pinned if request.HasField("pinned") else record.pinned,
                weight=request.weight if request.HasField("weight") else record.weight,
            )

        record = await self._adapters.update(request.adapter_id, change)
        return adapter_pb2.UpdateAdapterResponse(adapter=self._adapter(record))

    async def DeleteAdapter(
        self, request: adapter_pb2.DeleteAdapterRequest, context: Context
    ) -> adapter_pb2.DeleteAdapterResponse:
        _check_adapter_id(request.adapter_id)
        await self._adapters.delete(request.adapter_id, request.force)
        return adapter_pb2.DeleteAdapterResponse()

    async def PreloadAdapter(
        self, request: adapter_pb2.PreloadAdapterRequest, context: Context
    ) -> adapter_pb2.PreloadAdapterResponse:
        record = self._record(request.adapter_id)
        place = PLACES.get(request.tier)
        if place is None:
            raise InvalidField("tier", "must be TIER_DISK, TIER_HOST or TIER_DEVICE", "OUT_OF_RANGE")
        await self._adapters.preload(record, place)
        return adapter_pb2.PreloadAdapterResponse(adapter=self._adapter(record))

    async def WatchAdapters(
        self, request: adapter_pb2.WatchAdaptersRequest, context: Context
    ) -> AsyncIterator[adapter_pb2.AdapterEvent]:
        watcher = self._view.watch()
        try:
            async for event in watcher.events():
                yield self._event(event)
        finally:
            self._view.unwatch(watcher)

    def _record(self, adapter_id: str) -> AdapterRecord:
        _check_adapter_id(adapter_id)
        record = self._view.records.get(adapter_id)
        if record is None:
            raise AdapterNotFound(adapter_id)
        return record

    def _event(self, event: Event) -> adapter_pb2.AdapterEvent:
        if event.record is None:
            return adapter_pb2.AdapterEvent(kind=adapter_pb2.AdapterEvent.KIND_SNAPSHOT_END)
        kind = adapter_pb2.AdapterEvent.KIND_SNAPSHOT if event.change is None else KINDS[event.change]
        return adapter_pb2.AdapterEvent(kind=kind, adapter=self._adapter(event.record))

    def _adapter(self, record: AdapterRecord) -> adapter_pb2.Adapter:
        link, digest = self._manager.link, record.digest
        failure = self._manager.shelf.last_failure(digest)
        residency, leases = self._manager.residency(digest), self._manager.leases(digest)
        base = link.bases.of(record)
        return adapter_message(record, residency, leases, base.name if base else "", link.last_use.get(digest), failure)


class ResidencyService(residency_pb2_grpc.ResidencyServiceServicer):
    """What engines and routers ask of this cache."""

    def __init__(self, devices: Devices, node_id: str) -> None:
        self._devices, self._node_id = devices, node_id

    async def Prefetch(
        self, request: residency_pb2.PrefetchRequest, context: Context
    ) -> residency_pb2.PrefetchResponse:
        self._devices.prefetch(request.digest, request.engine_id, request.traceparent, request.tenant)
        return residency_pb2.PrefetchResponse()

    async def LookAhead(
        self, request: residency_pb2.LookAheadRequest, context: Context
    ) -> residency_pb2.LookAheadResponse:
        if not request.router_id:
            raise InvalidField("router_id", "must be set", "MISSING")
        self._devices.look_ahead(request.router_id, queue_from(request, time.monotonic()))
        return residency_pb2.LookAheadResponse()

    async def AttachEngine(
        self, request_iterator: AsyncIterator[residency_pb2.AttachEngineRequest], context: Context
    ) -> AsyncIterator[residency_pb2.AttachEngineResponse]:
        first = await anext(request_iterator, None)
        if first is None or first.WhichOneof("message") != "description":
            raise InvalidField("message", "the first message must be the engine's description", "NO_DESCRIPTION")
        engine = engine_from(first.description)
        await self._devices.attach(engine, first.description.resident_digests)
        reader = asyncio.create_task(self._read(engine, request_iterator))
        try:
            accepted = residency_pb2.EngineAccepted(node_id=self._node_id)
            yield residency_pb2.AttachEngineResponse(accepted=accepted)
            while (command := await engine.commands.get()) is not None:
                yield command_message(command)
            if reader.done():
                # What the engine said wrong is the status its stream ends with.
                reader.result()
        finally:
            reader.cancel()
            self._devices.detach(engine)

    async def _read(self, engine: Engine, messages: AsyncIterator[residency_pb2.AttachEngineRequest]) -> None:
        try:
            async for message in messages:
                self._hear(engine, message)
        finally:
            # However it ended, nothing more comes from this engine: end the other direction too.
            engine.commands.put_nowait(None)

    def _hear(self, engine: Engine, message: residency_pb2.AttachEngineRequest) -> None:
        match message.WhichOneof("message"):
            case "wanted":
                self._devices.want(engine, message.wanted.digests)
            case "in_use":
                self._devices.in_use(engine, frozenset(message.in_use.digests), _counts(message.in_use.begun))
            case "loaded":
                self._devices.loaded(engine, message.loaded.digest, message.loaded.device_bytes)
            case "load_failed":
                failed = message.load_failed
                error = RemoteError(Code.FAILED_PRECONDITION, failed.message, failed.reason, {"digest": failed.digest})
                self._devices.load_failed(engine, failed.digest, error)
            case "evicted":
                self._devices.evicted(engine, message.evicted.digest, message.evicted.evicted)
            case other:
                raise InvalidField("message", f"{other} is not what an attached engine says", "UNEXPECTED_MESSAGE")


def _counts(begun: Mapping[str, int]) -> dict[str, int]:
    """How many sequences have begun with each adapter; as many as one node can serve in a while, which are gone through."""
    for digest, count in begun.items():
        if not 0 <= count <= MOST_BEGUN:
            message = f"{count} of {digest[:12]} is not within 0 to {MOST_BEGUN}"
            raise InvalidField("in_use.begun", message, "OUT_OF_RANGE", limit=MOST_BEGUN)
    return dict(begun)


def _check_adapter_id(adapter_id: str) -> None:
    if not _ADAPTER_ID.fullmatch(adapter_id):
        raise InvalidField(
            "adapter_id",
            "must be 1 to 128 of letters, digits, '.', '_', '-', '/', starting with a letter or digit",
            "MALFORMED_ID",
        )


def _check_weight(weight: float) -> None:
    if not (math.isfinite(weight) and 0 < weight <= MAX_WEIGHT):
        raise InvalidField(
            "weight", f"{weight} is not above 0 and at most {MAX_WEIGHT:g}", "OUT_OF_RANGE", limit=MAX_WEIGHT
        )


def _page_token(adapter_id: str) -> str:
    return base64.urlsafe_b64encode(b"after:" + adapter_id.encode()).decode()


def _after(token: str) -> str:
    try:
        raw = base64.urlsafe_b64decode(token).decode()
    except (binascii.Error, ValueError):
        raw = ""
    if token and not raw.startswith("after:"):
        raise InvalidField("page_token", "was not made by ListAdapters", "MALFORMED_PAGE_TOKEN")
    return raw.removeprefix("after:")
