"""python -m bench.fairness.placement: the router's placement on four modelled engines, beside what else stands before engines.

Everybody has the same flows, admission, look-ahead and cache; only who gets a request is decided differently. Prints tables and
writes an SVG of what becomes of an adapter that is suddenly asked for a lot.
"""

from __future__ import annotations

import argparse
import random
import statistics
from collections import Counter
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from bench.fairness import balancers
from bench.fairness.cluster import Cluster, Deal, Setting
from bench.fairness.engine import Job, Model
from bench.fairness.plot import draw_series
from bench.fairness.workloads import slora
from bench.residency.traces import BYTES_PER_RANK, RANKS

# S-LoRA's engine with a chunk of a prompt in a step, as ours has, and all the room for keys and values it may want.
ENGINE = Model(step=0.0265, per_sequence=0.0007, per_prompt_token=0.000214, kv_tokens=10**9, places=32, step_tokens=512)
GIB = 1 << 30
HOT = "adapter that is suddenly asked for"


@dataclass(frozen=True)
class Way:
    """One way to place requests."""

    deal: Callable[[], Deal] | None = None
    is_blind: bool = False


WAYS: Mapping[str, Way] = {
    "round robin": Way(balancers.in_turn),
    "least requests": Way(balancers.least_open),
    "least loaded, one queue": Way(is_blind=True),
    "one home each": Way(balancers.affinity),
    "one home, bounded": Way(balancers.bounded_affinity),
    "Loraplex": Way(),
}


@dataclass(frozen=True)
class Trace:
    """S-LoRA's trace: adapters, popularity, burstiness, requests per second."""

    adapters: int
    alpha: float
    cv: float
    rate: float


TRACES = (
    Trace(200, 1.0, 1.0, 7.0),
    Trace(200, 0.3, 1.0, 7.0),
    Trace(200, 0.1, 1.0, 7.0),
    Trace(200, 0.3, 4.0, 6.0),
    Trace(1000, 1.0, 1.0, 7.0),
    Trace(200, 0.3, 1.0, 14.0),
)


@dataclass
class Seen:
    """What was seen at each sample: tokens computed by each engine so far, copies and homes of the adapter that was watched."""

    served: list[list[int]] = field(default_factory=list)
    copies: list[float] = field(default_factory=list)
    wanted: list[float] = field(default_factory=list)
    running: list[float] = field(default_factory=list)


def sizes_of(count: int, seed: int = 1) -> dict[str, int]:
    """Bytes of so many adapters, of ranks 8 to 64."""
    rng = random.Random(f"sizes {seed}")
    return {f"adapter {number}": rng.choice(RANKS) * BYTES_PER_RANK for number in range(count)}


def run(way: Way, jobs: Sequence[Job], setting: Setting, until: float, watched: str = "") -> tuple[Cluster, Seen]:
    """One trace, one way."""
    seen = Seen()

    def watch(cluster: Cluster) -> None:
        seen.served.append([machine.served for machine in cluster.machines])
        if watched:
            open_requests = [
                answer for answer in cluster.answers if answer.job.adapter == watched and answer.ended is None
            ]
            seen.wanted.append(len(open_requests) / setting.model.places)
            seen.copies.append(cluster.copies(watched))
            seen.running.append(
                sum(any(one.job.adapter == watched for one in m.engine.running) for m in cluster.machines)
            )

    setting = replace(setting, deal=way.deal() if way.deal else None, is_blind=way.is_blind)
    return Cluster(setting, watch).run(jobs, until), seen


def imbalance(seen: Seen, window: int = 10) -> float:
    """Work of the engine that did most over the mean of all, in windows of so many samples; the mean of the windows."""
    ratios = []
    for begin, end in zip(seen.served[::window], seen.served[window::window], strict=False):
        done = [after - before for before, after in zip(begin, end, strict=True)]
        if any(done):
            ratios.append(max(done) * len(done) / sum(done))
    return statistics.fmean(ratios)


def first_tokens(cluster: Cluster, of: Container[str] | None = None) -> list[float]:
    """Seconds to the first token of the requests for some adapters, sorted; of those without one, the time they have waited."""
    answers = [one for one in cluster.answers if of is None or one.job.adapter in of]
    return sorted((cluster.now if one.first_token is None else one.first_token) - one.job.arrived for one in answers)


