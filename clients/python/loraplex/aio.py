"""The client for asyncio. `client.py` is its twin for synchronous code; only how a call is made differs."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from functools import cached_property
from os import PathLike
from typing import Any, Generic, Literal, Self, TypeVar, Unpack

import grpc

from loraplex import _calls
from loraplex._calls import Answer, Call, Stubs
from loraplex._connection import CHANNEL_OPTIONS, DEFAULT_ADDRESS, Attempts, Connection, Retry
from loraplex._requests import CallOptions, GenerateOptions, PromptOptions, RegisterOptions, UpdateOptions
from loraplex.errors import error_from
from loraplex.types import (
    Adapter,
    AdapterEvent,
    Completion,
    Delta,
    Generation,
    ModelInfo,
    Tier,
    Tokenization,
)

R = TypeVar("R")
E = TypeVar("E")


class AsyncClient:
    """A connection to a Loraplex server, for one event loop. Arguments and errors are those of `Client`.

    async with AsyncClient() as client:
        answer = await client.generate(messages="What is the capital of Canada?", adapter="pirate")
        async for delta in client.stream(messages="And of France?", max_output_tokens=40):
            print(delta.text, end="", flush=True)
    """

    def __init__(
        self,
        address: str = DEFAULT_ADDRESS,
        *,
        tenant: str = "",
        token: str = "",
        timeout: float | None = None,
        tls: bool | grpc.ChannelCredentials = False,
        retry: Retry = Retry(),  # noqa: B008 - frozen
    ) -> None:
        self._caller = _Caller(Connection(address, tenant, token, timeout, tls, retry))
        self.adapters = AsyncAdapters(self._caller)

    async def generate(self, text: str | None = None, /, **options: Unpack[GenerateOptions]) -> Generation:
        """Answers one prompt: a text taken as it is, or `messages=` for a conversation; see GenerateOptions."""
        return await self._caller.unary(_calls.generate(text, options))

    def stream(self, text: str | None = None, /, **options: Unpack[GenerateOptions]) -> AsyncGenerationStream:
        """Answers one prompt piece by piece; arguments as `generate`."""
        return AsyncGenerationStream(self._caller, _calls.stream(text, options))

    async def tokenize(self, text: str | None = None, /, **options: Unpack[PromptOptions]) -> Tokenization:
        """The token ids of a prompt, exactly as generation would see them."""
        return await self._caller.unary(_calls.tokenize(text, options))

    async def model_info(self, **options: Unpack[CallOptions]) -> ModelInfo:
        """The base model and the limits of a request."""
        return await self._caller.unary(_calls.model_info(options))

    async def close(self) -> None:
        """Ends running calls and closes the connection."""
        await self._caller.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.close()


class AsyncAdapters:
    """The registry of adapters: `client.adapters`."""

    def __init__(self, caller: _Caller) -> None:
        self._caller = caller

    async def register(
        self, adapter_id: str, source: str | PathLike[str], /, **options: Unpack[RegisterOptions]
    ) -> Adapter:
        """Registers an adapter, or a new version of it. A path means a folder on the server's machine."""
        return await self._caller.unary(_calls.register(adapter_id, source, options))

    async def get(self, adapter_id: str, /, **options: Unpack[CallOptions]) -> Adapter:
        """One adapter."""
        return await self._caller.unary(_calls.get(adapter_id, options))

    async def list(self, **options: Unpack[CallOptions]) -> AsyncIterator[Adapter]:
        """All adapters in the order of their ids, fetched page by page."""
        token, more = "", True
        while more:
            page, token = await self._caller.unary(_calls.list_page(token, options))
            for adapter in page:
                yield adapter
            more = bool(token)

    async def update(self, adapter_id: str, /, **options: Unpack[UpdateOptions]) -> Adapter:
        """Changes pin or weight."""
        return await self._caller.unary(_calls.update(adapter_id, options))

    async def delete(self, adapter_id: str, /, *, force: bool = False, **options: Unpack[CallOptions]) -> None:
        """Removes an adapter; waits for its running requests unless forced."""
        await self._caller.unary(_calls.delete(adapter_id, force, options))

    async def preload(
        self,
        adapter_id: str,
        tier: Tier | Literal["disk", "host", "device"] = Tier.DEVICE,
        /,
        **options: Unpack[CallOptions],
    ) -> Adapter:
        """Brings an adapter to a tier; returns when it is there."""
        return await self._caller.unary(_calls.preload(adapter_id, tier, options))

    def watch(self, **options: Unpack[CallOptions]) -> AsyncStream[AdapterEvent]:
        """A snapshot of the registry, SNAPSHOT_END, then every change."""
        return AsyncStream(self._caller, _calls.watch(options))


