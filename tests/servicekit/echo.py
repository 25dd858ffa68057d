"""A server of one service with a call of each kind, whose handlers a test gives; messages are bytes."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import grpc
import pytest

from servicekit.server import Server

MAKERS = {
    "unary": grpc.unary_unary_rpc_method_handler,
    "stream": grpc.unary_stream_rpc_method_handler,
    "collect": grpc.stream_unary_rpc_method_handler,
    "chat": grpc.stream_stream_rpc_method_handler,
}


@dataclass(frozen=True)
class EchoServer:
    """The server and a channel to it."""

    server: Server
    channel: grpc.aio.Channel

    async def unary(self, request: bytes = b"") -> bytes:
        call: Any = self.channel.unary_unary("/test.Echo/unary")
        return bytes(await call(request))

    def stream(self, request: bytes = b"") -> Any:
        call: Any = self.channel.unary_stream("/test.Echo/stream")
        return call(request)

    async def error_of_unary(self) -> grpc.aio.AioRpcError:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await self.unary()
        return caught.value

    async def error_of_collect(self) -> grpc.aio.AioRpcError:
        call: Any = self.channel.stream_unary("/test.Echo/collect")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call(iter([b"a", b"b"]))
        return caught.value

    async def error_of_stream(self, *before: bytes) -> grpc.aio.AioRpcError:
        return await self._error_after(self.stream(), before)

    async def error_of_chat(self, *before: bytes) -> grpc.aio.AioRpcError:
        call: Any = self.channel.stream_stream("/test.Echo/chat")
        return await self._error_after(call(iter([b"a"])), before)

    async def _error_after(self, call: Any, before: tuple[bytes, ...]) -> grpc.aio.AioRpcError:
        responses = []
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            async for response in call:
                responses.append(response)
        assert tuple(responses) == before, "what was sent before the error arrives"
        return caught.value


@asynccontextmanager
async def echo_server(
    parse: Callable[[bytes], Any] | None = None, **handlers: Callable[..., Any]
) -> AsyncIterator[EchoServer]:
    """Serves test.Echo with the handlers named: unary, stream, collect, chat."""
    server = Server()
    methods: dict[str, Any] = {
        name: MAKERS[name](handler, request_deserializer=parse) for name, handler in handlers.items()
    }
    server.grpc.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test.Echo", methods),))
    await server.start("127.0.0.1:0", ["test.Echo"])
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
            yield EchoServer(server, channel)
    finally:
        await server.drain(0)
