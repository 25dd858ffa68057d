"""python -m bench.residency.live: what it costs when the adapters asked for are twice what the device holds, whole stack.

Two stacks run side by side, each with router, cache and engine: one whose device holds every adapter, one whose device holds
half of them. They take turns with the same requests, uniform over the adapters at random moments, so that whatever else the
machine does meets both. Adapters are in the HOST tier when it begins, as after any first use.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
import time
from contextlib import AsyncExitStack

import torch

from bench.engine.stack import Stack
from bench.engine.workload import prompts
from demo.base import default_base_dir, prepare_base
from engine.config import Settings
from engine.model import load_base

MIB = 1 << 20


def main() -> None:
    """Prints one table."""
    arguments = _parse()
    model = arguments.model or str(prepare_base(default_base_dir(), print))
    base = load_base(Settings(model=model, threads=1))
    number_bytes = getattr(torch, base.dtype).itemsize
    bytes_each = sum(arguments.rank * (t.in_features + t.out_features) * number_bytes for t in base.targets)
    every = -(-arguments.adapters * bytes_each // MIB)
    variables = {"LORAPLEX_ENGINE_THREADS": str(arguments.threads)}
    rooms = {"all resident": every, "half resident": every // 2}
    stacks = {
        name: Stack(
            model, base.targets, arguments.adapters, arguments.rank,
            variables | {"LORAPLEX_ENGINE_ADAPTER_MEMORY_MIB": str(room)}, preload="host",
        )
        for name, room in rooms.items()
    }  # fmt: skip
    asyncio.run(_measure(stacks, arguments))


async def _measure(stacks: dict[str, Stack], arguments: argparse.Namespace) -> None:
    waits: dict[str, list[float]] = {name: [] for name in stacks}
    async with AsyncExitStack() as running:
        for stack in stacks.values():
            await running.enter_async_context(stack)
        for number in range(arguments.rounds + 1):
            for name, stack in stacks.items():
                found = await _round(stack, number, arguments)
                # The first round warms up: caches, pages, and the adapters of the one that can hold them all.
                waits[name] += found if number else []
    print(f"\n{arguments.adapters} adapters of rank {arguments.rank}, {arguments.per_second:g} requests per second\n")
    print("| | requests | first token ms, median | p90 | p99 | mean |\n|---|---|---|---|---|---|")
    reference = waits["all resident"]
    for name, found in waits.items():
        cells = [
            f"{1e3 * value:.0f} ({value / other:.2f}x)"
            for value, other in zip(_figures(found), _figures(reference), strict=True)
        ]
        print(f"| {name} | {len(found)} | {' | '.join(cells)} |")


def _figures(waits: list[float]) -> list[float]:
    cuts = statistics.quantiles(waits, n=100)
    return [statistics.median(waits), cuts[89], cuts[98], statistics.fmean(waits)]


async def _round(stack: Stack, number: int, arguments: argparse.Namespace) -> list[float]:
    """Requests at random moments; their seconds to the first token. The warm-up asks for every adapter once."""
    rng = random.Random(number)
    count = arguments.requests if number else arguments.adapters
    texts = prompts(count, stack.vocab_size, number)
    texts = [text[: arguments.prompt_tokens] for text in texts]

    async def one(prompt: list[int], adapter: int) -> float:
        began = time.perf_counter()
        times = await stack.ask(prompt, adapter, arguments.output_tokens)
        return times[0] - began

    asked = []
    for place, text in enumerate(texts):
        adapter = rng.randrange(arguments.adapters) if number else place
        asked.append(asyncio.create_task(one(text, adapter)))
        await asyncio.sleep(rng.expovariate(arguments.per_second))
    return list(await asyncio.gather(*asked))


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.residency.live", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="", help="a folder or hub id (default: the demo base)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--adapters", type=int, default=50)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--requests", type=int, default=100, help="of each stack in each round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--per-second", type=float, default=3.0)
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--output-tokens", type=int, default=16)
    return parser.parse_args()


if __name__ == "__main__":
    main()
