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
from loraplex.v1 import adapter_pb2_grpc, generation_pb2, generation_pb2_grpc

PLACES = 4096
# Steps a second of the engine: each brings every running sequence tokens_per_second / STEPS / sequences tokens or none.
STEPS = 100
TEXT = " token"
OPTIONS = (
    ("grpc.so_reuseport", 0),
    ("grpc.server.max_pending_requests", 65536),
    ("grpc.max_concurrent_streams", 65536),
)


class TokenEngine(engine_pb2_grpc.EngineServiceServicer):
    """Runs as many sequences as it is given and gives all of them together so many tokens a second.

    A sequence whose prompt is "idle" begins, gets one token and no more.
    """

    def __init__(self, tokens_per_second: float) -> None:
        self._rate = tokens_per_second
        self._cpu = time.process_time()

    async def Dispatch(self, requests: AsyncIterator[engine_pb2.DispatchRequest], context: Any) -> AsyncIterator[Any]:
        model = generation_pb2.GetModelInfoResponse(base_model="tokens", base_digest="base", vocab_size=1 << 20)
        yield engine_pb2.DispatchResponse(
            ready=engine_pb2.EngineReady(engine_id="engine", model=model, max_sequences=PLACES)
        )
        running: dict[int, list[int]] = {}
        idle: list[int] = []
        reader = asyncio.create_task(self._read(requests, running, idle))
        owed, before, step = 0.0, time.monotonic(), 0
        try:
            while True:
                await asyncio.sleep(1 / STEPS)
                now = time.monotonic()
                owed, before = owed + (now - before) * self._rate, now
                step += 1
                frame = engine_pb2.StepFrame(step=step)
                for number in idle:
                    frame.outputs.add(sequence_id=number, text=TEXT, token_ids=[7]).started.prompt_tokens = 1
                idle.clear()
                for number in list(running):
                    if owed < 1:
                        break
                    owed -= 1
                    self._token(frame, number, running)
                owed = min(owed, len(running))
                if frame.outputs or step % STEPS == 0:
                    yield engine_pb2.DispatchResponse(frame=frame)
        finally:
            reader.cancel()

    def _token(self, frame: engine_pb2.StepFrame, number: int, running: dict[int, list[int]]) -> None:
        done, most = running.pop(number)
        output = frame.outputs.add(sequence_id=number, text=TEXT, token_ids=[1000 + done])
        if done == 0:
            output.started.prompt_tokens = 5
        if done + 1 >= most:
            output.finished.finish_reason = generation_pb2.FINISH_REASON_LENGTH
            output.finished.output_tokens = done + 1
        else:
            # To the end of the row: where there is not a token for everyone, everyone has its turn.
            running[number] = [done + 1, most]

    async def _read(self, requests: Any, running: dict[int, list[int]], idle: list[int]) -> None:
        async for request in requests:
            if request.HasField("submit"):
                number, asked = request.submit.sequence_id, request.submit.request
                if asked.text == "idle":
                    idle.append(number)
                else:
                    running[number] = [0, asked.stopping.max_output_tokens]
            else:
                running.pop(request.cancel.sequence_id, None)


class EmptyCache(adapter_pb2_grpc.AdapterServiceServicer):
    """A registry with nothing in it."""

    async def WatchAdapters(self, request: Any, context: Any) -> AsyncIterator[Any]:
        from loraplex.v1 import adapter_pb2

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

    async def StreamGenerate(self, request: Any, context: Any) -> AsyncIterator[Any]:
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
    engine_pb2_grpc.add_EngineServiceServicer_to_server(TokenEngine(tokens_per_second), server)
    adapter_pb2_grpc.add_AdapterServiceServicer_to_server(EmptyCache(), server)
    server.add_insecure_port(f"127.0.0.1:{port}")
    await server.start()
    await server.wait_for_termination()


async def serve_relay(port: int, engine_port: int, beat: float) -> None:
    channel = grpc.aio.insecure_channel(f"127.0.0.1:{engine_port}")
    server = grpc.aio.server(options=OPTIONS)
    relay = Relay(engine_pb2_grpc.EngineServiceStub(channel), beat)
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
