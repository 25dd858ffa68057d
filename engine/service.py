"""The gRPC edge: a router's stream in, frames out; prompts to tokens on a thread of their own."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import grpc

from engine.credit import places
from engine.errors import EngineDraining, EngineHangs, EngineLoading, NoAdapters
from engine.loop import EngineLoop
from engine.messages import Cancel, Failed, Frame, Hangup, Load, Output, Submit
from engine.model import Base
from engine.wire import read_request, tokens_of, write_frame, write_ready
from loraplex.engine.v1 import engine_pb2 as wire
from loraplex.engine.v1 import engine_pb2_grpc
from loraplex.v1 import generation_pb2 as public
from servicekit.errors import InvalidField, ServiceError

# A router takes an engine that has been silent for longer to be gone.
HEARTBEAT_SECONDS = 1.0
# A step that takes longer makes routers that come in wait outside.
HANGING_SECONDS = 10.0

DispatchContext = grpc.aio.ServicerContext[wire.DispatchRequest, wire.DispatchResponse]
TokenizeContext = grpc.aio.ServicerContext[wire.TokenizeRequest, wire.TokenizeResponse]


@dataclass(frozen=True, slots=True)
class Engine:
    """A loaded engine, as its servicer sees it."""

    engine_id: str
    base: Base
    loop: EngineLoop
    max_sequences: int
    max_rank: int
    serves_adapters: bool


class RouterConnection:
    """One Dispatch stream: frames come in from the step thread and go out in order.

    `changed` is called when its sequences, or the engine's load, may have changed.
    """

    def __init__(self, changed: Callable[[], None]) -> None:
        self._changed = changed
        self._events = asyncio.get_running_loop()
        self._frames: asyncio.Queue[Frame | None] = asyncio.Queue()
        # Sequences that have not ended, those still being tokenised included.
        self._open: set[int] = set()
        # What its router may have here, and was told of that and of the engine's end.
        self.places = 0
        self._told: tuple[int, bool] | None = None
        self._idle = asyncio.Event()
        self._idle.set()

    def __contains__(self, sequence_id: int) -> bool:
        return sequence_id in self._open

    def opened(self, sequence_id: int) -> None:
        """Notes that a sequence has come."""
        self._open.add(sequence_id)
        self._idle.clear()

    def ended(self, sequence_id: int) -> None:
        """Notes that a sequence has ended; one that had already is no error."""
        self._open.discard(sequence_id)
        if not self._open:
            self._idle.set()

    @property
    def open_count(self) -> int:
        return len(self._open)

    async def until_idle(self) -> None:
        """Returns when no sequence is open."""
        await self._idle.wait()

    def deliver(self, frame: Frame) -> None:
        """Takes a frame from the step thread."""
        try:
            self._events.call_soon_threadsafe(self.put, frame)
        except RuntimeError:
            # The process is ending and its event loop has gone: nobody is left to read this.
            return

    def put(self, frame: Frame) -> None:
        """Takes a frame, on the event loop."""
        for output in frame.outputs:
            if output.end is not None:
                self.ended(output.sequence_id)
        self._frames.put_nowait(frame)
        self._changed()

    def close(self) -> None:
        """Ends the stream after the frames that are there."""
        self._frames.put_nowait(None)

    async def next_frame(self, loop: EngineLoop) -> Frame | None:
        """The next frame; an empty one after a second of silence, unless a step hangs; None at the end."""
        while True:
            try:
                async with asyncio.timeout(HEARTBEAT_SECONDS):
                    return await self._frames.get()
            except TimeoutError:
                if loop.round_seconds < HEARTBEAT_SECONDS:
                    return Frame(0, (), loop.load)

    def write(self, frame: Frame, draining: bool) -> wire.DispatchResponse:
        """What to send for a frame."""
        self._told = (self.places, draining)
        return write_frame(frame, self.places, draining)

    def tell(self, places: int, draining: bool, load: Load) -> None:
        """Lets the router know what it may have, with the next frame or one of its own."""
        self.places = places
        if self._told not in (None, (places, draining)) and self._frames.empty():
            self._frames.put_nowait(Frame(0, (), load))


class EngineServicer(engine_pb2_grpc.EngineServiceServicer):
    """Serves EngineService once `open` was called; UNAVAILABLE before."""

    def __init__(self) -> None:
        self._engine: Engine | None = None
        self._draining = False
        self._connections: set[RouterConnection] = set()
        # One thread: submitted sequences keep their order, and a tokenizer is never shared.
        self._tokenizing = ThreadPoolExecutor(max_workers=1, thread_name_prefix="tokenize")

    def open(self, engine: Engine) -> None:
        """Serves this engine from now on."""
        self._engine = engine

    async def drain(self, seconds: float) -> None:
        """Refuses new sequences, waits for the open ones, then ends every stream: routers continue elsewhere what is left."""
        self._draining = True
        self._share()
        idle = [asyncio.create_task(connection.until_idle()) for connection in self._connections]
        if idle:
            await asyncio.wait(idle, timeout=seconds)
        for connection in self._connections:
            connection.close()

    async def Dispatch(
        self, request_iterator: AsyncIterator[wire.DispatchRequest], context: DispatchContext
    ) -> AsyncIterator[wire.DispatchResponse]:
        engine = self._ready()
        if engine.loop.round_seconds > HANGING_SECONDS:
            raise EngineHangs(engine.loop.round_seconds)
        connection = RouterConnection(self._share)
        self._connections.add(connection)
        self._share()
        reader = asyncio.create_task(self._read(engine, connection, request_iterator))

        def hang_up(_: object) -> None:
            reader.cancel()
            self._connections.discard(connection)
            self._share()
            engine.loop.post(Hangup(connection))

        # Not a `finally` here: a stream that is cancelled while it writes closes this generator only some time later.
        context.add_done_callback(hang_up)  # type: ignore[arg-type] # its stub is a class, not a protocol
        yield write_ready(engine.base, engine.engine_id, engine.max_sequences, engine.max_rank)
        while frame := await connection.next_frame(engine.loop):
            yield connection.write(frame, self._draining)
        if reader.done():
            # Raises what the router did wrong, so that the stream does not seem to end well.
            reader.result()

    async def Tokenize(self, request: wire.TokenizeRequest, context: TokenizeContext) -> wire.TokenizeResponse:
        tokenizer = self._ready().base.tokenizer

        def tokenize() -> public.TokenizeResponse:
            ids = tokens_of(tokenizer, request.request, request.chat_template)
            return public.TokenizeResponse(token_ids=ids, tokens=tokenizer.names(ids))

        response = await asyncio.get_running_loop().run_in_executor(self._tokenizing, tokenize)
        return wire.TokenizeResponse(response=response)

    def _ready(self) -> Engine:
        if self._engine is None:
            raise EngineLoading
        if self._draining:
            raise EngineDraining
        return self._engine

    def _share(self) -> None:
        """Shares the engine's places out among the routers."""
        engine = self._engine
        if engine is None:
            return
        load, loading = engine.loop.load, engine.loop.loading_by
        held = {one: max(0, one.open_count - loading.get(one, 0)) for one in self._connections}
        for connection, count in places(engine.max_sequences, load.waiting, held).items():
            connection.tell(count, self._draining, load)

    async def _read(
        self, engine: Engine, connection: RouterConnection, requests: AsyncIterator[wire.DispatchRequest]
    ) -> None:
        """Handles what a router sends until it stops sending; then its stream ends."""
        submits: set[asyncio.Task[None]] = set()
        try:
            async for request in requests:
                if request.WhichOneof("message") == "cancel":
                    connection.ended(request.cancel.sequence_id)
                    self._share()
                    engine.loop.post(Cancel(connection, request.cancel.sequence_id))
                    continue
                sequence_id = request.submit.sequence_id
                if sequence_id in connection:
                    raise InvalidField("sequence_id", f"{sequence_id} is in use on this stream")
                connection.opened(sequence_id)
                self._share()
                task = asyncio.create_task(self._submit(engine, connection, request.submit))
                submits.add(task)
                task.add_done_callback(submits.discard)
        finally:
            for task in submits:
                task.cancel()
            connection.close()

    async def _submit(self, engine: Engine, connection: RouterConnection, submit: wire.SubmitSequence) -> None:
        """Tokenises, checks and hands over one sequence; what is wrong with it fails it alone."""
        received = time.monotonic()
        try:
            if self._draining:
                raise EngineDraining
            if submit.adapter_digest and not engine.serves_adapters:
                raise NoAdapters
            prompt = await asyncio.get_running_loop().run_in_executor(
                self._tokenizing, tokens_of, engine.base.tokenizer, submit.request, submit.chat_template
            )
            request = read_request(submit, prompt, engine.base, received)
        except ServiceError as error:
            failed = Output(submit.sequence_id, end=Failed(error))
            connection.put(Frame(0, (failed,), engine.loop.load))
            return
        # A cancellation that came meanwhile found nothing in the loop to end.
        if submit.sequence_id in connection:
            engine.loop.post(Submit(connection, request))
