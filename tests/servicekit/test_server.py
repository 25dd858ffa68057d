"""Life cycle of a server: bind, health, reflection, cancel, drain; and the health check of containers."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from servicekit.errors import StartupError
from servicekit.metrics import serve_metrics
from servicekit.server import Server
from tests.servicekit.echo import EchoServer, echo_server

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
SECONDS = 10


def health_stub(channel: grpc.aio.Channel) -> Any:
    return health_pb2_grpc.HealthStub(channel)


async def answer(request: bytes, context: Any) -> bytes:
    return b"answer to " + request


async def test_a_port_in_use_is_a_startup_error_that_names_it() -> None:
    async with echo_server(unary=answer) as running:
        address = f"127.0.0.1:{running.server.port}"
        second = Server()
        with pytest.raises(StartupError, match=address):
            await second.start(address, ["test.Echo"])
        assert await running.unary(b"x") == b"answer to x"


@pytest.mark.parametrize(
    "address", ["127.0.0.1:99999", "192.0.2.1:50051", "127.0.0.1", "host:", "unix:/nowhere/at/all.sock"]
)
async def test_an_address_that_is_not_ours_is_a_startup_error(address: str) -> None:
    with pytest.raises(StartupError, match="cannot listen on"):
        await Server().start(address, ["test.Echo"])


async def test_a_unix_socket_serves(tmp_path: Path) -> None:
    server = Server()
    await server.start(f"unix:{tmp_path}/s", ["test.Echo"])
    await server.set_serving(True)
    async with grpc.aio.insecure_channel(f"unix:{tmp_path}/s") as channel:
        assert (await health_stub(channel).Check(health_pb2.HealthCheckRequest())).status == SERVING
    await server.drain(0)


@pytest.mark.parametrize("name", ["", "test.Echo"])
async def test_health_of_every_name_is_not_serving_until_told(name: str) -> None:
    async with echo_server(unary=answer) as running:
        stub = health_stub(running.channel)
        request = health_pb2.HealthCheckRequest(service=name)
        assert (await stub.Check(request)).status == NOT_SERVING
        await running.server.set_serving(True)
        assert (await stub.Check(request)).status == SERVING


async def test_health_can_be_watched_and_drain_is_seen() -> None:
    async with echo_server(unary=answer) as running:
        watch = health_stub(running.channel).Watch(health_pb2.HealthCheckRequest())
        assert (await watch.read()).status == NOT_SERVING
        await running.server.set_serving(True)
        assert (await watch.read()).status == SERVING
        drain = asyncio.create_task(running.server.drain(SECONDS))
        assert (await watch.read()).status == NOT_SERVING
        watch.cancel()
        await drain


async def test_reflection_lists_the_services() -> None:
    async with echo_server(unary=answer) as running:
        stub: Any = reflection_pb2_grpc.ServerReflectionStub(running.channel)  # type: ignore[arg-type]
        call = stub.ServerReflectionInfo(iter([reflection_pb2.ServerReflectionRequest(list_services="")]))
        names = {service.name for service in (await call.read()).list_services_response.service}
        call.cancel()
    assert {"test.Echo", "grpc.health.v1.Health"} <= names


async def test_a_client_that_goes_away_ends_its_handler_at_once() -> None:
    ended = asyncio.Event()

    async def endless(request: bytes, context: Any) -> AsyncIterator[bytes]:
        try:
            while True:
                yield b"more"
                await asyncio.sleep(0.005)
        finally:
            ended.set()

    async with echo_server(stream=endless) as running:
        call = running.stream()
        assert await call.read() == b"more"
        call.cancel()
        await asyncio.wait_for(ended.wait(), SECONDS)


async def test_drain_lets_running_calls_finish_and_takes_no_new_ones() -> None:
    started, go_on = asyncio.Event(), asyncio.Event()

    async def slow(request: bytes, context: Any) -> bytes:
        started.set()
        await go_on.wait()
        return b"finished"

    async with echo_server(unary=slow) as running:
        call = asyncio.create_task(running.unary())
        await started.wait()
        drain = asyncio.create_task(running.server.drain(SECONDS))
        await asyncio.sleep(0.1)
        async with grpc.aio.insecure_channel(f"127.0.0.1:{running.server.port}") as late:
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await EchoServer(running.server, late).unary()
        assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
        go_on.set()
        assert await call == b"finished"
        await drain


async def test_drain_ends_calls_that_outlast_the_grace() -> None:
    async def stuck(request: bytes, context: Any) -> bytes:
        await asyncio.Event().wait()
        return b""

    async with echo_server(unary=stuck) as running:
        call = asyncio.create_task(running.error_of_unary())
        await asyncio.sleep(0.1)
        await running.server.drain(0.1)
        assert (await call).code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)


@pytest.mark.parametrize("listen", ["127.0.0.1:notaport", "192.0.2.1:9", "nonsense"])
def test_metrics_on_an_address_that_is_not_ours_is_a_startup_error(listen: str) -> None:
    with pytest.raises(StartupError, match="cannot serve metrics"):
        serve_metrics(listen)


PROCESS = """
import asyncio
import sys
from servicekit.errors import StartupError
from servicekit.server import Server, run, stop_requested

async def main():
    if sys.argv[1:]:
        raise StartupError("no such model: " + sys.argv[1])
    server = Server()
    await server.start("127.0.0.1:0", [])
    stop = asyncio.create_task(stop_requested())
    await asyncio.sleep(0)
    print(server.port, flush=True)
    await stop
    await server.drain(1)

run(main, "thing")
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_process_drains_and_exits_with_0_when_it_is_told_to_stop(number: signal.Signals) -> None:
    with subprocess.Popen([sys.executable, "-c", PROCESS], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.send_signal(number)
        _, errors = process.communicate(timeout=SECONDS)
    assert (process.returncode, errors) == (0, b"")


def test_a_process_that_cannot_start_says_so_in_one_line_and_exits_with_2() -> None:
    ended = subprocess.run(
        [sys.executable, "-c", PROCESS, "/nowhere"], capture_output=True, text=True, timeout=SECONDS, check=False
    )
    assert (ended.returncode, ended.stderr) == (2, "thing: cannot start: no such model: /nowhere\n")


async def test_the_health_check_of_containers_follows_health() -> None:
    async def check(address: str) -> tuple[int | None, str]:
        command = [sys.executable, "-m", "servicekit.healthcheck", address, "--timeout", "5"]
        process = await asyncio.create_subprocess_exec(*command, stderr=asyncio.subprocess.PIPE)
        _, errors = await process.communicate()
        return process.returncode, errors.decode()

    async with echo_server(unary=answer) as running:
        address = f"127.0.0.1:{running.server.port}"
        assert await check(address) == (1, f"{address}: NOT_SERVING\n")
        await running.server.set_serving(True)
        assert await check(address) == (0, "")
    code, errors = await check(address)
    assert code == 1 and errors.startswith(f"{address}: UNAVAILABLE")
