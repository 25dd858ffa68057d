"""Engines known: one channel and one Dispatch stream each, made again whenever it breaks."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Callable
from dataclasses import dataclass

import grpc

from loraplex.engine.v1 import engine_pb2, engine_pb2_grpc
from router.messages import Credit, Output, Sequence, Wire
from router.wire import cancel_message, credit_from, output_from, submit_message
from servicekit.server import MAX_MESSAGE_BYTES

_log = logging.getLogger(__name__)

CHANNEL_OPTIONS = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1_000),
)
FIRST_DELAY = 0.1
LONGEST_DELAY = 2.0
# Engines whose steps get on say something at least once a second; one that is silent for much longer hangs.
SILENCE = 30.0


@dataclass(frozen=True, slots=True)
class EngineUp:
    """An engine can take sequences."""

    engine: Engine


@dataclass(frozen=True, slots=True)
class EngineDown:
    """An engine is gone, and all its sequences with it."""

    engine: Engine


@dataclass(frozen=True, slots=True)
class Frame:
    """What an engine did in one step, and what it is ready to take now."""

    engine: Engine
    outputs: list[Output]
    credit: Credit


class Engine:
    """One connection to an engine, from its EngineReady until the stream breaks.

    Attributes:
        model: its GetModelInfoResponse, passed on to clients unread.
        is_draining: it is about to end.
    """

    def __init__(
        self, address: str, ready: engine_pb2.EngineReady, stub: engine_pb2_grpc.EngineServiceAsyncStub
    ) -> None:
        self.address = address
        self.engine_id = ready.engine_id
        self.max_sequences = ready.max_sequences
        self.base_digest = ready.model.base_digest
        self.model: Wire = ready.model
        self.stub = stub
        self.is_draining = False
        # Bounded by the engine's places and loads: each holds one submission and one cancellation at most.
        self.outgoing: asyncio.Queue[engine_pb2.DispatchRequest] = asyncio.Queue()

    def submit(self, sequence: Sequence) -> None:
        self.outgoing.put_nowait(submit_message(sequence))

    def cancel(self, sequence_id: int) -> None:
        self.outgoing.put_nowait(cancel_message(sequence_id))


Post = Callable[[EngineUp | EngineDown | Frame], None]
Call = grpc.aio.StreamStreamCall[engine_pb2.DispatchRequest, engine_pb2.DispatchResponse]


class Fleet:
    """All engines of the settings. Posts what happens to them to the loop.

    Args:
        silence: seconds without a word after which an engine is taken for lost.
        default_base: name or digest of the base that answers requests without an adapter.
    """

    def __init__(
        self,
        addresses: tuple[str, ...],
        router_id: str,
        post: Post,
        silence: float = SILENCE,
        now: Callable[[], float] = time.monotonic,
        default_base: str = "",
    ) -> None:
        self._silence = silence
        self._default_base = default_base
        self._links = [_Link(address, router_id, post, now) for address in addresses]

    @property
    def engines(self) -> list[Engine]:
        """Those that are connected, in the order of the settings."""
        return [link.engine for link in self._links if link.engine]

    @property
    def default_base(self) -> str:
        """Digest of the base that answers requests without an adapter; empty before an engine of it was connected.

        It is the one of the settings, else that of the first engine in the settings that was ever connected. It stays
        when its engines are lost: no other base answers in its stead.
        """
        return next((link.base_digest for link in self._links if link.has_base(self._default_base)), "")

    async def run(self) -> None:
        async with asyncio.TaskGroup() as group:
            for link in self._links:
                group.create_task(link.run())
            group.create_task(self._watch())

    def check(self) -> None:
        """Ends the streams of engines that have been silent for too long."""
        for link in self._links:
            link.end_if_silent(self._silence)

    async def _watch(self) -> None:
        # A clock for all engines, instead of a timer for every frame.
        while True:
            await asyncio.sleep(min(1.0, self._silence / 4))
            self.check()


class _Link:
    def __init__(self, address: str, router_id: str, post: Post, now: Callable[[], float]) -> None:
        self.engine: Engine | None = None
        self.base_digest = self.base_model = ""
        self._address = address
        self._router_id = router_id
        self._post = post
        self._now = now
        self._call: Call | None = None
        self._heard_at = 0.0

    async def run(self) -> None:
        async with grpc.aio.insecure_channel(self._address, options=CHANNEL_OPTIONS) as channel:
            stub = engine_pb2_grpc.EngineServiceStub(channel)
            delay = FIRST_DELAY
            while True:
                was_ready = await self._connect(stub)
                delay = FIRST_DELAY if was_ready else min(2 * delay, LONGEST_DELAY)
                await asyncio.sleep(delay * random.uniform(0.5, 1.0))

    def has_base(self, named: str) -> bool:
        """Whether the engine was ever connected, and served the base of this name or digest; "" is any."""
        return bool(self.base_digest) and named in ("", self.base_digest, self.base_model)

    def end_if_silent(self, seconds: float) -> None:
        """Counts from the call on: an engine that never says it is ready is silent, too."""
        if self._call is not None and self._now() - self._heard_at > seconds:
            _log.warning("engine at %s is lost: silent for %.0f s", self._address, seconds)
            self._call.cancel()

    async def _connect(self, stub: engine_pb2_grpc.EngineServiceAsyncStub) -> bool:
        """Holds one stream until it breaks; returns whether the engine was ever ready on it."""
        self._heard_at = self._now()
        call = self._call = stub.Dispatch(metadata=(("x-loraplex-router", self._router_id),))
        try:
            first = await call.read()
            if not isinstance(first, engine_pb2.DispatchResponse) or not self._accept(first, stub):
                return False
            await self._converse(call)
            _log.warning("engine at %s closed its stream", self._address)
        except grpc.aio.AioRpcError as error:
            if self.engine:
                _log.warning("engine at %s is lost: %s", self._address, error.details())
        except asyncio.CancelledError:
            # Either the call was ended for its silence, or this task is.
            if not call.cancelled() or _is_cancelled():
                raise
        except ValueError as error:
            _log.error("engine at %s broke the contract: %s", self._address, error)
        finally:
            call.cancel()
            self._call = None
            lost, self.engine = self.engine, None
            if lost:
                self._post(EngineDown(lost))
        return lost is not None

    def _accept(self, first: engine_pb2.DispatchResponse, stub: engine_pb2_grpc.EngineServiceAsyncStub) -> bool:
        ready = first.ready
        if ready.max_sequences < 1 or not ready.engine_id:
            _log.error("engine at %s broke the contract: it did not begin with an EngineReady", self._address)
            return False
        self.engine = Engine(self._address, ready, stub)
        self.base_digest, self.base_model = ready.model.base_digest, ready.model.base_model
        _log.info("engine %s at %s is ready, %d places", ready.engine_id, self._address, ready.max_sequences)
        self._post(EngineUp(self.engine))
        return True

    async def _converse(self, call: Call) -> None:
        engine = self.engine
        if engine is None:
            return
        writer = asyncio.create_task(_write(call, engine.outgoing))
        credit: Credit | None = None
        try:
            while True:
                message = await call.read()
                if not isinstance(message, engine_pb2.DispatchResponse):
                    return
                self._heard_at = self._now()
                frame = message.frame
                said = credit_from(frame)
                if frame.outputs or said != credit:
                    credit = said
                    engine.is_draining = said.is_draining
                    self._post(Frame(engine, [output_from(output) for output in frame.outputs], said))
        finally:
            writer.cancel()


def _is_cancelled() -> bool:
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


async def _write(call: Call, outgoing: asyncio.Queue[engine_pb2.DispatchRequest]) -> None:
    try:
        while True:
            await call.write(await outgoing.get())
    except (grpc.RpcError, asyncio.InvalidStateError):
        # The stream is broken; reading says so as well, and why.
        return
