"""python -m bench.residency: what policies make of the trace suite, on the plan the cache runs, beside bounds nobody can beat.

Bytes moved are those loaded onto the device. Figures are means over the seeds, in brackets the least and the most of them. The
parameters of our policy and of the plan were chosen on seeds 1 and 2; report on others.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from bench.residency import plot, traces
from bench.residency.bound import least_moved
from bench.residency.model import Node, Outcome
from cache.policies import POLICIES

OURS = "value"
OTHERS = [name for name in POLICIES if name != OURS]
GIB = 1 << 30


@dataclass(frozen=True)
class Result:
    """One trace. `outcomes` is by policy and whether the plan knew the queue; bounds in bytes, see bench/residency/bound.py.

    Attributes:
        bound: knows the whole trace and no leases.
        leased: knows the leases of our run too.
    """

    bound: float
    leased: float
    outcomes: dict[tuple[str, bool], Outcome]


def run(name: str, seed: int, count: int, per_second: float) -> Result:
    """Every policy over one trace."""
    trace = traces.make(name, seed, count, per_second)
    budget = trace.tier_bytes
    outcomes = {
        (policy, look_ahead): Node(trace, budget, make(budget), look_ahead=look_ahead, tenant_share=1.0).run()
        for policy, make in POLICIES.items()
        for look_ahead in (False, True)
    }
    timetable = outcomes[OURS, True].timetable
    return Result(least_moved(trace, budget), least_moved(trace, budget, timetable), outcomes)


def main() -> None:
    """Prints the tables and draws the plot."""
    arguments = _parse()
    chart: list[tuple[str, dict[str, float]]] = []
    for per_second in arguments.per_second:
        results: dict[str, list[Result]] = {}
        with ProcessPoolExecutor(arguments.processes) as pool:
            for name in arguments.traces:
                one = partial(run, name, count=arguments.requests, per_second=per_second)
                results[name] = list(pool.map(one, arguments.seeds))
                sys.stderr.write(f"{name} done\n")
        print(f"\n{arguments.requests} requests at {per_second:g} per second, seeds {arguments.seeds}\n")
        _print_moved(results)
        _print_rest(results)
        if not chart:
            chart = [(name, _relative(each)) for name, each in results.items()]
    if arguments.plot:
        arguments.plot.write_text(plot.bars(chart), encoding="utf-8")


def _mean(results: list[Result], policy: str, look_ahead: bool, figure: str) -> float:
    return statistics.fmean(getattr(result.outcomes[policy, look_ahead], figure) for result in results)


def _relative(results: list[Result]) -> dict[str, float]:
    """Bytes moved by policy as multiples of the bound: the others as they are deployed, ours with look-ahead."""
    bound = statistics.fmean(result.bound for result in results)
    shown = {name: _mean(results, name, False, "moved") / bound for name in OTHERS}
    return shown | {"ours": _mean(results, OURS, True, "moved") / bound}


def _print_moved(results: dict[str, list[Result]]) -> None:
    _print_bounds(results)
    print(
        "\nBytes moved as multiples of the bound without leases. Others: what has a place is leased, the queue is not known.\n"
        "In brackets: the same plan and look-ahead.\n"
    )
    print(f"| trace | ours | {' | '.join(OTHERS)} | ours / best | ours, no look-ahead |")
    print("|---" * (4 + len(OTHERS)) + "|")
    for name, each in results.items():
        bound = statistics.fmean(result.bound for result in each)
        cells = [name, f"{_mean(each, OURS, True, 'moved') / bound:.2f}"]
        for other in OTHERS:
            alone, ahead = (_mean(each, other, look_ahead, "moved") / bound for look_ahead in (False, True))
            cells.append(f"{alone:.2f} ({ahead:.2f})")
        best = min(OTHERS, key=lambda other: _mean(each, other, False, "moved"))
        cells.append(_spread([_moved(r) / r.outcomes[best, False].moved - 1 for r in each], "+.0%"))
        print(f"| {' | '.join(cells)} | {_mean(each, OURS, False, 'moved') / bound:.2f} |")


def _print_bounds(results: dict[str, list[Result]]) -> None:
    print(
        "Bytes moved by us, as multiples of two bounds: `no leases` may evict what runs, which no server can;\n"
        "`leases` may not.\n"
    )
    print("| trace | in the queue | no leases, GiB | leases, GiB | ours / no leases | ours / leases |")
    print("|---" * 6 + "|")
    for name, each in results.items():
        cells = [name, f"{_mean(each, OURS, True, 'looked_ahead'):.0f}"]
        cells.append(f"{statistics.fmean(result.bound for result in each) / GIB:.1f}")
        cells.append(f"{statistics.fmean(result.leased for result in each) / GIB:.1f}")
        cells.append(_spread([_moved(result) / result.bound for result in each]))
        cells.append(_spread([_moved(result) / result.leased for result in each]))
        print(f"| {' | '.join(cells)} |")


def _moved(result: Result) -> float:
    return float(result.outcomes[OURS, True].moved)


def _spread(figures: list[float], form: str = ".2f") -> str:
    return f"{statistics.fmean(figures):{form}} ({min(figures):{form}} to {max(figures):{form}})"


def _print_rest(results: dict[str, list[Result]]) -> None:
    print("\nHit ratio, and mean wait for the adapter in ms of a request that has a place.\n")
    print(f"| trace | ours | {' | '.join(OTHERS)} |\n" + "|---" * (2 + len(OTHERS)) + "|")
    for name, each in results.items():
        cells = [name]
        for policy, look_ahead in [(OURS, True), *((other, False) for other in OTHERS)]:
            hits, wait = (_mean(each, policy, look_ahead, figure) for figure in ("hits", "wait"))
            cells.append(f"{hits:.0%} {1e3 * wait:.1f}")
        print(f"| {' | '.join(cells)} |")


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.residency", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--traces", type=lambda text: text.split(","), default=list(traces.PICKERS))
    parser.add_argument("--requests", type=int, default=1500)
    parser.add_argument("--seeds", type=lambda text: [int(part) for part in text.split(",")], default=[11, 12, 13])
    parser.add_argument(
        "--per-second",
        type=lambda text: [float(part) for part in text.split(",")],
        default=[6.0, 4.0],
        help="the engine serves about 4.2; the first rate is the one plotted",
    )
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--plot", type=Path, help="an SVG file to draw the first table to")
    return parser.parse_args()


if __name__ == "__main__":
    main()
