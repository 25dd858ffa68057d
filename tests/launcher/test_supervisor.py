"""The supervisor over real processes: small programs that answer PING, as the store does."""

from __future__ import annotations

import asyncio
import io
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from launcher.errors import CannotStart, GaveUp
from launcher.layout import Layout, open_layout
from launcher.plan import Service
from launcher.progress import Progress
from launcher.restart import RestartPolicy
from launcher.supervisor import Supervisor

PONG = """
import os, signal, socket, sys
signal.signal(signal.SIGTERM, lambda *_: (print('drained', flush=True), sys.exit(0)))
print('I am', os.getpid(), flush=True)
listener = socket.socket(socket.AF_UNIX)
listener.bind(sys.argv[1])
listener.listen()
while True:
    connection, _ = listener.accept()
    connection.recv(64)
    connection.sendall(b'+PONG\\r\\n')
    connection.close()
"""
QUICK = RestartPolicy(first_delay=0.05, longest_delay=0.1, patience=2)


@pytest.fixture
def layout(tmp_path: Path) -> Iterator[Layout]:
    layout = open_layout(tmp_path / "data")
    yield layout
    layout.close()


def service(layout: Layout, name: str, stage: int, program: str = PONG, needs: tuple[str, ...] = ()) -> Service:
    path = str(layout.socket(name))
    return Service(name, (sys.executable, "-S", "-c", program, path), path, stage, needs)


def process_id(layout: Layout, name: str) -> int:
    said = [line for line in layout.log(name).read_text().splitlines() if line.startswith("I am")]
    return int(said[-1].split()[-1])


async def until(condition: Callable[[], bool], seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.01)


def exists(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    # A process that has ended stays visible until its parent, or whoever took it over, has asked for its exit code.
    return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"


async def test_services_start_in_order_and_stop_in_the_other_order(layout: Layout) -> None:
    out = io.StringIO()
    services = [service(layout, "store", 1), service(layout, "router", 0, needs=("store",))]
    supervisor = Supervisor(services, layout, Progress(out))
    running = asyncio.create_task(supervisor.run())
    await asyncio.wait_for(supervisor.ready.wait(), 10)
    supervisor.stop()
    await asyncio.wait_for(running, 10)
    events = [line.split("s  ", 1)[1].split(" after")[0].split() for line in out.getvalue().splitlines()]
    assert events == [
        ["store", "starting"], ["store", "ready"], ["router", "starting"], ["router", "ready"],
        ["router", "stopped"], ["store", "stopped"],
    ]  # fmt: skip
    assert all("drained" in layout.log(name).read_text() for name in ("store", "router"))


async def test_a_service_that_dies_is_started_again_and_given_up_in_the_end(layout: Layout) -> None:
    out = io.StringIO()
    supervisor = Supervisor([service(layout, "router", 0)], layout, Progress(out), QUICK)
    running = asyncio.create_task(supervisor.run())
    await asyncio.wait_for(supervisor.ready.wait(), 10)
    for ready in (1, 2, 3):
        await until(lambda ready=ready: out.getvalue().count("ready after") == ready)  # type: ignore[misc]
        os.kill(process_id(layout, "router"), signal.SIGKILL)
    with pytest.raises(GaveUp, match="router keeps dying, the last time was ended by SIGKILL"):
        await asyncio.wait_for(running, 10)
    assert out.getvalue().count("router was ended by SIGKILL; starting it again in") == 2


async def test_a_service_that_cannot_start_says_why_and_the_others_are_stopped(layout: Layout) -> None:
    broken = (
        "import sys; sys.stderr.write('2026 I engine: hello\\nengine: cannot start: no such model\\n'); sys.exit(2)"
    )
    services = [service(layout, "store", 1), service(layout, "engine", 0, broken, ("store",))]
    with pytest.raises(CannotStart, match=r"^engine: no such model \(log: .*engine.log\)$"):
        await asyncio.wait_for(Supervisor(services, layout, Progress(io.StringIO())).run(), 10)
    assert not exists(process_id(layout, "store"))


async def test_stopping_during_the_start_stops_what_has_started(layout: Layout) -> None:
    never = PONG.replace("listener.listen()", "import time; time.sleep(60)")
    services = [service(layout, "store", 1), service(layout, "engine", 0, never, ("store",))]
    supervisor = Supervisor(services, layout, Progress(io.StringIO()))
    running = asyncio.create_task(supervisor.run())
    await until(lambda: layout.log("engine").exists() and "I am" in layout.log("engine").read_text())
    supervisor.stop()
    await asyncio.wait_for(running, 10)
    assert not any(exists(process_id(layout, name)) for name in ("store", "engine"))


async def test_asked_twice_it_ends_at_once(layout: Layout) -> None:
    stubborn = PONG.replace("(print('drained', flush=True), sys.exit(0))", "print('no', flush=True)")
    supervisor = Supervisor([service(layout, "router", 0, stubborn)], layout, Progress(io.StringIO()))
    running = asyncio.create_task(supervisor.run())
    await asyncio.wait_for(supervisor.ready.wait(), 10)
    supervisor.stop()
    await until(lambda: "no" in layout.log("router").read_text())
    supervisor.stop()
    await asyncio.wait_for(running, 5)
    assert not exists(process_id(layout, "router"))


LAUNCHER_OF_A_STORE = """
import asyncio, io, sys
from pathlib import Path
from launcher.checks import store_binary
from launcher.layout import open_layout
from launcher.options import parse_options
from launcher.plan import Machine, plan_services
from launcher.progress import Progress
from launcher.supervisor import Supervisor
options = parse_options(["--data-dir", sys.argv[1]], {})
layout = open_layout(options.data_dir)
store = plan_services(options, layout, Machine(1), "", store_binary(options))[:1]
asyncio.run(Supervisor(store, layout, Progress(sys.stdout)).run())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends a process with its parent")
def test_the_embedded_store_dies_with_a_killed_launcher_and_frees_the_folder(tmp_path: Path) -> None:
    data = tmp_path / "data"
    command = [sys.executable, "-c", LAUNCHER_OF_A_STORE, str(data)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as launcher:
        assert launcher.stdout
        while "ready" not in launcher.stdout.readline():
            assert launcher.poll() is None
        children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
        stores = [pid for pid in children if "valkey" in Path(f"/proc/{pid}/cmdline").read_text()]
        assert len(stores) == 1
        # The folder is taken as long as the launcher lives
        with pytest.raises(CannotStart, match=f"used by another instance \\(process {launcher.pid}\\)"):
            open_layout(data)
        launcher.send_signal(signal.SIGKILL)
    # And free as soon as the last of its children has gone
    open_layout(data).close()
    assert not exists(int(stores[0]))
