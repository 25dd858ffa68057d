"""A registered adapter whose download hangs: what it does to the others' latency. python -m bench.router.hang

One engine of 8 places over real gRPC, with a cache that never brings one adapter; eight clients ask for an adapter that is
there, one request after the other, while twenty clients wait for the one that is not. With and without those twenty, in
turns; p50 and p99 of the whole request.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from typing import Any

import uvloop

from tests.router.fakes import FakeEngine, adapter, request, running

TURNS = 5
SECONDS = 4.0


async def client(stub: Any, took: list[float], until: float) -> None:
    while time.monotonic() < until:
        began = time.monotonic()
        await stub.Generate(request("w", "warm", tokens=10), timeout=60)
        took.append(time.monotonic() - began)


async def main() -> None:
    engine = FakeEngine(max_sequences=8, starts=lambda submission: submission.adapter_digest != "digest-hangs")
    found: dict[bool, list[float]] = {False: [], True: []}
    worst: dict[bool, list[float]] = {False: [], True: []}
    async with running(adapter("hangs"), adapter("warm", engines=("engine-0",)), engines=[engine]) as r:
        for turn in range(2 * TURNS):
            hangs = bool(turn % 2)
            waiting = [r.generation.Generate(request("c", "hangs")) for _ in range(20 * hangs)]
            await asyncio.sleep(0.2)
            took: list[float] = []
            until = time.monotonic() + SECONDS
            await asyncio.gather(*[client(r.generation, took, until) for _ in range(8)])
            found[hangs] += took
            worst[hangs].append(statistics.quantiles(took, n=100)[98])
            for call in waiting:
                call.cancel()
            await asyncio.sleep(0.2)
    for hangs, name in ((False, "nothing hangs"), (True, "20 wait for a download that hangs")):
        quantiles = statistics.quantiles(found[hangs], n=100)
        print(
            f"{name:<36}{len(found[hangs]):>7} requests   p50 {quantiles[49] * 1e3:6.1f} ms   p99 {quantiles[98] * 1e3:6.1f} ms"
            f"   p99 of each turn, median {statistics.median(worst[hangs]) * 1e3:6.1f} ms"
        )


if __name__ == "__main__":
    uvloop.run(main())
