"""Life cycle of a service process: bind, serve health and reflection, drain on SIGTERM or SIGINT, exit.

async def main() -> None: ...
run(main, "router")
"""

from __future__ import annotations

import asyncio
import logging
import signal
import sys
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

import grpc
import uvloop
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from servicekit.errors import StartupError
from servicekit.status import ErrorInterceptor
from servicekit.tracing import shutdown_tracing

_log = logging.getLogger(__name__)

# Prompts are text: 16 MiB holds any context, and bounds what a stranger can make us allocate.
MAX_MESSAGE_BYTES = 16 * 1024 * 1024
# RPCs that have arrived and that Python has not seen yet. From 1000 on, gRPC's default is to end some of them at random
# with a bare CANCELLED; in a burst it is our own limits that should speak, with a reason and a retry delay.
MAX_PENDING_RPCS = 65536


class Server:
    """A grpc.aio server with health, reflection and our error statuses.

    Attributes:
        port: the port in use once `start` has returned; 0 for a Unix socket.
    """

    def __init__(self, interceptors: Sequence[grpc.aio.ServerInterceptor] = ()) -> None:
        self.grpc = grpc.aio.server(
            interceptors=[*interceptors, ErrorInterceptor()],
            options=[
                ("grpc.so_reuseport", 0),
                ("grpc.server.max_pending_requests", MAX_PENDING_RPCS),
                ("grpc.server.max_pending_requests_hard_limit", MAX_PENDING_RPCS),
                ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
                ("grpc.keepalive_permit_without_calls", 1),
                ("grpc.http2.min_ping_interval_without_data_ms", 5000),
            ],
        )
        self.health = health.aio.HealthServicer()
        self.port = 0
        health_pb2_grpc.add_HealthServicer_to_server(self.health, self.grpc)

    async def start(self, listen: str, service_names: Sequence[str]) -> None:
        """Binds and serves, with health NOT_SERVING; raises StartupError when the address cannot be bound."""
        self._service_names = ["", *service_names]
        await self.set_serving(False)
        reflection.enable_server_reflection(
            [*service_names, health_pb2.DESCRIPTOR.services_by_name["Health"].full_name, reflection.SERVICE_NAME],
            self.grpc,
        )
        _check(listen)
        try:
            self.port = self.grpc.add_insecure_port(listen)
        except RuntimeError:
            self.port = -1
        if self.port <= 0 and not (listen.startswith("unix:") and self.port >= 0):
            raise StartupError(f"cannot listen on {listen}: the address is in use or not ours")
        await self.grpc.start()

    async def set_serving(self, serving: bool) -> None:
        """Health of every service: SERVING only while a request would be answered."""
        state = health_pb2.HealthCheckResponse.SERVING if serving else health_pb2.HealthCheckResponse.NOT_SERVING
        for name in self._service_names:
            await self.health.set(name, state)

    async def drain(self, grace: float) -> None:
        """Refuses new RPCs, waits `grace` seconds at most for running ones, then ends them."""
        await self.health.enter_graceful_shutdown()
        await self.grpc.stop(grace)


def _check(listen: str) -> None:
    # gRPC takes the port modulo 65536, and makes one up when there is none.
    port = listen.rpartition(":")[2]
    if not listen.startswith("unix:") and not (port.isascii() and port.isdigit() and int(port) <= 65535):
        raise StartupError(f"cannot listen on {listen}: it must end with a port from 0 to 65535")


async def stop_requested() -> None:
    """Returns when SIGTERM or SIGINT arrives. A second signal ends the process at once."""
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()

    def on_signal() -> None:
        if stop.is_set():
            sys.exit(1)
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal)
    await stop.wait()


def run(main: Callable[[], Coroutine[Any, Any, None]], service: str) -> None:
    """Runs a service's main on one uvloop; a StartupError becomes one line on standard error and exit code 2."""
    logging.basicConfig(
        level=logging.INFO, format=f"%(asctime)s %(levelname).1s {service} %(name)s: %(message)s", stream=sys.stderr
    )
    try:
        uvloop.run(main())
    except StartupError as error:
        sys.stderr.write(f"{service}: cannot start: {error}\n")
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    finally:
        shutdown_tracing()
