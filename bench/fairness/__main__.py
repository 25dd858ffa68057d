"""python -m bench.fairness: the router's flows on a modelled engine, beside FCFS, LoRAX's rule and VTC.

Traces of VTC and S-LoRA, a tenant with 1,000 adapters against one with one, weights, and a device that is too small for
the adapters in use. Prints tables and writes one SVG for each VTC trace. No model is loaded; a minute or two.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from bench.fairness.engine import Job
from bench.fairness.plot import draw
from bench.fairness.rules import HERE, Fcfs, Lorax, Ours, Rule, Vtc
from bench.fairness.simulator import History, simulate
from bench.fairness.workloads import A10G, SMALL_DEVICE, even, many_against_one, slora, vtc
from router.flows import Flows, Tariff

WINDOW = 2000.0
RULES: dict[str, Callable[[], Rule]] = {
    "FCFS": Fcfs,
    "LoRAX": Lorax,
    "VTC": Vtc,
    "Loraplex": lambda: Ours(WINDOW),
}
# The most that two clients differ in what they received, in VTC's own runs: fair_bench/VTC/*.jsonl of its artifact.
PUBLISHED = {"overload": 8_001, "on/off": 8_820}


def main() -> None:
    """Prints everything."""
    parser = argparse.ArgumentParser(prog="python -m bench.fairness")
    parser.add_argument("--svg", type=Path, default=Path("."), help="folder for the plots")
    arguments = parser.parse_args()
    arguments.svg.mkdir(parents=True, exist_ok=True)
    _vtc(arguments.svg)
    _slora()
    _shares()
    _starvation()
    _decisions()


def _vtc(folder: Path) -> None:
    print(
        "VTC's traces: largest difference in service between the two clients (prompt + 2 · output tokens), and requests/s\n"
    )
    print(
        "| trace | rule | largest difference | VTC as published | requests/s | against FCFS |\n|---|---|---|---|---|---|"
    )
    for name, jobs, last in (
        ("overload", vtc([1.5, 3], 360), 360),
        ("on/off", vtc([2, 3], 600, on_off=60), 600),
    ):
        seen = {rule: simulate(make(), jobs, A10G) for rule, make in RULES.items()}
        for rule, history in seen.items():
            share = f"{history.rate / seen['FCFS'].rate:.1%}"
            gap = f"{history.gap(0, last):,.0f} | {PUBLISHED[name]:,}"
            print(f"| {name} | {rule} | {gap} | {history.rate:.3f} | {share} |", flush=True)
        plot = folder / f"fairness-{name.replace('/', '-')}.svg"
        plot.write_text(draw(f"Service received over time, VTC's trace {name}", seen), encoding="utf-8")


def _slora() -> None:
    print(
        "\nS-LoRA's traces: 200 adapters of 4 tenants, device room for 16, 50 ms a load, twice what the engine can do\n"
    )
    print("| alpha | cv | rule | tokens/s | loads | first token p50 | p99 | least to greatest share of a tenant |")
    print("|---|---|---|---|---|---|---|---|")
    for alpha, cv in ((1.0, 1.0), (0.3, 1.0), (0.3, 4.0)):
        jobs = slora(200, rate=3.5, seconds=240, alpha=alpha, cv=cv)
        for rule, make in RULES.items():
            history = simulate(make(), jobs, SMALL_DEVICE, until=240)
            _line(f"| {alpha} | {cv} | {rule}", history, 60, 240)


def _line(start: str, history: History, first: int, last: int) -> None:
    times = sorted(seconds for values in history.first_tokens.values() for _, seconds in values)
    shares = history.shares(first, last)
    total = sum(shares.values()) or 1.0
    ends = f"{min(shares.values()) / total:.1%} to {max(shares.values()) / total:.1%}"
    p99 = times[int(0.99 * (len(times) - 1))]
    rate = history.tokens / last
    print(
        f"{start} | {rate:.0f} | {history.loads} | {statistics.median(times):.1f} s | {p99:.1f} s | {ends} |",
        flush=True,
    )


def _shares() -> None:
    print("\nShares of the service while all ask for more, from 60 to 600 s\n")
    print("| who | rule | shares | wanted | off by |\n|---|---|---|---|---|")
    warm = replace(A10G, join_every=1, load=0.002)
    jobs = many_against_one(1000, 600)
    for rule, make in RULES.items():
        _shares_line("1,000 adapters, 1 adapter", rule, simulate(make(), jobs, warm, 600), {"many": 1, "one": 1})
    weights = {"light": 1.0, "middle": 2.0, "heavy": 4.0}
    jobs = even(list(weights), 600)
    history = simulate(Ours(WINDOW, weights), jobs, warm, 600)
    _shares_line("tenants of weight 1, 2, 4", "Loraplex", history, weights)
    jobs = even(list(weights), 600, by_adapter=True)
    history = simulate(Ours(WINDOW, None, weights.__getitem__), jobs, warm, 600, by=lambda job: job.adapter)
    _shares_line("adapters of weight 1, 2, 4", "Loraplex", history, weights)


def _shares_line(who: str, rule: str, history: History, weights: dict[str, float]) -> None:
    got = history.shares(60, 600)
    wanted = {name: weight / sum(weights.values()) for name, weight in weights.items()}
    shares = {name: got[name] / sum(got.values()) for name in weights}
    off = max(abs(shares[name] / wanted[name] - 1) for name in weights)
    shown = [" : ".join(f"{table[name]:.1%}" for name in weights) for table in (shares, wanted)]
    print(f"| {who} | {rule} | {shown[0]} | {shown[1]} | {off:.1%} |", flush=True)


def _starvation() -> None:
    print("\nThree adapters with endless requests, and one more that asks once, on a device for three\n")
    print("| rule | first token of the one |\n|---|---|")
    full = replace(A10G, places=8, device_adapters=3, load=0.05, join_every=1)
    jobs = [Job(0.2 * n, f"tenant {n % 3}", f"adapter {n % 3}", 64, 128) for n in range(1500)]
    jobs = sorted([*jobs, Job(20.0, "late", "late", 64, 128)], key=lambda job: job.arrived)
    for rule, make in RULES.items():
        history = simulate(make(), jobs, full, until=300)
        times = history.first_tokens["late"]
        print(f"| {rule} | {f'{times[0][1]:.1f} s' if times else 'none within 280 s'} |", flush=True)


def _decisions() -> None:
    flows = Flows(Tariff.of(1, 2), WINDOW)
    for number in range(20_000):
        flows.enqueue(f"tenant-{number % 100}", f"adapter-{number % 10_000}", 1.0, HERE, 100)
    spent = []
    for _ in range(10_000):
        began = time.perf_counter()
        ticket = flows.pick(lambda where: True, lambda where: where == HERE)
        spent.append(time.perf_counter() - began)
        assert ticket
        flows.charge(ticket, 100, 50)
        flows.end(ticket)
    spent.sort()
    print(f"\nA pick with 10,000 adapters queued: median {1e6 * spent[5000]:.1f} µs, p99 {1e6 * spent[9900]:.1f} µs")


if __name__ == "__main__":
    main()
