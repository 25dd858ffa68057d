"""The engine's side of the cache: describes itself, carries out loads and evictions, says what it needs.

The link may be lost at any time and comes back by itself; the engine keeps what it has and goes on serving it. After
each return it describes itself anew with what is on its device, so that both sides agree again.
"""

from __future__ import annotations

import asyncio
import glob
import logging
import os
import random
from collections.abc import AsyncIterator
from dataclasses import replace

import grpc

from engine.load_queue import LoadQueue
from engine.loop import EngineLoop
from engine.lora import DeviceAdapter
from engine.messages import Deny, Evict, Evicted, Install, Loaded, LoadFailed, Report, Usage
from engine.model import Base
from engine.remote_artifacts import copied
from engine.rows import ArtifactReader
from loraplex.cache.v1 import residency_pb2 as wire
from loraplex.cache.v1 import residency_pb2_grpc
from servicekit.errors import Internal, RemoteError, ServiceError
from servicekit.status import from_rpc_error
from servicekit.tracing import context_from, end_span, start_span

_log = logging.getLogger(__name__)

FIRST_DELAY, LONGEST_DELAY = 0.2, 5.0


class CacheLink:
    """Keeps one AttachEngine stream to the cache alive.

    `report` may be called from any thread; the rest belongs to the event loop.
    """

    def __init__(self, address: str, engine_id: str, base: Base, reader: ArtifactReader, adapter_bytes: int) -> None:
        self._address = address
        self._engine_id = engine_id
        self._base = base
        self._reader = reader
        self._adapter_bytes = adapter_bytes
        self._events = asyncio.get_running_loop()
        self._usage = Usage()
        self._outbox: asyncio.Queue[wire.AttachEngineRequest] | None = None
        self._channel: grpc.aio.Channel | None = None
        self._loading: set[asyncio.Task[None]] = set()
        self._loop: EngineLoop | None = None
        self._queue = LoadQueue(lambda: self._loop is not None and self._loop.load.running > 0)

    def report(self, report: Report) -> None:
        """Passes on what the engine loop has to say to the cache."""
        try:
            self._events.call_soon_threadsafe(self._send, report)
        except RuntimeError:
            # The process is ending and its event loop has gone.
            return

    async def run(self, loop: EngineLoop) -> None:
        """Stays attached until cancelled."""
        self._loop = loop
        delay = FIRST_DELAY
        while True:
            try:
                async with grpc.aio.insecure_channel(self._address) as channel:
                    async for response in self._attach(channel, loop):
                        if response.WhichOneof("message") == "accepted":
                            _log.info("attached to the cache of node %s", response.accepted.node_id)
                            delay = FIRST_DELAY
                        else:
                            self._obey(response, loop)
                reason = "it ended the stream"
            except grpc.aio.AioRpcError as error:
                reason = from_rpc_error(error).message
            finally:
                self._outbox = None
            _log.warning("no cache at %s (%s); trying again in %.1f s", self._address, reason, delay)
            await asyncio.sleep(delay * random.uniform(0.8, 1.2))
            delay = min(delay * 2, LONGEST_DELAY)

    def _attach(self, channel: grpc.aio.Channel, loop: EngineLoop) -> AsyncIterator[wire.AttachEngineResponse]:
        outbox: asyncio.Queue[wire.AttachEngineRequest] = asyncio.Queue()
        outbox.put_nowait(wire.AttachEngineRequest(description=self._description(loop.resident)))
        for message in _usage(self._usage):
            outbox.put_nowait(message)
        self._outbox, self._channel = outbox, channel
        stub: residency_pb2_grpc.ResidencyServiceAsyncStub = residency_pb2_grpc.ResidencyServiceStub(channel)
        return aiter(stub.AttachEngine(_drained(outbox)))

    def _description(self, resident: tuple[str, ...]) -> wire.EngineDescription:
        return wire.EngineDescription(
            engine_id=self._engine_id,
            base_model=self._base.name,
            base_digest=self._base.digest,
            dtype=self._base.dtype,
            device_budget_bytes=self._adapter_bytes,
            max_rank=self._reader.max_rank,
            modules=[
                wire.TargetModule(name=target.name, in_features=target.in_features, out_features=target.out_features)
                for target in self._base.targets
            ],
            resident_digests=resident,
        )

    def _obey(self, response: wire.AttachEngineResponse, loop: EngineLoop) -> None:
        kind = response.WhichOneof("message")
        if kind == "load":
            task = asyncio.create_task(self._load(response.load, loop))
            self._loading.add(task)
            task.add_done_callback(self._loading.discard)
        elif kind == "evict":
            loop.post(Evict(response.evict.digest, response.evict.force))
        elif kind == "unavailable":
            gone = response.unavailable
            loop.post(Deny(gone.digest, RemoteError(gone.code, gone.message, gone.reason, {"digest": gone.digest})))

    async def _load(self, load: wire.LoadArtifact, loop: EngineLoop) -> None:
        """Copies an artifact to the device, off the step thread, and has the loop install it."""
        span = start_span(
            "adapter.load device",
            parent=context_from(load.traceparent),
            attributes={
                "loraplex.adapter_digest": load.digest,
                "loraplex.engine_id": self._engine_id,
                "loraplex.adapter_bytes": load.size_bytes,
            },
        )
        failure: ServiceError | None = None
        try:
            loop.post(Install(await self._read(load)))
        except ServiceError as error:
            failure = error
        except Exception as error:  # noqa: BLE001 - out of memory on a device has many names
            _log.exception("loading adapter %s failed", load.digest[:12])
            failure = Internal(f"cannot be brought to the device: {type(error).__name__}", "LOAD_FAILED")
        if failure is not None:
            self._send(LoadFailed(load.digest, failure))
        end_span(span, failure)

    async def _read(self, load: wire.LoadArtifact) -> DeviceAdapter:
        """An adapter from the host tier, mapped; as a stream when the cache is on another machine."""
        if os.path.exists(load.path) or self._channel is None:  # noqa: ASYNC240 - in shared memory
            return await self._read_file(self._reader, load.digest, load.path)
        async with copied(self._channel, load.digest, self._base.dtype) as path:
            reader = replace(self._reader, host_tier=glob.escape(os.path.realpath(path.parent)))  # noqa: ASYNC240
            return await self._read_file(reader, load.digest, str(path))

    async def _read_file(self, reader: ArtifactReader, digest: str, path: str) -> DeviceAdapter:
        # One after another: at most one adapter is on its way to the device beside those the budget has counted.
        return await self._queue.load(digest, lambda: reader.read(digest, path))

    def _send(self, report: Report) -> None:
        if isinstance(report, Usage):
            # What has begun is told once; it is an estimate's matter if that is lost.
            self._usage = replace(report, begun={})
            self._queue.heed(report.wanted)
        if self._outbox is None:
            # Detached: the next description and the kept usage say it all.
            return
        for message in _messages(report):
            self._outbox.put_nowait(message)