class AsyncStream(Generic[E]):
    """Events of a running call. Leaving its `async with` block, or dropping it, cancels the call."""

    def __init__(self, caller: _Caller, call: Call[E]) -> None:
        self._caller = caller
        self._call = call
        self._attempts = caller.connection.attempts(call.options, stream=True)
        self._started, self._over = False, True
        self._loop = asyncio.get_running_loop()
        self._rpc = caller.start(call, self._attempts)
        self._over = False

    def __aiter__(self) -> AsyncIterator[E]:
        return self

    async def __anext__(self) -> E:
        while not self._over:
            try:
                event = await self._rpc.read()
            except grpc.RpcError as failed:
                await self._restart(failed)
            except asyncio.CancelledError:
                # Closed by another task, or the reading task itself is cancelled.
                if not self._over:
                    raise
            else:
                if event is not grpc.aio.EOF:
                    self._started = True
                    return self._call.read(event)
                self._over = True
        raise StopAsyncIteration

    async def _restart(self, failed: grpc.RpcError) -> None:
        error = error_from(failed)
        pause = None if self._started else self._attempts.pause_after(error)
        if pause is None:
            self._over = True
            raise error from failed
        await asyncio.sleep(pause)
        self._rpc = self._caller.start(self._call, self._attempts)

    async def close(self) -> None:
        """Cancels the call, if it still runs."""
        self._over = True
        self._rpc.cancel()

    def __del__(self) -> None:
        # The call keeps itself alive, so a loop that is broken out of has to end it here.
        if not self._over and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._rpc.cancel)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.close()


class AsyncGenerationStream:
    """The pieces of an answer; after the last one, how it ended.

    Leaving its `async with` block cancels what still runs.
    """

    def __init__(self, caller: _Caller, call: Call[Delta | Completion | None]) -> None:
        self._events = AsyncStream(caller, call)
        self._answer = Answer()

    def __aiter__(self) -> AsyncIterator[Delta]:
        return self

    async def __anext__(self) -> Delta:
        async for event in self._events:
            delta = self._answer.take(event)
            if delta is not None:
                return delta
        self._answer.check_ended()
        raise StopAsyncIteration

    async def read(self) -> Generation:
        """Waits for the end and returns the whole answer."""
        async for _ in self:
            pass
        return self._answer.generation

    @property
    def completion(self) -> Completion:
        """How the answer ended; RuntimeError while it has not been read to its end."""
        return self._answer.completion

    async def close(self) -> None:
        """Cancels the call, if it still runs."""
        self._answer.left = True
        await self._events.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.close()


class _Caller:
    """Makes calls on a channel, which is opened by the first of them: only then is there surely an event loop."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self._opened = False

    @cached_property
    def _channel(self) -> grpc.aio.Channel:
        self._opened = True
        address, credentials = self.connection.address, self.connection.credentials
        if credentials:
            return grpc.aio.secure_channel(address, credentials, options=CHANNEL_OPTIONS)
        return grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS)

    @cached_property
    def _stubs(self) -> Stubs:
        return Stubs(self._channel)

    async def unary(self, call: Call[R]) -> R:
        attempts = self.connection.attempts(call.options, repeatable=call.repeatable)
        while True:
            try:
                return call.read(await self.start(call, attempts))
            except grpc.RpcError as failed:
                error = error_from(failed)
                pause = attempts.pause_after(error)
                if pause is None:
                    raise error from failed
            await asyncio.sleep(pause)

    def start(self, call: Call[Any], attempts: Attempts) -> Any:
        return call.method(self._stubs)(call.request, timeout=attempts.timeout, metadata=attempts.metadata)

    async def close(self) -> None:
        if self._opened:
            await self._channel.close()
