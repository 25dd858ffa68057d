"""What is measured against: an engine that makes tokens up, a relay that does nothing else, and the clients.

python -m bench.router.parts engine PORT TOKENS_PER_SECOND
python -m bench.router.parts relay PORT ENGINE_PORT
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import AsyncIterator
from typing import Any

import grpc
import uvloop

from loraplex.engine.v1 import engine_pb2, engine_pb2_grpc
from loraplex.v1 import adapter_pb2, adapter_pb2_grpc, generation_pb2, generation_pb2_grpc

PLACES = 1000
TEXT = " token"
OPTIONS = (
    ("grpc.so_reuseport", 0),
    ("grpc.server.max_pending_requests", 65536),
    ("grpc.max_concurrent_streams", 65536),
)


class TokenEngine:
    """Runs as many sequences as it is given and gives all of them together so many tokens a second.

    Each step brings every running sequence one token, in one frame. A frame is made and serialised again only when the
    sequences have changed, so that the engine takes as little as it can of the machine that is measured. A sequence whose
    prompt is "idle" begins, gets one token and no more.
    """

    def __init__(self, tokens_per_second: float) -> None:
        self._rate = tokens_per_second
        self._running: set[int] = set()
        self._fresh: list[tuple[int, bool]] = []
        self._frame: bytes | None = None

    async def dispatch(self, requests: AsyncIterator[engine_pb2.DispatchRequest], context: Any) -> AsyncIterator[bytes]:
        model = generation_pb2.GetModelInfoResponse(base_model="tokens", base_digest="base", vocab_size=1 << 20)
        ready = engine_pb2.EngineReady(engine_id="engine", model=model, max_sequences=PLACES)
        yield engine_pb2.DispatchResponse(ready=ready).SerializeToString()
        reader = asyncio.create_task(self._read(requests))
        next_step = heartbeat = time.monotonic()
        try:
            while True:
                if time.monotonic() > heartbeat:
                    heartbeat = time.monotonic() + 1
                    yield engine_pb2.DispatchResponse(frame=engine_pb2.StepFrame()).SerializeToString()
                if self._fresh:
                    yield self._begin()
                elif self._running and self._rate:
                    yield self._step()
                next_step += len(self._running) / self._rate if self._running and self._rate else 0.05
                # What a busy machine kept it from is made up for, up to a tenth of a second.
                next_step = max(next_step, time.monotonic() - 0.1)
                await asyncio.sleep(next_step - time.monotonic())
        finally:
            reader.cancel()

    def _begin(self) -> bytes:
        frame = engine_pb2.StepFrame(step=1)
        for number, is_idle in self._fresh:
            frame.outputs.add(sequence_id=number, text=TEXT, token_ids=[7]).started.prompt_tokens = 5
            if not is_idle:
                self._running.add(number)
        self._fresh.clear()
        self._frame = None
        return engine_pb2.DispatchResponse(frame=frame).SerializeToString()

    def _step(self) -> bytes:
        if self._frame is None:
            outputs = [
                engine_pb2.SequenceOutput(sequence_id=number, text=TEXT, token_ids=[1000 + number])
                for number in self._running
            ]
            frame = engine_pb2.StepFrame(step=2, outputs=outputs)
            self._frame = engine_pb2.DispatchResponse(frame=frame).SerializeToString()
        return self._frame

    async def _read(self, requests: Any) -> None:
        async for request in requests:
            if request.HasField("submit"):
                self._fresh.append((request.submit.sequence_id, request.submit.request.text == "idle"))
            else:
                self._running.discard(request.cancel.sequence_id)
                self._frame = None


class EmptyCache(adapter_pb2_grpc.AdapterServiceServicer):
    """A registry with nothing in it."""

    async def WatchAdapters(self, request: Any, context: Any) -> AsyncIterator[Any]:  # noqa: N802
        yield adapter_pb2.AdapterEvent(kind=adapter_pb2.AdapterEvent.KIND_SNAPSHOT_END)
        await asyncio.get_running_loop().create_future()


class Relay(generation_pb2_grpc.GenerationServiceServicer):
    """The least that can be between an engine and clients: a dict, a queue per client, a message per piece.

    With `beat` above 0, what came for a client in so many seconds is one message, as in the router.
    """

    def __init__(self, stub: Any, beat: float) -> None:
        self._requests: asyncio.Queue[Any] = asyncio.Queue()
        self._call = stub.Dispatch(self._submissions())
        self._queues: dict[int, asyncio.Queue[Any]] = {}
        self._beat = beat
        self._pump_task = asyncio.create_task(self._pump())
        self._numbers = 0

    async def _submissions(self) -> AsyncIterator[Any]:
        while True:
            yield await self._requests.get()

    async def _pump(self) -> None:
        async for message in self._call:
            for output in message.frame.outputs:
                queue = self._queues.get(output.sequence_id)
                if queue is not None:
                    queue.put_nowait(output)

    async def StreamGenerate(self, request: Any, context: Any) -> AsyncIterator[Any]:  # noqa: N802
        self._numbers += 1
        number, queue = self._numbers, asyncio.Queue[Any]()
        self._queues[number] = queue
        submit = engine_pb2.SubmitSequence(sequence_id=number, request=request)
        self._requests.put_nowait(engine_pb2.DispatchRequest(submit=submit))
        try:
            while True:
                outputs = [await queue.get()]
                while not queue.empty():
                    outputs.append(queue.get_nowait())
                yield generation_pb2.StreamGenerateResponse(
                    delta=generation_pb2.Delta(
                        text="".join(output.text for output in outputs),
                        token_ids=[token for output in outputs for token in output.token_ids],
                    )
                )
                if outputs[-1].HasField("finished"):
                    yield generation_pb2.StreamGenerateResponse(completion=generation_pb2.Completion())
                    return
                if self._beat:
                    await asyncio.sleep(self._beat)
        finally:
            del self._queues[number]
            self._requests.put_nowait(engine_pb2.DispatchRequest(cancel=engine_pb2.CancelSequence(sequence_id=number)))


async def serve_engine(port: int, tokens_per_second: float) -> None:
    server = grpc.aio.server(options=OPTIONS)
    handler: Any = grpc.stream_stream_rpc_method_handler(
        TokenEngine(tokens_per_second).dispatch,
        request_deserializer=engine_pb2.DispatchRequest.FromString,
    )
    server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler("loraplex.engine.v1.EngineService", {"Dispatch": handler}),)
    )
    adapter_pb2_grpc.add_AdapterServiceServicer_to_server(EmptyCache(), server)  # type: ignore[abstract]
    server.add_insecure_port(f"127.0.0.1:{port}")
    await server.start()
    await server.wait_for_termination()


async def serve_relay(port: int, engine_port: int, beat: float) -> None:
    channel = grpc.aio.insecure_channel(f"127.0.0.1:{engine_port}")
    server = grpc.aio.server(options=OPTIONS)
    relay = Relay(engine_pb2_grpc.EngineServiceStub(channel), beat)  # type: ignore[abstract]
    generation_pb2_grpc.add_GenerationServiceServicer_to_server(relay, server)
    server.add_insecure_port(f"127.0.0.1:{port}")
    await server.start()
    await server.wait_for_termination()


if __name__ == "__main__":
    role, *rest = sys.argv[1:]
    if role == "engine":
        uvloop.run(serve_engine(int(rest[0]), float(rest[1])))
    else:
        uvloop.run(serve_relay(int(rest[0]), int(rest[1]), float(rest[2])))
