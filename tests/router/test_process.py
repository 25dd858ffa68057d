"""`python -m router` as a process: what it loads, how it starts and stops."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from loraplex.v1 import generation_pb2_grpc
from tests.router.fakes import FakeCache, FakeEngine, request
from tests.router.test_answers import collect

# Runs `python -m router`, and writes down what the process has loaded when it ends: all of a served request included.
RECORDER = """
import atexit, json, os, runpy, sys
def record():
    files = sorted({m.__file__ for m in list(sys.modules.values()) if str(getattr(m, "__file__", "")).endswith(".so")})
    mapped = sorted({l.split()[-1] for l in open("/proc/self/maps") if ".so" in l}) if sys.platform == "linux" else []
    json.dump({"modules": sorted(sys.modules), "extensions": files, "mapped": mapped}, open(os.environ["RECORD"], "w"))
atexit.register(record)
sys.argv = ["router", *sys.argv[1:]]
runpy.run_module("router", run_name="__main__", alter_sys=True)
"""
FORBIDDEN = {
    "torch", "triton", "transformers", "numpy", "safetensors", "tokenizers", "pydantic_core", "cryptography", "orjson", "redis",
}  # fmt: skip
# Every Rust library holds its panic machinery under this name, stripped or not: unwinding finds it by a symbol or, in
# static form, its source paths by the compiler's own build folder.
RUST_MARKS = (b"rust_eh_personality", b"/rustc/", b"rust_panic")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@asynccontextmanager
async def fakes() -> AsyncIterator[tuple[FakeEngine, FakeCache]]:
    engine, cache = FakeEngine(), FakeCache()
    await engine.start()
    await cache.start()
    try:
        yield engine, cache
    finally:
        await engine.stop()
        await cache.stop()


async def start(*arguments: str, environ: dict[str, str] | None = None) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        sys.executable, *arguments, env={**os.environ, **(environ or {})}, stderr=asyncio.subprocess.PIPE
    )


async def wait_serving(channel: grpc.aio.Channel) -> None:
    stub: Any = health_pb2_grpc.HealthStub(channel)
    async with asyncio.timeout(15):
        while True:
            answer = await stub.Check(health_pb2.HealthCheckRequest(), wait_for_ready=True)
            if answer.status == health_pb2.HealthCheckResponse.SERVING:
                return
            await asyncio.sleep(0.02)


async def test_a_router_that_has_served_has_loaded_no_torch_and_no_rust(tmp_path: Path) -> None:
    address, record = f"127.0.0.1:{free_port()}", tmp_path / "loaded.json"
    async with fakes() as (engine, cache):
        # Given a router with everything on: metrics, and traces that go nowhere
        environ = {
            "RECORD": str(record),
            "OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9",
            "OTEL_EXPORTER_OTLP_TIMEOUT": "1",
        }
        arguments = ["--listen", address, "--engines", engine.address, "--cache", cache.address]
        metrics = ["--metrics-listen", f"127.0.0.1:{free_port()}"]
        process = await start("-c", RECORDER, *arguments, *metrics, environ=environ)
        async with grpc.aio.insecure_channel(address) as channel:
            await wait_serving(channel)
            # When it has served, one stream still under way at SIGTERM
            stream = generation_pb2_grpc.GenerationServiceStub(channel).StreamGenerate(request(tokens=100))
            await stream.read()
            process.send_signal(signal.SIGTERM)
            assert (await collect(stream))[-1].completion.usage.output_tokens == 100
        # Then it ends with 0
        assert process.stderr
        log = (await asyncio.wait_for(process.stderr.read(), 20)).decode()
        assert await process.wait() == 0, log
        assert "serving on port" in log
    check_loaded(json.loads(record.read_text()))


def check_loaded(loaded: dict[str, list[str]]) -> None:
    assert "router.dispatch" in loaded["modules"] and "opentelemetry.sdk.trace" in loaded["modules"]
    assert not {name.partition(".")[0] for name in loaded["modules"]} & FORBIDDEN
    files = {Path(name) for name in loaded["extensions"] + loaded["mapped"] if Path(name).is_file()}
    assert any("cygrpc" in file.name for file in files)
    assert [file for file in files if any(mark in file.read_bytes() for mark in RUST_MARKS)] == []


def test_the_marks_find_a_rust_extension() -> None:
    import tokenizers.tokenizers as rust

    assert any(mark in Path(str(rust.__file__)).read_bytes() for mark in RUST_MARKS)


async def test_what_keeps_it_from_starting_is_one_line() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        for arguments, said in (
            (["--listen", address], address),
            (["--max-queued-requests", "0"], "max_queued_requests"),
            (["--engines", "a:1", "--engines", "a:1"], "engines"),
        ):
            process = await start("-m", "router", *arguments)
            assert process.stderr
            log = (await process.stderr.read()).decode()
            assert await process.wait() == 2
            lines = [line for line in log.splitlines() if line.startswith("router: cannot start:")]
            assert len(lines) == 1 and said in lines[0] and "Traceback" not in log
