"""kill -9 of one of two engines while fifty streams run: every stream ends as if nothing had happened.

Once here; LORAPLEX_TEST_KILLS=20 python -m pytest tests/e2e/test_engines_killed.py does it twenty times.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import pytest

from loraplex.v1 import generation_pb2, generation_pb2_grpc
from router.__main__ import Router
from router.config import Settings
from tests.engine.tiny import make_model
from tests.router.fakes import FakeCache, until

KILLS = int(os.environ.get("LORAPLEX_TEST_KILLS", "1"))
STREAMS = 50
TOKENS = 100


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass
class Engines:
    """Two engines as processes."""

    model: Path
    log: Path
    ports: list[int] = field(default_factory=lambda: [free_port(), free_port()])
    processes: dict[int, asyncio.subprocess.Process] = field(default_factory=dict)

    async def start(self, number: int, *flags: str) -> None:
        with self.log.open("ab") as log:
            self.processes[number] = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "engine", "--model", str(self.model), "--cache", "", "--threads", "1",
                "--listen", f"127.0.0.1:{self.ports[number]}", "--engine-id", f"engine-{number}", *flags, stderr=log,
            )  # fmt: skip

    async def kill(self, number: int, how: int = signal.SIGKILL) -> int:
        process = self.processes.pop(number)
        process.send_signal(how)
        return await process.wait()


@dataclass
class Setup:
    engines: Engines
    router: Router
    stub: Any

    async def ready(self) -> None:
        await until(lambda: len(self.router.fleet.engines) == 2, 120)


@asynccontextmanager
async def setup(folder: Path, *flags: str, **settings: Any) -> AsyncIterator[Setup]:
    engines = Engines(make_model(folder / "tiny", "llama"), folder / "engines.log")
    for number in (0, 1):
        await engines.start(number, *flags)
    cache = FakeCache()
    await cache.start()
    addresses = tuple(f"127.0.0.1:{port}" for port in engines.ports)
    router = Router(Settings(listen="127.0.0.1:0", engines=addresses, cache=cache.address, **settings), "router")
    stop = asyncio.Event()

    async def stopped() -> None:
        await stop.wait()

    task = asyncio.create_task(router.run(stopped()))
    await until(lambda: router.server.port > 0)
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{router.server.port}") as channel:
            made = Setup(engines, router, generation_pb2_grpc.GenerationServiceStub(channel))
            await made.ready()
            yield made
    finally:
        stop.set()
        await asyncio.wait_for(task, 60)
        for number in list(engines.processes):
            await engines.kill(number)
        await cache.stop()


def request(number: int) -> generation_pb2.GenerateRequest:
    """Greedy and sampled, with and without penalties and stop strings, short prompts and long ones."""
    sampling = generation_pb2.SamplingParams()
    if number % 2:
        sampling = generation_pb2.SamplingParams(temperature=1.5, top_p=0.95, seed=number)
    if number % 5 == 0:
        sampling.repetition_penalty, sampling.presence_penalty = 1.2, 0.3
    stopping = generation_pb2.StoppingParams(max_output_tokens=TOKENS, ignore_eos=True)
    if number % 7 == 0:
        stopping.stop.append("zebra")
    return generation_pb2.GenerateRequest(
        text="The quick brown fox " * (1 + number % 4), sampling=sampling, stopping=stopping
    )


@dataclass
class Answer:
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    completion: generation_pb2.Completion | None = None


async def read(stub: Any, number: int, answer: Answer) -> None:
    async for event in stub.StreamGenerate(request(number), timeout=200):
        answer.text += event.delta.text
        answer.token_ids += event.delta.token_ids
        if event.HasField("completion"):
            answer.completion = event.completion


async def run(stub: Any, disturb: Any = None) -> list[Answer]:
    answers = [Answer() for _ in range(STREAMS)]
    tasks = [asyncio.create_task(read(stub, number, answer)) for number, answer in enumerate(answers)]
    if disturb:
        await disturb(answers)
    await asyncio.gather(*tasks)
    return answers


def check(found: list[Answer], expected: list[Answer]) -> int:
    """All equal; returns how many were moved."""
    for one, other in zip(found, expected, strict=True):
        assert one.completion and other.completion
        assert (one.text, one.token_ids) == (other.text, other.token_ids)
        assert (one.completion.finish_reason, one.completion.stop_match) == (
            other.completion.finish_reason, other.completion.stop_match
        )  # fmt: skip
        usage, undisturbed = one.completion.usage, other.completion.usage
        assert (usage.prompt_tokens, usage.output_tokens) == (undisturbed.prompt_tokens, undisturbed.output_tokens)
        # Charged for the prompt once, and for the answer once
        charge = usage.prompt_tokens - usage.cached_prompt_tokens + 2 * usage.output_tokens
        assert one.completion.receipt.charge == charge
    return sum(one.completion.receipt.migrations for one in found if one.completion)


def half_way(answers: list[Answer], share: float) -> bool:
    """Whether this share of the tokens of the streams that run has come, and every place of both engines is taken."""
    return sum(len(answer.token_ids) for answer in answers) > share * STREAMS * TOKENS


@pytest.mark.timeout(60 + 60 * KILLS)
async def test_streams_go_on_as_if_nothing_had_happened(tmp_path: Path) -> None:
    chance = random.Random(3)
    async with setup(tmp_path, "--max-sequences", "32") as running:
        undisturbed = await run(running.stub)
        for kill in range(KILLS):
            victim, share = kill % 2, chance.uniform(0.05, 0.5)

            async def disturb(answers: list[Answer], victim: int = victim, share: float = share) -> None:
                await until(lambda: half_way(answers, share), 60)
                await running.engines.kill(victim)

            moved = check(await run(running.stub, disturb), undisturbed)
            assert moved > 0
            sys.stderr.write(f"kill {kill + 1}: {moved} of {STREAMS} streams moved at {share:.0%}\n")
            await running.engines.start(victim)
            await running.ready()


async def test_a_rolling_restart_and_a_hanging_engine_are_not_noticed(tmp_path: Path) -> None:
    async with setup(tmp_path, "--drain-seconds", "1", engine_silence_seconds=4.0) as running:
        undisturbed = await run(running.stub)

        # Given an engine is told to end, with less time than its streams may need
        async def drain(answers: list[Answer]) -> None:
            await until(lambda: half_way(answers, 0.1), 60)
            assert await running.engines.kill(0, signal.SIGTERM) == 0

        check(await run(running.stub, drain), undisturbed)
        await running.engines.start(0)
        await running.ready()

        # And one stops where it stands
        async def freeze(answers: list[Answer]) -> None:
            await until(lambda: half_way(answers, 0.1), 60)
            running.engines.processes[1].send_signal(signal.SIGSTOP)

        assert check(await run(running.stub, freeze), undisturbed) > 0
        running.engines.processes[1].send_signal(signal.SIGCONT)
        await running.ready()
