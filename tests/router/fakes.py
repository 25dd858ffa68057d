"""An engine and a cache that say what a test tells them to, over real gRPC; and a router put in front of them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc

from loraplex.cache.v1 import residency_pb2, residency_pb2_grpc
from loraplex.engine.v1 import engine_pb2, engine_pb2_grpc
from loraplex.v1 import adapter_pb2, adapter_pb2_grpc, generation_pb2, generation_pb2_grpc
from router.__main__ import Router
from router.config import Settings
from servicekit.errors import Exhausted, NotFound, NotImplementedYet
from servicekit.status import ErrorInterceptor

Context = grpc.aio.ServicerContext[Any, Any]
Submission = engine_pb2.SubmitSequence

WORDS = ("née ", "日本", "🦜", "x", " the")


async def until(condition: Callable[[], object], seconds: float = 5.0) -> None:
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110 - conditions of tests have no event to wait for
            await asyncio.sleep(0.002)


@dataclass
class FakeEngine(engine_pb2_grpc.EngineServiceServicer):
    """Produces WORDS in turn, one per sequence and step, `max_output_tokens` of them.

    A sequence starts when `starts` says so, and steps are taken while `stepping` is set. Where the log probabilities of
    the prompt are wanted, `scores` steps bring two of them each first, and with `answers` unset that is all. Frames tell
    `places` and `draining`; while it drains, what is submitted is refused.
    """

    engine_id: str = "engine-0"
    max_sequences: int = 8
    base_digest: str = "base"
    base_model: str = "fake"
    word: str = ""
    starts: Callable[[Submission], bool] = lambda submission: True
    fails: dict[str, engine_pb2.SequenceFailed] = field(default_factory=dict)
    submitted: list[Submission] = field(default_factory=list)
    cancelled: list[int] = field(default_factory=list)
    running: dict[int, tuple[Submission, int]] = field(default_factory=dict)
    steps: int = 0
    scores: int = 3
    answers: bool = True
    places: int | None = None
    draining: bool = False
    silent: bool = False

    def __post_init__(self) -> None:
        self.stepping = asyncio.Event()
        self.stepping.set()
        self.last = 0
        self._server: grpc.aio.Server | None = None
        self.port = 0

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    async def start(self) -> None:
        self._server = grpc.aio.server(interceptors=[ErrorInterceptor()], options=[("grpc.so_reuseport", 0)])
        engine_pb2_grpc.add_EngineServiceServicer_to_server(self, self._server)
        self.port = self._server.add_insecure_port(f"127.0.0.1:{self.port}")
        await self._server.start()

    async def stop(self) -> None:
        if self._server:
            await self._server.stop(None)

    def drain(self) -> None:
        """Takes nothing new from now on."""
        self.last = max(self.running, default=0)
        self.draining = True

    async def Dispatch(
        self, requests: AsyncIterator[engine_pb2.DispatchRequest], context: Context
    ) -> AsyncIterator[engine_pb2.DispatchResponse]:
        model = generation_pb2.GetModelInfoResponse(
            base_model=self.base_model, base_digest=self.base_digest, vocab_size=5
        )
        ready = engine_pb2.EngineReady(engine_id=self.engine_id, model=model, max_sequences=self.max_sequences)
        yield engine_pb2.DispatchResponse(ready=ready)
        self.running.clear()
        told: tuple[int | None, bool] = (None, False)
        reader = asyncio.create_task(self._read(requests))
        try:
            while True:
                await asyncio.sleep(0.002)
                await self.stepping.wait()
                self.steps += 1
                outputs = [out for number in list(self.running) if (out := self._step(number))]
                said = (self.places, self.draining)
                if self.silent or not (outputs or said != told):
                    continue
                told = said
                load = engine_pb2.EngineLoad(places=self.places)
                yield engine_pb2.DispatchResponse(
                    frame=engine_pb2.StepFrame(step=self.steps, outputs=outputs, load=load, draining=self.draining)
                )
        finally:
            reader.cancel()

    async def _read(self, requests: AsyncIterator[engine_pb2.DispatchRequest]) -> None:
        async for request in requests:
            if request.HasField("submit"):
                self.submitted.append(request.submit)
                self.running[request.submit.sequence_id] = (request.submit, len(request.submit.continuation.token_ids))
            else:
                self.cancelled.append(request.cancel.sequence_id)
                self.running.pop(request.cancel.sequence_id, None)

    def _step(self, number: int) -> engine_pb2.SequenceOutput | None:
        submission, done = self.running[number]
        if not self.starts(submission):
            return None
        output = engine_pb2.SequenceOutput(sequence_id=number)
        if self.draining and number > self.last:
            del self.running[number]
            output.failed.MergeFrom(engine_pb2.SequenceFailed(code=14, reason="ENGINE_DRAINING", message="draining"))
            return output
        answered = len(submission.continuation.token_ids)
        if failed := self.fails.get(submission.request.text):
            del self.running[number]
            output.failed.CopyFrom(failed)
            return output
        if done == answered:
            output.started.prompt_tokens = len(submission.request.text)
            output.started.adapter_wait.FromMilliseconds(7)
        scored = self.scores if submission.request.output.prompt_logprobs and not answered else 0
        if done < scored:
            output.prompt_logprobs.extend(
                generation_pb2.TokenLogprob(token_id=2 * done + half, logprob=-1) for half in (0, 1)
            )
        if done < scored or not self.answers:
            self.running[number] = (submission, done + 1)
            return output if done < scored else None
        done -= scored
        output.text = self.word or WORDS[done % len(WORDS)]
        output.token_ids.append(done)
        self.running[number] = (submission, scored + done + 1)
        if done + 1 >= submission.request.stopping.max_output_tokens:
            del self.running[number]
            output.finished.finish_reason = generation_pb2.FINISH_REASON_LENGTH
            output.finished.output_tokens = done + 1
        return output

    async def Tokenize(self, request: engine_pb2.TokenizeRequest, context: Context) -> engine_pb2.TokenizeResponse:
        text = request.chat_template + request.request.text
        response = generation_pb2.TokenizeResponse(token_ids=[ord(c) for c in text], tokens=list(text))
        return engine_pb2.TokenizeResponse(response=response)


def adapter(adapter_id: str, digest: str = "", *, engines: tuple[str, ...] = (), **fields: Any) -> adapter_pb2.Adapter:
    fields.setdefault("weight", 1.0)
    fields.setdefault("state", adapter_pb2.Adapter.STATE_ACTIVE)
    made = adapter_pb2.Adapter(adapter_id=adapter_id, digest=digest or f"digest-{adapter_id}", **fields)
    made.residency.add(node_id="node", tier=adapter_pb2.TIER_DISK)
    for engine in engines:
        made.residency.add(node_id="node", engine_id=engine, tier=adapter_pb2.TIER_DEVICE)
    return made


class FakeCache(adapter_pb2_grpc.AdapterServiceServicer, residency_pb2_grpc.ResidencyServiceServicer):
    """Holds what a test puts into `adapters`; `tell` sends an event to all watchers."""

    def __init__(self, *adapters: adapter_pb2.Adapter) -> None:
        self.adapters = {one.adapter_id: one for one in adapters}
        self.prefetches: list[residency_pb2.PrefetchRequest] = []
        self.look_aheads: list[residency_pb2.LookAheadRequest] = []
        self.timeouts: list[float | None] = []
        self.watchers: list[asyncio.Queue[adapter_pb2.AdapterEvent]] = []
        self._server: grpc.aio.Server | None = None
        self.port = 0

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    async def start(self) -> None:
        self._server = grpc.aio.server(interceptors=[ErrorInterceptor()], options=[("grpc.so_reuseport", 0)])
        adapter_pb2_grpc.add_AdapterServiceServicer_to_server(self, self._server)
        residency_pb2_grpc.add_ResidencyServiceServicer_to_server(self, self._server)
        self.port = self._server.add_insecure_port(f"127.0.0.1:{self.port}")
        await self._server.start()

    async def stop(self) -> None:
        if self._server:
            await self._server.stop(None)

    def tell(self, kind: adapter_pb2.AdapterEvent.Kind.ValueType, changed: adapter_pb2.Adapter) -> None:
        self.adapters[changed.adapter_id] = changed
        for watcher in self.watchers:
            watcher.put_nowait(adapter_pb2.AdapterEvent(kind=kind, adapter=changed))

    async def WatchAdapters(
        self, request: adapter_pb2.WatchAdaptersRequest, context: Context
    ) -> AsyncIterator[adapter_pb2.AdapterEvent]:
        queue: asyncio.Queue[adapter_pb2.AdapterEvent] = asyncio.Queue()
        self.watchers.append(queue)
        try:
            for one in list(self.adapters.values()):
                yield adapter_pb2.AdapterEvent(kind=adapter_pb2.AdapterEvent.KIND_SNAPSHOT, adapter=one)
            yield adapter_pb2.AdapterEvent(kind=adapter_pb2.AdapterEvent.KIND_SNAPSHOT_END)
            while True:
                yield await queue.get()
        finally:
            self.watchers.remove(queue)

    async def RegisterAdapter(
        self, request: adapter_pb2.RegisterAdapterRequest, context: Context
    ) -> adapter_pb2.RegisterAdapterResponse:
        self.timeouts.append(context.time_remaining())
        if request.source_uri == "file:///full":
            raise Exhausted("no room on disk", "DISK_FULL", retry_after=1.5, limit_bytes=10)
        made = adapter(request.adapter_id, source_uri=request.source_uri)
        self.adapters[made.adapter_id] = made
        return adapter_pb2.RegisterAdapterResponse(adapter=made)

    async def DeleteAdapter(
        self, request: adapter_pb2.DeleteAdapterRequest, context: Context
    ) -> adapter_pb2.DeleteAdapterResponse:
        del self.adapters[request.adapter_id]
        return adapter_pb2.DeleteAdapterResponse()

    async def ListAdapters(
        self, request: adapter_pb2.ListAdaptersRequest, context: Context
    ) -> adapter_pb2.ListAdaptersResponse:
        return adapter_pb2.ListAdaptersResponse(adapters=self.adapters.values(), next_page_token=request.page_token)

    async def UpdateAdapter(
        self, request: adapter_pb2.UpdateAdapterRequest, context: Context
    ) -> adapter_pb2.UpdateAdapterResponse:
        found = self.adapters[request.adapter_id]
        found.weight = request.weight
        return adapter_pb2.UpdateAdapterResponse(adapter=found)

    async def PreloadAdapter(
        self, request: adapter_pb2.PreloadAdapterRequest, context: Context
    ) -> adapter_pb2.PreloadAdapterResponse:
        raise NotImplementedYet("PreloadAdapter")

    async def AttachEngine(
        self, requests: AsyncIterator[residency_pb2.AttachEngineRequest], context: Context
    ) -> AsyncIterator[residency_pb2.AttachEngineResponse]:
        raise NotImplementedYet("AttachEngine")
        yield residency_pb2.AttachEngineResponse()

    async def GetAdapter(
        self, request: adapter_pb2.GetAdapterRequest, context: Context
    ) -> adapter_pb2.GetAdapterResponse:
        found = self.adapters.get(request.adapter_id)
        if found is None:
            raise NotFound("no such adapter", "ADAPTER_NOT_FOUND", adapter_id=request.adapter_id)
        return adapter_pb2.GetAdapterResponse(adapter=found)

    async def Prefetch(
        self, request: residency_pb2.PrefetchRequest, context: Context
    ) -> residency_pb2.PrefetchResponse:
        self.prefetches.append(request)
        return residency_pb2.PrefetchResponse()

    async def LookAhead(
        self, request: residency_pb2.LookAheadRequest, context: Context
    ) -> residency_pb2.LookAheadResponse:
        self.look_aheads.append(request)
        return residency_pb2.LookAheadResponse()


@dataclass
class Running:
    """A router under test, what it talks to, and a client."""

    router: Router
    engines: list[FakeEngine]
    cache: FakeCache
    channel: grpc.aio.Channel
    stop: asyncio.Event
    task: asyncio.Task[None]
    connected: int

    @property
    def engine(self) -> FakeEngine:
        return self.engines[0]

    @property
    def generation(self) -> generation_pb2_grpc.GenerationServiceAsyncStub:
        return generation_pb2_grpc.GenerationServiceStub(self.channel)

    @property
    def adapters(self) -> adapter_pb2_grpc.AdapterServiceAsyncStub:
        return adapter_pb2_grpc.AdapterServiceStub(self.channel)

    @property
    def ready(self) -> bool:
        fleet = self.router.fleet
        return len(fleet.engines) == self.connected and self.router.cache.view.loaded


@asynccontextmanager
async def running(
    *adapters: adapter_pb2.Adapter, engines: list[FakeEngine] | None = None, connected: int = 0, **settings: Any
) -> AsyncIterator[Running]:
    """A router with its fakes, ready; all stopped on leaving."""
    fakes = [FakeEngine()] if engines is None else engines
    cache = FakeCache(*adapters)
    for fake in fakes:
        await fake.start()
    await cache.start()
    addresses = tuple(engine.address for engine in fakes)
    router = Router(Settings(listen="127.0.0.1:0", engines=addresses, cache=cache.address, **settings), "router-test")
    stop = asyncio.Event()

    async def stopped() -> None:
        await stop.wait()

    task = asyncio.create_task(router.run(stopped()))
    await until(lambda: task.done() or router.server.port > 0)
    channel = grpc.aio.insecure_channel(
        f"127.0.0.1:{router.server.port}", options=[("grpc.use_local_subchannel_pool", 1)]
    )
    found = Running(router, fakes, cache, channel, stop, task, connected or len(fakes))
    try:
        await until(lambda: found.ready)
        await asyncio.sleep(0)
        yield found
    finally:
        await channel.close()
        for engine in fakes:
            engine.stepping.set()
        stop.set()
        await asyncio.wait_for(task, 10)
        for fake in fakes:
            await fake.stop()
        await cache.stop()


def request(text: str = "Hello", adapter_id: str = "", tokens: int = 5) -> generation_pb2.GenerateRequest:
    return generation_pb2.GenerateRequest(
        adapter_id=adapter_id, text=text, stopping=generation_pb2.StoppingParams(max_output_tokens=tokens)
    )