def main() -> None:
    """Prints everything."""
    parser = argparse.ArgumentParser(prog="python -m bench.fairness.placement")
    parser.add_argument("--svg", type=Path, default=Path("."), help="folder for the plot")
    parser.add_argument("--seconds", type=float, default=100.0, help="length of a trace")
    arguments = parser.parse_args()
    arguments.svg.mkdir(parents=True, exist_ok=True)
    _traces(arguments.seconds)
    _burst(arguments.svg)


def _traces(seconds: float) -> None:
    print(
        "S-LoRA's traces on four engines of 32 places, which do about 8 requests/s, each with 2 GiB for adapters of 21 to "
        "166 MiB\n"
    )
    print(
        "| adapters | alpha | cv | requests/s | placement | loads | GiB loaded | tokens/s | first token p50 | p99 | "
        "busiest engine to mean | shares of tenants |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|---|---|")
    for trace in TRACES:
        jobs = slora(trace.adapters, trace.rate, seconds, trace.alpha, trace.cv)
        for name, way in WAYS.items():
            cluster, seen = run(way, jobs, Setting(ENGINE, sizes_of(trace.adapters)), seconds)
            start = f"| {trace.adapters} | {trace.alpha} | {trace.cv:g} | {trace.rate:g} | {name}"
            _line(start, cluster, seen)


def _line(start: str, cluster: Cluster, seen: Seen) -> None:
    times = first_tokens(cluster)
    p99 = times[int(0.99 * (len(times) - 1))]
    moved = sum(machine.moved_bytes for machine in cluster.machines) / GIB
    loads = sum(machine.loads for machine in cluster.machines)
    rate = sum(answer.tokens for answer in cluster.answers) / cluster.now
    got: Counter[str] = Counter()
    for answer in cluster.answers:
        got[answer.job.tenant] += answer.tokens
    ends = f"{min(got.values()) / got.total():.1%} to {max(got.values()) / got.total():.1%}"
    print(
        f"{start} | {loads} | {moved:.1f} | {rate:.0f} | {statistics.median(times):.2f} s | {p99:.2f} s | "
        f"{imbalance(seen):.2f} | {ends} |",
        flush=True,
    )


def burst(seconds: float = 240.0, seed: int = 1) -> list[Job]:
    """S-LoRA's trace at a third of what the engines can do, and one adapter that is asked for 0.2 times a second, but 5 times a
    second from 60 to 120 s."""
    rng = random.Random(seed)
    jobs = slora(200, 2.5, seconds, alpha=1.0, seed=seed)
    moment = 0.0
    while (moment := moment + rng.expovariate(5.0 if 60 <= moment < 120 else 0.2)) < seconds:
        jobs.append(Job(moment, "sudden", HOT, rng.randint(8, 512), rng.randint(8, 512)))
    return sorted(jobs, key=lambda job: job.arrived)


def burst_sizes() -> dict[str, int]:
    return {**sizes_of(200), HOT: 16 * BYTES_PER_RANK}


def _burst(folder: Path) -> None:
    print(
        "\nAn adapter that is asked for 5 times a second from 60 to 120 s, 0.2 times before and after, beside 200 others\n"
    )
    print(
        "| placement | engines with a copy at 55 s | most at once | at 240 s | its first token p50 | p99 | the others' p50 | "
        "p99 | GiB loaded |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    panels = {}
    for name in ("least requests", "one home each", "one home, bounded", "Loraplex"):
        cluster, seen = run(WAYS[name], burst(), Setting(ENGINE, burst_sizes()), 240, HOT)
        panels[name] = {"needed": seen.wanted, "running it": seen.running, "with a copy": seen.copies}
        times = first_tokens(cluster, {HOT}), first_tokens(cluster, sizes_of(200).keys())
        shown = " | ".join(f"{statistics.median(one):.2f} s | {one[int(0.99 * (len(one) - 1))]:.2f} s" for one in times)
        copies = f"{seen.copies[54]:.0f} | {max(seen.copies):.0f} | {seen.copies[-1]:.0f}"
        moved = sum(machine.moved_bytes for machine in cluster.machines) / GIB
        print(f"| {name} | {copies} | {shown} | {moved:.1f} |", flush=True)
    title = (
        "An adapter that is suddenly asked for: engines that its open requests would fill, that run it, that have it"
    )
    plot = folder / "fairness-replication.svg"
    plot.write_text(draw_series(title, panels), encoding="utf-8")


if __name__ == "__main__":
    main()
