"""Whether a service answers: PING for the store, gRPC health for the others."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from launcher.plan import Service

INTERVAL = 0.05
_ANSWER_SECONDS = 5.0
_CHANNEL_OPTIONS = (
    ("grpc.enable_http_proxy", 0),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 300),
)


async def until_ready(service: Service) -> None:
    """Returns when the service answers that it serves; asks for as long as it takes."""
    if service.is_store:
        await _until(lambda: _pongs(service.address))
        return
    async with grpc.aio.insecure_channel(service.address, options=_CHANNEL_OPTIONS) as channel:
        # The stub of the package has no types.
        health: Any = health_pb2_grpc.HealthStub(channel)
        await _until(lambda: _serves(health))


async def _until(condition: Callable[[], Awaitable[bool]]) -> None:
    while not await condition():  # noqa: ASYNC110 - nobody here could set an event
        await asyncio.sleep(INTERVAL)


async def _serves(health: Any) -> bool:
    try:
        response = await health.Check(health_pb2.HealthCheckRequest(), timeout=_ANSWER_SECONDS)
    except grpc.aio.AioRpcError:
        return False
    return bool(response.status == health_pb2.HealthCheckResponse.SERVING)


async def _pongs(path: str) -> bool:
    """A store that still reads its file answers, but not with PONG."""
    try:
        reader, writer = await asyncio.open_unix_connection(path)
    except OSError:
        return False
    try:
        writer.write(b"PING\r\n")
        return await asyncio.wait_for(reader.readline(), _ANSWER_SECONDS) == b"+PONG\r\n"
    except (OSError, TimeoutError):
        return False
    finally:
        writer.close()
