"""The client for ordinary, synchronous code. `aio.py` is its twin for asyncio."""

from __future__ import annotations

import time
from collections.abc import Iterator
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


class Client:
    """A connection to a Loraplex server; safe to share between threads. Close it, or use it in a `with`.

        with Client() as client:
            answer = client.generate(messages="What is the capital of Canada?", adapter="pirate")
            print(answer.text, answer.usage.output_tokens)
            for delta in client.stream(messages="And of France?", max_output_tokens=40):
                print(delta.text, end="", flush=True)

    Args:
        address: "host:port" or "unix:/path".
        tenant: whom the requests are charged to; empty is the server's default.
        token: sent as `authorization: Bearer ...`.
        timeout: seconds for calls that are given none; streams have none unless given.
        tls: True for the system's root certificates, or credentials of grpc; False is plaintext.
        retry: how UNAVAILABLE is retried.

    Calls raise the errors of `loraplex.errors`; arguments that cannot be sent raise TypeError or ValueError.
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
        connection = Connection(address, tenant, token, timeout, tls, retry)
        credentials = connection.credentials
        self._channel = (
            grpc.secure_channel(address, credentials, options=CHANNEL_OPTIONS)
            if credentials
            else grpc.insecure_channel(address, options=CHANNEL_OPTIONS)
        )
        self._caller = _Caller(connection, Stubs(self._channel))
        self.adapters = Adapters(self._caller)

    def generate(self, text: str | None = None, /, **options: Unpack[GenerateOptions]) -> Generation:
        """Answers one prompt: a text taken as it is, or `messages=` for a conversation; see GenerateOptions."""
        return self._caller.unary(_calls.generate(text, options))

    def stream(self, text: str | None = None, /, **options: Unpack[GenerateOptions]) -> GenerationStream:
        """Answers one prompt piece by piece; arguments as `generate`."""
        return GenerationStream(self._caller, _calls.stream(text, options))

    def tokenize(self, text: str | None = None, /, **options: Unpack[PromptOptions]) -> Tokenization:
        """The token ids of a prompt, exactly as generation would see them."""
        return self._caller.unary(_calls.tokenize(text, options))

    def model_info(self, **options: Unpack[CallOptions]) -> ModelInfo:
        """The base model and the limits of a request."""
        return self._caller.unary(_calls.model_info(options))

    def close(self) -> None:
        """Ends running calls and closes the connection."""
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


class Adapters:
    """The registry of adapters: `client.adapters`."""

    def __init__(self, caller: _Caller) -> None:
        self._caller = caller

    def register(self, adapter_id: str, source: str | PathLike[str], /, **options: Unpack[RegisterOptions]) -> Adapter:
        """Registers an adapter, or a new version of it. A path means a folder on the server's machine."""
        return self._caller.unary(_calls.register(adapter_id, source, options))

    def get(self, adapter_id: str, /, **options: Unpack[CallOptions]) -> Adapter:
        """One adapter."""
        return self._caller.unary(_calls.get(adapter_id, options))

    def list(self, **options: Unpack[CallOptions]) -> Iterator[Adapter]:
        """All adapters in the order of their ids, fetched page by page."""
        token, more = "", True
        while more:
            page, token = self._caller.unary(_calls.list_page(token, options))
            yield from page
            more = bool(token)

    def update(self, adapter_id: str, /, **options: Unpack[UpdateOptions]) -> Adapter:
        """Changes pin or weight."""
        return self._caller.unary(_calls.update(adapter_id, options))

    def delete(self, adapter_id: str, /, *, force: bool = False, **options: Unpack[CallOptions]) -> None:
        """Removes an adapter; waits for its running requests unless forced."""
        self._caller.unary(_calls.delete(adapter_id, force, options))

    def preload(
        self,
        adapter_id: str,
        tier: Tier | Literal["disk", "host", "device"] = Tier.DEVICE,
        /,
        **options: Unpack[CallOptions],
    ) -> Adapter:
        """Brings an adapter to a tier; returns when it is there."""
        return self._caller.unary(_calls.preload(adapter_id, tier, options))

    def watch(self, **options: Unpack[CallOptions]) -> Stream[AdapterEvent]:
        """A snapshot of the registry, SNAPSHOT_END, then every change."""
        return Stream(self._caller, _calls.watch(options))


class Stream(Generic[E]):
    """Events of a running call. Leaving its `with` block, or dropping it, cancels the call."""

    def __init__(self, caller: _Caller, call: Call[E]) -> None:
        self._caller = caller
        self._call = call
        self._attempts = caller.connection.attempts(call.options, stream=True)
        self._started = self._over = False
        self._rpc = caller.start(call, self._attempts)

    def __iter__(self) -> Iterator[E]:
        return self

    def __next__(self) -> E:
        while not self._over:
            try:
                event = next(self._rpc)
            except StopIteration:
                self._over = True
            except grpc.RpcError as failed:
                if not self._over:
                    self._restart(failed)
            else:
                self._started = True
                return self._call.read(event)
        raise StopIteration

    def _restart(self, failed: grpc.RpcError) -> None:
        error = error_from(failed)
        pause = None if self._started else self._attempts.pause_after(error)
        if pause is None:
            self._over = True
            raise error from failed
        time.sleep(pause)
        self._rpc = self._caller.start(self._call, self._attempts)

    def close(self) -> None:
        """Cancels the call, if it still runs."""
        self._over = True
        self._rpc.cancel()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


class GenerationStream:
    """The pieces of an answer; after the last one, how it ended. Leaving its `with` block cancels what still runs."""

    def __init__(self, caller: _Caller, call: Call[Delta | Completion | None]) -> None:
        self._events = Stream(caller, call)
        self._answer = Answer()

    def __iter__(self) -> Iterator[Delta]:
        return self

    def __next__(self) -> Delta:
        for event in self._events:
            delta = self._answer.take(event)
            if delta is not None:
                return delta
        self._answer.check_ended()
        raise StopIteration

    def read(self) -> Generation:
        """Waits for the end and returns the whole answer."""
        for _ in self:
            pass
        return self._answer.generation

    @property
    def completion(self) -> Completion:
        """How the answer ended; RuntimeError while it has not been read to its end."""
        return self._answer.completion

    def close(self) -> None:
        """Cancels the call, if it still runs."""
        self._answer.left = True
        self._events.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


class _Caller:
    """Makes calls on a channel."""

    def __init__(self, connection: Connection, stubs: Stubs) -> None:
        self.connection = connection
        self._stubs = stubs

    def unary(self, call: Call[R]) -> R:
        attempts = self.connection.attempts(call.options, repeatable=call.repeatable)
        while True:
            try:
                return call.read(self.start(call, attempts))
            except grpc.RpcError as failed:
                error = error_from(failed)
                pause = attempts.pause_after(error)
                if pause is None:
                    raise error from failed
            time.sleep(pause)

    def start(self, call: Call[Any], attempts: Attempts) -> Any:
        return call.method(self._stubs)(call.request, timeout=attempts.timeout, metadata=attempts.metadata)
