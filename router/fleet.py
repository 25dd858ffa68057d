"""Engines known: one channel and one Dispatch stream each, made again whenever it breaks."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable
from dataclasses import dataclass

import grpc

from loraplex.engine.v1 import engine_pb2, engine_pb2_grpc
from router.messages import Output, Sequence, Wire
from router.wire import cancel_message, output_from, submit_message
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
# Engines say something at least once a second; one that is silent for this long is as good as dead.
SILENCE = 15.0


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
    """What an engine did in one step."""

    engine: Engine
    outputs: list[Output]


class Engine:
    """One connection to an engine, from its EngineReady until the stream breaks.

    Attributes:
        model: its GetModelInfoResponse, passed on to clients unread.
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
        # Bounded by the engine's places: each holds one submission and one cancellation at most.
        self.outgoing: asyncio.Queue[engine_pb2.DispatchRequest] = asyncio.Queue()

    def submit(self, sequence: Sequence) -> None:
        self.outgoing.put_nowait(submit_message(sequence))

    def cancel(self, sequence_id: int) -> None:
        self.outgoing.put_nowait(cancel_message(sequence_id))


Post = Callable[[EngineUp | EngineDown | Frame], None]


class Fleet:
    """All engines of the settings. Posts what happens to them to the loop."""

    def __init__(self, addresses: tuple[str, ...], router_id: str, post: Post) -> None:
        self._links = [_Link(address, router_id, post, self) for address in addresses]

    @property
    def engines(self) -> list[Engine]:
        """Those that are connected."""
        return [link.engine for link in self._links if link.engine]

    async def run(self) -> None:
        async with asyncio.TaskGroup() as group:
            for link in self._links:
                group.create_task(link.run())


class _Link:
    def __init__(self, address: str, router_id: str, post: Post, fleet: Fleet) -> None:
        self.engine: Engine | None = None
        self._address = address
        self._router_id = router_id
        self._post = post
        self._fleet = fleet

    async def run(self) -> None:
        async with grpc.aio.insecure_channel(self._address, options=CHANNEL_OPTIONS) as channel:
            stub = engine_pb2_grpc.EngineServiceStub(channel)
            delay = FIRST_DELAY
            while True:
                was_ready = await self._connect(stub)
                delay = FIRST_DELAY if was_ready else min(2 * delay, LONGEST_DELAY)
                await asyncio.sleep(delay * random.uniform(0.5, 1.0))

    async def _connect(self, stub: engine_pb2_grpc.EngineServiceAsyncStub) -> bool:
        """Holds one stream until it breaks; returns whether the engine was ever ready on it."""
        call = stub.Dispatch(metadata=(("x-loraplex-router", self._router_id),))
        try:
            first = await call.read()
            if not isinstance(first, engine_pb2.DispatchResponse) or not self._accept(first, stub):
                return False
            await self._converse(call)
            _log.warning("engine at %s closed its stream", self._address)
        except grpc.aio.AioRpcError as error:
            if self.engine:
                _log.warning("engine at %s is lost: %s", self._address, error.details())
        except TimeoutError:
            _log.warning("engine at %s is lost: silent for %.0f s", self._address, SILENCE)
        except ValueError as error:
            _log.error("engine at %s broke the contract: %s", self._address, error)
        finally:
            call.cancel()
            lost, self.engine = self.engine, None
            if lost:
                self._post(EngineDown(lost))
        return lost is not None

    def _accept(self, first: engine_pb2.DispatchResponse, stub: engine_pb2_grpc.EngineServiceAsyncStub) -> bool:
        ready = first.ready
        if ready.max_sequences < 1 or not ready.engine_id:
            _log.error("engine at %s broke the contract: it did not begin with an EngineReady", self._address)
            return False
        # Two bases behind one router would give one adapter two meanings.
        other = next((engine for engine in self._fleet.engines if engine.base_digest != ready.model.base_digest), None)
        if other:
            _log.error("engine at %s serves another base than %s; it is not used", self._address, other.engine_id)
            return False
        self.engine = Engine(self._address, ready, stub)
        _log.info("engine %s at %s is ready, %d places", ready.engine_id, self._address, ready.max_sequences)
        self._post(EngineUp(self.engine))
        return True

    async def _converse(
        self, call: grpc.aio.StreamStreamCall[engine_pb2.DispatchRequest, engine_pb2.DispatchResponse]
    ) -> None:
        engine = self.engine
        if engine is None:
            return
        writer = asyncio.create_task(_write(call, engine.outgoing))
        try:
            while True:
                async with asyncio.timeout(SILENCE):
                    message = await call.read()
                if not isinstance(message, engine_pb2.DispatchResponse):
                    return
                if message.frame.outputs:
                    self._post(Frame(engine, [output_from(output) for output in message.frame.outputs]))
        finally:
            writer.cancel()


async def _write(
    call: grpc.aio.StreamStreamCall[engine_pb2.DispatchRequest, engine_pb2.DispatchResponse],
    outgoing: asyncio.Queue[engine_pb2.DispatchRequest],
) -> None:
    try:
        while True:
            await call.write(await outgoing.get())
    except (grpc.RpcError, asyncio.InvalidStateError):
        # The stream is broken; reading says so as well, and why.
        return
