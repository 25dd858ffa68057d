"""`loraplex up` as a process: what is wrong is one line, and a whole start serves, drains and remembers."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from launcher.layout import host_tier_of, open_layout
from loraplex import Client, NotFound
from tests.engine.tiny import make_adapter, make_model


def up(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "loraplex.cli", "up", *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def refused(*arguments: str) -> tuple[int, str]:
    """Exit code and the one line on standard error."""
    process = up(*arguments)
    _, err = process.communicate(timeout=60)
    assert "Traceback" not in err and err.count("\n") == 1, err
    return process.returncode, err


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    return folder


def test_a_port_in_use(tmp_path: Path, model: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        assert refused("--port", port, "--model", str(model), "--data-dir", str(tmp_path / "d")) == (
            1, f"loraplex up: port {port} on 127.0.0.1 is in use; choose another with --port\n",
        )  # fmt: skip


@pytest.mark.parametrize(
    "flags, code, text",
    [
        (["--model", "{tmp}/nowhere"], 1, "the model folder {tmp}/nowhere does not exist"),
        (["--model", "{tmp}"], 1, "the model folder {tmp} has no config.json"),
        (["--adapter-root", "{tmp}/nowhere"], 1, "the adapter root {tmp}/nowhere does not exist"),
        (["--adapter-root", "{tmp}/file"], 1, "the adapter root {tmp}/file is not a folder"),
        (["--data-dir", "{tmp}/file/data"], 1, "the data folder {tmp}/file/data cannot be used: Not a directory"),
        (["--host", "no.such.host.invalid"], 1, "the host no.such.host.invalid is not known"),
        (["--host", "192.0.2.1"], 1, "on 192.0.2.1 cannot be had"),
        (["--port", "-1"], 2, "--port"),
        (["--engines", "many"], 2, "--engines: 'many' is not a whole number"),
        (["--nonsense"], 2, "--nonsense"),
    ],
)
def test_what_is_wrong_is_one_line(tmp_path: Path, flags: list[str], code: int, text: str) -> None:
    (tmp_path / "file").write_text("")
    given = [flag.replace("{tmp}", str(tmp_path)) for flag in flags]
    data = [] if "--data-dir" in flags else ["--data-dir", str(tmp_path / "data")]
    got, err = refused("--port", "0", *data, *given)
    assert (got, text.replace("{tmp}", str(tmp_path)) in err) == (code, True), err


def test_a_second_instance_on_the_same_folder(tmp_path: Path, model: Path) -> None:
    layout = open_layout(tmp_path / "data")
    try:
        code, err = refused("--port", "0", "--model", str(model), "--data-dir", str(tmp_path / "data"))
        assert code == 1 and f"is used by another instance (process {os.getpid()})" in err
    finally:
        layout.close()


def test_a_model_that_cannot_be_loaded(tmp_path: Path, model: Path) -> None:
    code, err = refused("--port", "0", "--model", str(model), "--data-dir", str(tmp_path / "data"))
    assert code == 1 and err.startswith("loraplex up: engine-0: ") and str(model) in err


def test_a_long_data_folder_has_its_sockets_elsewhere(tmp_path: Path) -> None:
    long = open_layout(tmp_path / ("d" * 120))
    odd = open_layout(tmp_path / "with space%20")
    runtimes = [long.runtime, odd.runtime]
    assert all(str(runtime).startswith("/tmp/loraplex-") for runtime in runtimes)
    assert all(runtime.stat().st_mode & 0o777 == 0o700 for runtime in runtimes)
    long.close()
    odd.close()
    assert not any(runtime.exists() for runtime in runtimes)


def test_a_host_tier_that_others_could_write_to(tmp_path: Path, model: Path) -> None:
    data = tmp_path / "data"
    open_layout(data).close()
    host_tier_of(data.resolve()).chmod(0o777)
    code, err = refused("--port", "0", "--model", str(model), "--data-dir", str(data))
    assert code == 1 and "is not a folder that only this user can write to" in err


@contextmanager
def serving(*arguments: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A started stack and its address; killed at the end if it still runs."""
    process = up("--port", "0", *arguments)
    assert process.stdout and process.stderr
    try:
        for line in process.stdout:
            if "serving on" in line:
                yield process, line.partition("serving on ")[2].partition(";")[0]
                break
        else:
            pytest.fail(process.stderr.read())
    finally:
        process.kill()
        process.communicate()


def ended(process: subprocess.Popen[str]) -> list[str]:
    """Waits for the good end of a stack; returns the names of what it says has stopped."""
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, "")
    return [line.split("s  ", 1)[1].split()[0] for line in out.splitlines()]


def test_up_serves_drains_and_finds_its_adapters_again(tmp_path: Path) -> None:
    # Given a tiny model and an adapter for it
    model = make_model(tmp_path / "model", "llama")
    adapter = make_adapter(model, tmp_path / "adapters", "eight", 8, ["q_proj", "v_proj"])
    common = ("--model", str(model), "--adapter-root", str(tmp_path / "adapters"), "--data-dir", str(tmp_path / "data"))

    # When everything is started, it answers through base and adapter
    with serving(*common) as (process, address):
        with Client(address, timeout=60) as client:
            assert client.generate("The quick", max_output_tokens=8, ignore_eos=True).usage.output_tokens == 8
            digest = client.adapters.register("eight", adapter.folder).digest
            before = client.generate("The quick", adapter="eight", max_output_tokens=8, ignore_eos=True)
            assert before.adapter_digest == digest
            with pytest.raises(NotFound):
                client.generate("x", adapter="pirate")
            # And SIGTERM lets a running stream end, and stops everything in order
            stream = client.stream("The", max_output_tokens=200, ignore_eos=True)
            next(stream)
            process.send_signal(signal.SIGTERM)
            assert stream.read().usage.output_tokens == 200
        assert ended(process) == ["router", "engine-0", "cache", "store"]
    assert not list((tmp_path / "data").rglob("*.sock"))

    # Then a second start, with two engines, finds the adapter, which answers as before
    with serving(*common, "--engines", "2") as (process, address), Client(address, timeout=60) as client:
        # A router serves as soon as it has one engine; the other follows
        deadline = time.monotonic() + 10
        while client.model_info().engine_ids != ("engine-0", "engine-1"):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert [found.adapter_id for found in client.adapters.list()] == ["eight"]
        after = client.generate("The quick", adapter="eight", max_output_tokens=8, ignore_eos=True)
        assert (after.token_ids, after.adapter_digest) == (before.token_ids, digest)
        process.send_signal(signal.SIGTERM)
        assert set(ended(process)) == {"router", "engine-0", "engine-1", "cache", "store"}
