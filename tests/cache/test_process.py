"""`python -m cache` as a process: what it says when it cannot start, and how it ends."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from cache.__main__ import NICE
from tests.cache.conftest import Store, binary_of


@pytest.fixture
def valkey(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    server = Store(binary_of("valkey"), tmp_path_factory.mktemp("s"))
    server.start()
    yield server
    server.kill()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def start(folder: Path, url: str, port: int, *flags: str, session: bool = False) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "cache", "--listen", f"127.0.0.1:{port}", "--redis", url]
    command += ["--data-dir", str(folder), "--host-tier", f"{folder}-host", *flags]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=session)


def wait_until_serving(port: int) -> None:
    deadline = time.monotonic() + 20
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)
        while True:
            try:
                answer = stub.Check(health_pb2.HealthCheckRequest(), timeout=1, wait_for_ready=True)
                assert answer.status == health_pb2.HealthCheckResponse.SERVING
                return
            except grpc.RpcError:
                assert time.monotonic() < deadline


def last_line(process: subprocess.Popen[str]) -> str:
    _, errors = process.communicate(timeout=30)
    assert "Traceback" not in errors, errors
    return errors.strip().splitlines()[-1]


def test_it_serves_refuses_a_second_one_and_drains(valkey: Store, tmp_path: Path) -> None:
    port = free_port()
    process = start(tmp_path / "data", valkey.url, port)
    try:
        wait_until_serving(port)
        second = start(tmp_path / "data", valkey.url, free_port())
        assert "another cache uses the data folder" in last_line(second) and second.returncode == 2
        taken = start(tmp_path / "other", valkey.url, port)
        assert f"cannot listen on 127.0.0.1:{port}" in last_line(taken) and taken.returncode == 2
    finally:
        process.send_signal(signal.SIGTERM)
        assert "stopping" in last_line(process)
    assert process.returncode == 0
    assert (tmp_path / "data-host").stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("session", [True, False])
def test_in_a_session_of_its_own_it_lets_the_engines_of_the_machine_go_first(
    valkey: Store, tmp_path: Path, session: bool
) -> None:
    group = Path("/proc/self/autogroup")
    if not group.exists():
        pytest.skip("this kernel does not share processors out among sessions")
    ours = group.read_text(encoding="ascii")
    process = start(tmp_path / "data", valkey.url, port := free_port(), session=session)
    try:
        wait_until_serving(port)
        theirs = Path(f"/proc/{process.pid}/autogroup").read_text(encoding="ascii")
    finally:
        process.send_signal(signal.SIGTERM)
        last_line(process)
    # A session that is not its own is left as it is.
    assert theirs.endswith(f" nice {NICE}\n") if session else theirs == ours
    assert group.read_text(encoding="ascii") == ours


def test_its_libraries_bring_no_torch_with_them() -> None:
    command = "import sys, cache.__main__; print([name for name in ('torch', 'transformers') if name in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", command], text=True).strip() == "[]"


@pytest.mark.parametrize(
    "flags, said",
    [
        (("--adapter-roots", "/nowhere"), "the adapter root /nowhere is not a folder"),
        (("--disk-mib", "0"), "disk_mib must be at least 1"),
        (("--node-id", "../x"), "node_id"),
        (("--redis", "nonsense"), "--redis nonsense"),
        (("--host-tier", "/proc/x"), "host tier cannot be used"),
    ],
)
def test_what_keeps_it_from_starting_is_said_in_one_line(tmp_path: Path, flags: tuple[str, ...], said: str) -> None:
    process = start(tmp_path / "data", "unix:///nowhere", free_port(), *flags)
    assert said in last_line(process)
    assert process.returncode == 2


def test_a_redis_that_is_not_there_is_named_without_its_password(tmp_path: Path) -> None:
    process = start(tmp_path / "data", f"redis://:secret@127.0.0.1:{free_port()}/0", free_port())
    line = last_line(process)
    assert "Redis at redis://127.0.0.1" in line and "does not answer" in line and "secret" not in line
    assert process.returncode == 2
