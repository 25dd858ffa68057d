"""python -m bench.fairness.flood: what a flood by one tenant does to another, on the real stack.

A tenant sends one request at a time; another floods. Both through an engine, a router and gRPC, each a process of its
own; and the flood again through a router whose queue is first come, first served. No prompt comes twice.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from demo.base import default_base_dir, prepare_base
from loraplex import AsyncClient

PROMPT_TOKENS = 128
FLOOD_OUTPUT = (32, 96)
SINGLE_OUTPUT = 16
START_SECONDS = 180
NOWHERE = "127.0.0.1:1"


@dataclass
class Run:
    """What was seen of one run: first-token times of the single tenant, tokens and prompts of both, and how long it took."""

    first_tokens: list[float] = field(default_factory=list)
    tokens: int = 0
    prompts: int = 0
    seconds: float = 0.0

    @property
    def rate(self) -> float:
        return (self.tokens + self.prompts * PROMPT_TOKENS) / self.seconds

    @property
    def p95(self) -> float:
        return statistics.quantiles(self.first_tokens, n=20, method="inclusive")[-1]

    @property
    def median(self) -> float:
        return statistics.median(self.first_tokens)


class Load:
    """Both tenants' clients of one router."""

    def __init__(self, address: str, vocab_size: int, seed: int) -> None:
        self._rng = random.Random(seed)
        self._vocab_size = vocab_size
        self._single = AsyncClient(address, tenant="single", timeout=1200)
        self._flood = AsyncClient(address, tenant="flood", timeout=1200)

    async def quiet(self, requests: int) -> Run:
        """The single tenant alone."""
        run, began = Run(), time.perf_counter()
        for _ in range(requests):
            await self._one(run)
        run.seconds = time.perf_counter() - began
        return run

    async def flooded(self, requests: int) -> Run:
        """The single tenant while the other floods, until the flood has been answered."""
        run, began = Run(), time.perf_counter()
        flood = [
            asyncio.create_task(self._answer(self._flood, self._rng.randint(*FLOOD_OUTPUT))) for _ in range(requests)
        ]
        single = asyncio.create_task(self._go_on(run))
        counts = await asyncio.gather(*flood)
        run.seconds = time.perf_counter() - began
        single.cancel()
        run.tokens += sum(count for count, _ in counts)
        run.prompts += requests
        return run

    async def _go_on(self, run: Run) -> None:
        await asyncio.sleep(1.0)
        while True:
            await self._one(run)

    async def _one(self, run: Run) -> None:
        began = time.perf_counter()
        count, first = await self._answer(self._single, SINGLE_OUTPUT)
        run.first_tokens.append(first - began)
        run.tokens += count
        run.prompts += 1

    async def _answer(self, client: AsyncClient, tokens: int) -> tuple[int, float]:
        prompt = [self._rng.randrange(100, self._vocab_size) for _ in range(PROMPT_TOKENS)]
        count, first = 0, 0.0
        async for delta in client.stream(token_ids=prompt, max_output_tokens=tokens, ignore_eos=True):
            first = first or time.perf_counter()
            count += len(delta.token_ids)
        return count, first

    async def close(self) -> None:
        await self._single.close()
        await self._flood.close()


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(prog="python -m bench.fairness.flood")
    parser.add_argument("--requests", type=int, default=500, help="of the flood")
    parser.add_argument("--quiet-requests", type=int, default=60)
    parser.add_argument("--model", default="", help="a folder (default: the demo base)")
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    model = arguments.model or str(prepare_base(default_base_dir(), print))
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        engine, fair, fcfs = _free_ports(3)
        router = {"engines": engine, "cache": NOWHERE}
        for module, flags in (
            ("engine", {"model": model, "listen": engine, "cache": ""}),
            ("router", {"listen": fair, **router}),
            ("bench.fairness.fcfs_router", {"listen": fcfs, **router}),
        ):
            stack.enter_context(_Process(Path(folder), module, flags))
        asyncio.run(_compare(fair, fcfs, arguments))


async def _compare(fair: str, fcfs: str, arguments: argparse.Namespace) -> None:
    vocab_size = await _ready(fair)
    await _ready(fcfs)
    print(
        "| | first token p50 | p95 | p95 against quiet | tokens/s, in and out | against FCFS |\n|---|---|---|---|---|---|",
        flush=True,
    )
    runs: dict[str, Run] = {}
    for name, address, flood in (("quiet", fair, False), ("flood, FCFS", fcfs, True), ("flood, fair", fair, True)):
        load = Load(address, vocab_size, arguments.seed)
        await load.quiet(5)
        runs[name] = await (load.flooded(arguments.requests) if flood else load.quiet(arguments.quiet_requests))
        await load.close()
        await asyncio.sleep(1.0)
        _print(name, runs)


def _print(name: str, runs: dict[str, Run]) -> None:
    run, quiet, fcfs = runs[name], runs["quiet"], runs.get("flood, FCFS")
    share = f"{run.rate / fcfs.rate:.1%}" if fcfs else ""
    times = f"{1e3 * run.median:.0f} ms | {1e3 * run.p95:.0f} ms | {run.p95 / quiet.p95:.2f}"
    print(f"| {name} ({len(run.first_tokens)} answers) | {times} | {run.rate:.0f} | {share} |", flush=True)


async def _ready(address: str) -> int:
    deadline = time.monotonic() + START_SECONDS
    async with AsyncClient(address) as client:
        while True:
            try:
                return (await client.model_info(timeout=1)).vocab_size
            except Exception:
                if time.monotonic() > deadline:
                    raise
                await asyncio.sleep(0.5)


class _Process:
    """A service as a child; stopped on leaving."""

    def __init__(self, folder: Path, module: str, flags: dict[str, str]) -> None:
        command = [sys.executable, "-m", module]
        for name, value in flags.items():
            command += [f"--{name}", value]
        self._log = (folder / f"{module}.log").open("wb")
        self._process = subprocess.Popen(command, stdout=self._log, stderr=self._log, stdin=subprocess.DEVNULL)

    def __enter__(self) -> _Process:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        try:
            self._process.wait(40)
        except subprocess.TimeoutExpired:
            self._process.kill()
        self._log.close()


def _free_ports(count: int) -> list[str]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [f"127.0.0.1:{one.getsockname()[1]}" for one in sockets]


if __name__ == "__main__":
    main()