async def _drained(outbox: asyncio.Queue[wire.AttachEngineRequest]) -> AsyncIterator[wire.AttachEngineRequest]:
    while True:
        yield await outbox.get()


def _messages(report: Report) -> list[wire.AttachEngineRequest]:
    match report:
        case Usage():
            return _usage(report)
        case Loaded(digest, size_bytes):
            return [wire.AttachEngineRequest(loaded=wire.ArtifactLoaded(digest=digest, device_bytes=size_bytes))]
        case LoadFailed(digest, error):
            failed = wire.ArtifactLoadFailed(digest=digest, reason=error.reason, message=error.message)
            return [wire.AttachEngineRequest(load_failed=failed)]
        case Evicted(digest, evicted):
            return [wire.AttachEngineRequest(evicted=wire.ArtifactEvicted(digest=digest, evicted=evicted))]


def _usage(usage: Usage) -> list[wire.AttachEngineRequest]:
    """In use first: what is wanted is then known to be protected."""
    in_use = wire.ArtifactsInUse(digests=sorted(usage.in_use), begun=usage.begun)
    messages = [wire.AttachEngineRequest(in_use=in_use)]
    if usage.wanted:
        messages.append(wire.AttachEngineRequest(wanted=wire.ArtifactsWanted(digests=usage.wanted)))
    return messages
