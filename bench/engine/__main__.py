"""python -m bench.engine: what the engine makes of bursts over one base and many adapters.

Cases are run in rounds, one burst of each per round, so that whatever else the machine does meets all of them; every
figure is the median over the rounds. `kept` is the share of the base's rate at the same concurrency, round by round.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys

import torch

from bench.engine.inprocess import InProcess
from bench.engine.stack import Stack
from bench.engine.workload import POPULARITIES, Burst, Case, cases, median_of
from demo.base import default_base_dir, prepare_base
from engine.config import Settings
from engine.model import load_base

Results = dict[Case, list[Burst]]


def main() -> None:
    """Prints one table for the engine alone, and one for the whole stack when asked for."""
    arguments = _parse()
    model = arguments.model or str(prepare_base(default_base_dir(), print))
    threads = arguments.threads or torch.get_num_threads()
    settings = Settings(model=model, dtype=arguments.dtype, device=arguments.device, threads=threads)
    base = load_base(settings)
    wanted = cases(arguments.concurrency, arguments.adapters, arguments.popularity)
    most = max(arguments.adapters)
    print(
        f"{base.name}, {base.dtype} on {base.device}, {threads} threads, adapters of rank {arguments.rank}", flush=True
    )

    limits = {"max_sequences": max(arguments.concurrency), "step_tokens": settings.step_tokens}
    results: Results = {case: [] for case in wanted}
    with InProcess(base, most, arguments.rank, **limits) as engine:
        for round_number in range(arguments.rounds + 1):
            for case in wanted:
                # The first round warms up: caches, packed weights, pages.
                burst = engine.burst(case, round_number, 4 if not round_number else arguments.output_tokens)
                if round_number:
                    results[case].append(burst)
                _progress(round_number, arguments.rounds, case)
    _print("engine, in process", results, None)
    if not arguments.stack:
        return
    variables = {
        "LORAPLEX_ENGINE_THREADS": str(threads),
        "LORAPLEX_ENGINE_DTYPE": arguments.dtype,
        "LORAPLEX_ENGINE_MAX_SEQUENCES": str(limits["max_sequences"]),
    }
    stack = Stack(model, base.targets, most, arguments.rank, variables)
    _print("whole stack, through gRPC", asyncio.run(_run_stack(stack, wanted, arguments)), results)


async def _run_stack(stack: Stack, wanted: list[Case], arguments: argparse.Namespace) -> Results:
    results: Results = {case: [] for case in wanted}
    async with stack:
        for round_number in range(arguments.rounds + 1):
            for case in wanted:
                burst = await stack.burst(case, round_number, 4 if not round_number else arguments.output_tokens)
                if round_number:
                    results[case].append(burst)
                _progress(round_number, arguments.rounds, case)
    return results


def _print(title: str, results: Results, reference: Results | None) -> None:
    """The table; with a reference, also the share of its rate."""
    print(f"\r\033[K\n{title}\n")
    print(
        "| at once | adapters | tokens/s | kept | first token ms | between tokens ms | decode tokens/s | kept |", end=""
    )
    print(" of in-process |" if reference else "")
    print("|---|---|---|---|---|---|---|---|" + ("---|" if reference else ""))
    for case, bursts in results.items():
        base = results.get(Case(case.concurrency, 0, "identical"))
        cells = [
            str(case.concurrency),
            case.name,
            f"{median_of(bursts, 'rate'):.1f}",
            _share(bursts, base, "rate"),
            f"{median_of(bursts, 'first_token_ms'):.0f}",
            f"{median_of(bursts, 'between_tokens_ms'):.1f}",
            f"{median_of(bursts, 'decode_rate'):.1f}",
            _share(bursts, base, "decode_rate"),
        ]
        if reference:
            cells.append(f"{median_of(bursts, 'rate') / median_of(reference[case], 'rate'):.0%}")
        print(f"| {' | '.join(cells)} |")


def _share(bursts: list[Burst], base: list[Burst] | None, figure: str) -> str:
    if base is None or base is bursts:
        return ""
    return (
        f"{statistics.median(getattr(a, figure) / getattr(b, figure) for a, b in zip(bursts, base, strict=True)):.0%}"
    )


def _progress(round_number: int, rounds: int, case: Case) -> None:
    if sys.stderr.isatty():
        sys.stderr.write(f"\r\033[Kround {round_number}/{rounds}: {case.concurrency} at once, {case.name}")


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.engine", description=__doc__.splitlines()[0] if __doc__ else ""
    )
    numbers = lambda text: [int(part) for part in text.split(",")]  # noqa: E731
    words = lambda text: text.split(",")  # noqa: E731
    parser.add_argument("--model", default="", help="a folder or hub id (default: the demo base)")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--concurrency", type=numbers, default=[1, 8, 32])
    parser.add_argument("--adapters", type=numbers, default=[0, 1, 8, 25], help="0 is the base alone")
    parser.add_argument("--popularity", type=words, default=list(POPULARITIES))
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output-tokens", type=int, default=64)
    parser.add_argument("--stack", action="store_true", help="also through gRPC")
    return parser.parse_args()


if __name__ == "__main__":
    main()
