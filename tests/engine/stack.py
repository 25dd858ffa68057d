"""The real service over gRPC with a tiny model; its router and its cache are played by the test."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc

from engine.cache_link import CacheLink
from engine.loop import EngineLoop
from engine.model import Base
from engine.service import Engine, EngineServicer
from loraplex.cache.v1 import residency_pb2 as cache
from loraplex.cache.v1 import residency_pb2_grpc
from loraplex.engine.v1 import engine_pb2 as wire
from loraplex.engine.v1 import engine_pb2_grpc
from loraplex.v1 import generation_pb2 as public
from servicekit.server import Server
from tests.engine.harness import Collected, reader, tiny_base
from tests.engine.tiny import TinyAdapter, four_adapters

PROMPT = [5, 80, 33, 7, 290]


class FakeCache(residency_pb2_grpc.ResidencyServiceServicer):
    """A cache that does what the test says."""

    def __init__(self) -> None:
        self.described: list[cache.EngineDescription] = []
        self.said: list[cache.AttachEngineRequest] = []
        self.changed = asyncio.Condition()
        self.orders: asyncio.Queue[cache.AttachEngineResponse | None] = asyncio.Queue()

    async def AttachEngine(self, request_iterator: Any, context: Any) -> AsyncIterator[cache.AttachEngineResponse]:
        first = await anext(request_iterator)
        async with self.changed:
            self.described.append(first.description)
            self.changed.notify_all()
        yield cache.AttachEngineResponse(accepted=cache.EngineAccepted(node_id="node"))
        listening = asyncio.create_task(self._listen(request_iterator))
        while order := await self.orders.get():
            yield order
        listening.cancel()

    async def Prefetch(self, request: Any, context: Any) -> cache.PrefetchResponse:
        return cache.PrefetchResponse()

    async def LookAhead(self, request: Any, context: Any) -> cache.LookAheadResponse:
        return cache.LookAheadResponse()

    async def _listen(self, requests: Any) -> None:
        async for request in requests:
            async with self.changed:
                self.said.append(request)
                self.changed.notify_all()

    async def heard(self, what: Callable[[cache.AttachEngineRequest], bool]) -> None:
        async with self.changed, asyncio.timeout(10):
            await self.changed.wait_for(lambda: any(what(said) for said in self.said))

    def order(self, **what: Any) -> None:
        self.orders.put_nowait(cache.AttachEngineResponse(**what))

    def load(self, adapter: TinyAdapter) -> None:
        path = adapter.path
        self.order(load=cache.LoadArtifact(digest=adapter.digest, path=str(path), size_bytes=path.stat().st_size))


class Stream:
    """A Dispatch stream, seen from the router."""

    def __init__(self, stub: Any) -> None:
        self._out: asyncio.Queue[wire.DispatchRequest | None] = asyncio.Queue()
        self.call = stub.Dispatch(self._requests())
        self.sequences: dict[int, Collected] = {}
        self.started: dict[int, wire.SequenceStarted] = {}
        self.ended: dict[int, wire.SequenceOutput] = {}
        self.frames: list[wire.StepFrame] = []
        self.ready = asyncio.get_running_loop().create_future()
        self.changed = asyncio.Condition()
        self.reading = asyncio.create_task(self._read())

    async def _requests(self) -> AsyncIterator[wire.DispatchRequest]:
        while request := await self._out.get():
            yield request

    async def _read(self) -> None:
        async for response in self.call:
            if response.WhichOneof("message") == "ready":
                self.ready.set_result(response.ready)
                continue
            async with self.changed:
                self.frames.append(response.frame)
                for output in response.frame.outputs:
                    self._collect(output)
                self.changed.notify_all()

    def _collect(self, output: wire.SequenceOutput) -> None:
        collected = self.sequences.setdefault(output.sequence_id, Collected())
        collected.text += output.text
        collected.token_ids += output.token_ids
        if output.HasField("started"):
            self.started[output.sequence_id] = output.started
        if output.WhichOneof("end"):
            self.ended[output.sequence_id] = output

    def submit(self, sequence_id: int, digest: str = "", **request: Any) -> None:
        if "text" not in request:
            request.setdefault("token_ids", public.TokenIds(ids=PROMPT))
        request.setdefault("stopping", public.StoppingParams(max_output_tokens=12))
        asked = public.GenerateRequest(**request)
        submit = wire.SubmitSequence(sequence_id=sequence_id, request=asked, adapter_digest=digest)
        self._out.put_nowait(wire.DispatchRequest(submit=submit))

    def cancel(self, sequence_id: int) -> None:
        self._out.put_nowait(wire.DispatchRequest(cancel=wire.CancelSequence(sequence_id=sequence_id)))

    def close(self) -> None:
        self._out.put_nowait(None)

    async def until(self, what: Callable[[], bool]) -> None:
        async with self.changed, asyncio.timeout(20):
            await self.changed.wait_for(what)

    async def end_of(self, sequence_id: int) -> wire.SequenceOutput:
        await self.until(lambda: sequence_id in self.ended)
        return self.ended[sequence_id]


@dataclass
class Stack:
    base: Base
    folder: Path
    adapters: list[TinyAdapter]
    stub: Any
    cache: FakeCache
    loop: EngineLoop
    servicer: EngineServicer
    streams: list[Stream] = field(default_factory=list)

    async def stream(self) -> Stream:
        stream = Stream(self.stub)
        self.streams.append(stream)
        await stream.ready
        return stream


@asynccontextmanager
async def running_stack(folder: Path, shared: Path, with_cache: bool = True) -> AsyncIterator[Stack]:
    base = tiny_base(folder)
    adapters = four_adapters(folder, shared, "llama")
    cache_server, fake = Server(), FakeCache()
    residency_pb2_grpc.add_ResidencyServiceServicer_to_server(fake, cache_server.grpc)
    await cache_server.start("127.0.0.1:0", [])
    server, servicer = Server(), EngineServicer()
    engine_pb2_grpc.add_EngineServiceServicer_to_server(servicer, server.grpc)
    await server.start("127.0.0.1:0", [])

    link = CacheLink(f"127.0.0.1:{cache_server.port}", "engine-1", base, reader(base, shared), 1 << 24)
    loop = EngineLoop(base, max_sequences=8, step_tokens=64, adapter_bytes=1 << 24, report=link.report)
    loop.start()
    attached = asyncio.create_task(link.run(loop)) if with_cache else None
    servicer.open(Engine("engine-1", base, loop, 8, 512, serves_adapters=with_cache))
    async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        stub = engine_pb2_grpc.EngineServiceStub(channel)
        stack = Stack(base, folder, adapters, stub, fake, loop, servicer)
        yield stack
        for stream in stack.streams:
            stream.call.cancel()
            stream.reading.cancel()
    if attached:
        attached.cancel()
    loop.stop()
    await server.drain(0)
    await cache_server.drain(0)
