"""`python -m engine` as people start it: readiness, a clear word when it cannot start, a clean end."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from loraplex.engine.v1 import engine_pb2 as wire
from loraplex.engine.v1 import engine_pb2_grpc
from loraplex.v1 import generation_pb2 as public


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def start(*flags: str) -> subprocess.Popen[str]:
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("LORAPLEX_", "OTEL_"))}
    return subprocess.Popen(
        [sys.executable, "-m", "engine", *flags], stderr=subprocess.PIPE, text=True, env=environment
    )


def last_words(process: subprocess.Popen[str]) -> str:
    """What a process that ends by itself wrote."""
    try:
        return process.communicate(timeout=60)[1]
    finally:
        process.kill()
        process.communicate()


def wait_until_serving(channel: grpc.Channel) -> None:
    stub: Any = health_pb2_grpc.HealthStub(channel)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            if stub.Check(health_pb2.HealthCheckRequest()).status == health_pb2.HealthCheckResponse.SERVING:
                return
        except grpc.RpcError:
            pass
        time.sleep(0.2)
    pytest.fail("the engine never served")


def test_it_serves_and_lets_a_running_sequence_finish_when_told_to_stop(tiny_model: Callable[[str], Path]) -> None:
    port = free_port()
    process = start(
        "--model", str(tiny_model("llama")), "--listen", f"127.0.0.1:{port}", "--cache", "", "--threads", "1"
    )
    try:
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            wait_until_serving(channel)
            request = public.GenerateRequest(
                text="The quick", stopping=public.StoppingParams(max_output_tokens=200, ignore_eos=True)
            )
            submit = wire.DispatchRequest(submit=wire.SubmitSequence(sequence_id=1, request=request))

            def requests() -> Iterator[wire.DispatchRequest]:
                yield submit
                while process.poll() is None:
                    time.sleep(0.05)

            responses = engine_pb2_grpc.EngineServiceStub(channel).Dispatch(requests())
            outputs: list[wire.SequenceOutput] = []
            for response in responses:
                outputs += response.frame.outputs
                if len(outputs) == 1 and response.frame.outputs:
                    process.send_signal(signal.SIGTERM)
            # The stream ended by itself, with everything in it
            assert outputs[-1].finished.output_tokens == 200
        assert process.wait(20) == 0
        assert "Traceback" not in process.communicate(timeout=5)[1]
    finally:
        process.kill()
        process.communicate()


def test_an_address_in_use_is_found_before_the_base_is_loaded(tiny_model: Callable[[str], Path]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        process = start("--model", str(tiny_model("llama")), "--listen", address)
        said = last_words(process)
    assert process.returncode == 2
    assert f"cannot listen on {address}" in said
    assert "loading base" not in said and "Traceback" not in said


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--model", "/no/such/model"], "engine: cannot start: the model folder /no/such/model does not exist"),
        (["--dtype", "int4"], "dtype must be one of"),
        (["--step-tokens", "4"], "step_tokens must be at least max_sequences"),
    ],
)
def test_a_start_that_cannot_be_is_one_line(flags: list[str], says: str) -> None:
    process = start("--listen", f"127.0.0.1:{free_port()}", *flags)
    said = last_words(process)
    assert process.returncode == 2
    assert says in said and "Traceback" not in said
