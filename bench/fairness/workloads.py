"""Traces: VTC's published ones, S-LoRA's, and our own questions."""

from __future__ import annotations

import random
from collections.abc import Sequence

from bench.fairness.engine import A10G, Job, Model

# What S-LoRA's traces are run on here: device room for some of the adapters, and a load that takes its time.
SMALL_DEVICE = Model(
    step=0.0265,
    per_sequence=0.0007,
    per_prompt_token=0.000214,
    kv_tokens=10_000,
    places=32,
    device_adapters=16,
    load=0.05,
)
__all__ = ["A10G", "SMALL_DEVICE", "even", "many_against_one", "slora", "vtc"]


def vtc(rates: Sequence[float], seconds: float, on_off: float = 0.0, seed: int = 42) -> list[Job]:
    """VTC's synthetic traces (fair_bench/exp_suite.py, mode "uniform"): clients that ask at an even rate each, 256 tokens
    in and 256 out; the first is silent every other `on_off` seconds. Overload: 1.5 and 3 a second for 360 s. On/off: 2
    and 3 for 600 s, 60 s each way. The published ones differ in the phase of the clients only."""
    rng = random.Random(seed)
    jobs = []
    for client, rate in enumerate(rates):
        moment = rng.random() / rate
        for _ in range(int(rate * seconds)):
            moment += 1 / rate
            if not (on_off and client == 0 and int(moment // on_off) % 2):
                jobs.append(Job(moment, f"client {client}", "", 256, 256))
    return _sorted(jobs)


def slora(adapters: int, rate: float, seconds: float, alpha: float = 0.3, cv: float = 1.0, seed: int = 1) -> list[Job]:
    """S-LoRA's traces (benchmarks/trace.py): Gamma arrivals, adapter int(n · power(alpha)), 8 to 512 tokens in and out. Each
    adapter is one tenant's, the i-th tenant having the adapters i, i + 4, ...; alpha 1 is uniform, less is skewed."""
    rng = random.Random(seed)
    jobs, moment = [], 0.0
    for _ in range(int(rate * seconds)):
        moment += rng.gammavariate(1 / cv**2, cv**2 / rate)
        adapter = int(adapters * rng.random() ** (1 / alpha))
        jobs.append(
            Job(moment, f"tenant {adapter % 4}", f"adapter {adapter}", rng.randint(8, 512), rng.randint(8, 512))
        )
    return jobs


def many_against_one(adapters: int, seconds: float, rate: float = 3.0, seed: int = 1) -> list[Job]:
    """A tenant with many adapters and a tenant with one, both asking for more than there is."""
    rng = random.Random(seed)
    jobs = []
    for number in range(int(rate * seconds)):
        sizes = (rng.randint(32, 384), rng.randint(32, 384))
        jobs.append(Job(number / rate, "many", f"adapter {number % adapters}", *sizes))
        sizes = (rng.randint(32, 384), rng.randint(32, 384))
        jobs.append(Job(number / rate, "one", "adapter of one", *sizes))
    return _sorted(jobs)


def even(
    tenants: Sequence[str], seconds: float, rate: float = 3.0, seed: int = 1, *, by_adapter: bool = False
) -> list[Job]:
    """Tenants, or adapters of one tenant, that all ask for more than there is."""
    rng = random.Random(seed)
    return _sorted(
        [
            Job(
                number / rate,
                "tenant" if by_adapter else name,
                name if by_adapter else "",
                rng.randint(32, 384),
                rng.randint(32, 384),
            )
            for name in tenants
            for number in range(int(rate * seconds))
        ]
    )


def _sorted(jobs: list[Job]) -> list[Job]:
    return sorted(jobs, key=lambda job: job.arrived)
