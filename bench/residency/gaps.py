"""python -m bench.residency.gaps: what running streams notice while adapters are brought up, whole stack.

Streams run, each with its own adapter. Beside them nothing happens, or downloads hang whose source never sends their bytes, or
they hang and adapters nobody has seen come up all at once, again and again, from their source to the device (read, validated,
packed, stored, mapped, copied; when all are up they are deleted). Gaps are the times between the tokens of a stream, at the
client. A round has as many with each thing beside the streams, in an order that changes, and its figures are compared with each
other. The engine gets one thread, so that a machine of two cores has one for everything that is beside the steps.

What nobody waits for may take its time, a request may not: at the end requests ask for adapters that are not on the device,
while nothing else comes up and while all of the others do.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import statistics
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from bench.engine.adapters import write_peft_folder
from bench.engine.stack import Stack
from bench.engine.workload import prompts
from demo.base import default_base_dir, prepare_base
from engine.config import Settings
from engine.model import load_base
from loraplex import LoraplexError
from servicekit.garbage import settle

# Tokens of each stream before its gaps count: all of them run by then.
SETTLED = 8
PROMPT_TOKENS = 16
# More tokens than a stream gets to while requests are asked, and what passes between two of those.
LONG, PAUSE_SECONDS = 4000, 0.1


@dataclass
class Done:
    """How many of the things beside the streams are done."""

    count: int = 0


@dataclass(frozen=True)
class Round:
    """Gaps of all streams in ms; how many adapters came up meanwhile, and in how many seconds."""

    gaps: list[float]
    done: int
    seconds: float


Beside = Callable[[], AbstractAsyncContextManager[Done]]


def main() -> None:
    """Prints the tables."""
    arguments = _parse()
    model = arguments.model or str(prepare_base(default_base_dir(), print))
    targets = load_base(Settings(model=model, threads=1)).targets
    variables = {
        "LORAPLEX_ENGINE_THREADS": "1",
        "LORAPLEX_ENGINE_ADAPTER_MEMORY_MIB": "4096",
        # Named, so that a machine short of memory refuses to start instead of preempting streams.
        "LORAPLEX_ENGINE_KV_MEMORY_MIB": "1024",
        "LORAPLEX_CACHE_SOURCE_NETWORKS": "127.0.0.0/8",
        "LORAPLEX_CACHE_SOURCE_IDLE_SECONDS": "3600",
    }
    stack = Stack(model, targets, arguments.streams, arguments.rank, variables)

    def write() -> list[Path]:
        numbers = range(arguments.streams, arguments.streams + arguments.adapters + arguments.asked)
        return [write_peft_folder(stack.roots, number, targets, arguments.rank) for number in numbers]

    # Nothing of this process stops while its own collector looks at all objects: it would be taken for a gap.
    settle()
    asyncio.run(_measure(stack, write, arguments))


async def _measure(stack: Stack, write: Callable[[], list[Path]], arguments: argparse.Namespace) -> None:
    async with stack, _silent_server() as silent:
        written = write()
        cold, asked = written[: arguments.adapters], written[arguments.adapters :]

        def hanging() -> AbstractAsyncContextManager[Done]:
            return _hanging(stack, silent, arguments.downloads)

        def both() -> AbstractAsyncContextManager[Done]:
            return _together(hanging(), _brought_up(stack, cold))

        hang = f"{arguments.downloads} downloads hang"
        kinds: dict[str, Beside] = {
            "nothing": _nothing,
            hang: hanging,
            f"{hang}, {len(cold)} cold adapters come up": both,
        }
        rounds: dict[str, list[Round]] = {name: [] for name in kinds}
        for number in range(arguments.rounds + 1):
            order = list(kinds.items())
            for name, beside in order if number % 2 else reversed(order):
                one = await _round(stack, beside, number, arguments)
                # The first round warms up.
                rounds[name] += [one] if number else []
                sys.stderr.write(f"round {number} of {arguments.rounds}, {name}: p99 {_p99(one.gaps):.1f} ms\n")
        _print_gaps(rounds, arguments)
        alone = await _bring_up(stack, cold)
        print(f"\n{len(cold)} cold adapters come up in {alone:.1f} s while no stream runs")
        waits = {
            "nothing": await _first_tokens(stack, asked, _nothing, arguments),
            f"{len(cold)} cold adapters": await _first_tokens(
                stack, asked, lambda: _brought_up(stack, cold), arguments
            ),
        }
    _print_waits(waits, arguments)


def _print_gaps(rounds: dict[str, list[Round]], arguments: argparse.Namespace) -> None:
    [quiet, *_] = rounds.values()
    print(
        f"\n{arguments.streams} streams, adapters of rank {arguments.rank}; {len(quiet)} rounds of {len(quiet[0].gaps)} gaps"
    )
    print("p99 / quiet: beside nothing in the same round, median of the rounds (lowest to highest)\n")
    print(
        "| beside the streams | median gap ms | p99 | largest | p99 / quiet | all rounds | up meanwhile | a hundred in s |"
    )
    print("|---|---|---|---|---|---|---|---|")
    everything = _p99([gap for each in quiet for gap in each.gaps])
    for name, found in rounds.items():
        gaps = [gap for each in found for gap in each.gaps]
        ratios = [_p99(one.gaps) / _p99(other.gaps) for one, other in zip(found, quiet, strict=True)]
        spread = f"{statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})"
        done = sum(each.done for each in found)
        pace = f"{100 * sum(each.seconds for each in found) / done:.1f}" if done else ""
        print(
            f"| {name} | {statistics.median(gaps):.1f} | {_p99(gaps):.1f} | {max(gaps):.1f} "
            f"| {spread} | {_p99(gaps) / everything:.3f} | {done} | {pace} |"
        )


def _print_waits(waits: dict[str, list[float]], arguments: argparse.Namespace) -> None:
    print(
        f"\n{arguments.asked} requests, one after another beside the streams, each for an adapter not on the device\n"
    )
    print("| comes up meanwhile | first token ms, median | largest |\n|---|---|---|")
    for name, found in waits.items():
        print(f"| {name} | {statistics.median(found):.0f} | {max(found):.0f} |")


async def _round(stack: Stack, beside: Beside, seed: int, arguments: argparse.Namespace) -> Round:
    """The streams once, with something beside them from when all of them run."""
    async with _streams(stack, seed, arguments.streams, arguments.tokens + 2 * SETTLED) as running, beside() as done:
        began = time.perf_counter()
        arrivals = await asyncio.gather(*running)
        count, seconds = done.count, time.perf_counter() - began
    # The last ones: those of some streams began before the others ran.
    gaps = [1e3 * (b - a) for times in arrivals for a, b in itertools.pairwise(times[-arguments.tokens - 1 :])]
    return Round(gaps, count, seconds)


@asynccontextmanager
async def _streams(stack: Stack, seed: int, count: int, tokens: int) -> AsyncIterator[list[asyncio.Task[list[float]]]]:
    """Streams, each with its own adapter, all of which run; ended with the block. Each gives when its tokens came."""
    unsettled, settled = set(range(count)), asyncio.Event()

    async def stream(text: list[int], number: int) -> list[float]:
        times: list[float] = []
        async for delta in stack.client.stream(
            token_ids=text, adapter=f"random-{number:04d}", max_output_tokens=tokens, ignore_eos=True
        ):
            times += [time.perf_counter()] * len(delta.token_ids)
            if len(times) >= SETTLED:
                unsettled.discard(number)
                if not unsettled:
                    settled.set()
        return times

    texts = [text[:PROMPT_TOKENS] for text in prompts(count, stack.vocab_size, seed)]
    running = [asyncio.create_task(stream(text, each)) for each, text in enumerate(texts)]
    waiting = asyncio.create_task(settled.wait())
    try:
        # A stream that has ended by then has failed, which whoever waits for it hears.
        await asyncio.wait((waiting, *running), return_when=asyncio.FIRST_COMPLETED)
        yield running
    finally:
        for task in (waiting, *running):
            task.cancel()
        await asyncio.gather(waiting, *running, return_exceptions=True)


async def _first_tokens(stack: Stack, asked: list[Path], beside: Beside, arguments: argparse.Namespace) -> list[float]:
    """Milliseconds until the first token of requests for adapters that are not on the device."""
    for path in asked:
        await stack.client.adapters.register(path.name, path)
    waits: list[float] = []
    async with _streams(stack, 0, arguments.streams, LONG), beside():
        for path, text in zip(asked, prompts(len(asked), stack.vocab_size, 1), strict=True):
            await asyncio.sleep(PAUSE_SECONDS)
            began = time.perf_counter()
            await stack.client.generate(token_ids=text[:PROMPT_TOKENS], adapter=path.name, max_output_tokens=1)
            waits.append(1e3 * (time.perf_counter() - began))
    for path in asked:
        await stack.client.adapters.delete(path.name)
    return waits


@asynccontextmanager
async def _nothing() -> AsyncIterator[Done]:
    yield Done()


@asynccontextmanager
async def _together(*besides: AbstractAsyncContextManager[Done]) -> AsyncIterator[Done]:
    """Counts what the last of them does."""
    async with AsyncExitStack() as stack:
        [*_, done] = [await stack.enter_async_context(each) for each in besides]
        yield done


@asynccontextmanager
async def _brought_up(stack: Stack, cold: list[Path]) -> AsyncIterator[Done]:
    """All adapters at once, and removed when all are up, and again; what is under way when the block ends is waited for."""
    done, over = Done(), asyncio.Event()

    async def forever() -> None:
        while not over.is_set():
            await _bring_up(stack, cold, done)

    bringing = asyncio.create_task(forever())
    try:
        yield done
    finally:
        over.set()
        await bringing


async def _bring_up(stack: Stack, cold: list[Path], done: Done | None = None) -> float:
    """Seconds until the last of them is up; removes them."""
    done, began = done or Done(), time.perf_counter()

    async def bring(path: Path) -> None:
        await stack.client.adapters.register(path.name, path)
        await stack.client.adapters.preload(path.name, "device")
        done.count += 1

    await asyncio.gather(*(bring(path) for path in cold))
    seconds = time.perf_counter() - began
    await asyncio.gather(*(stack.client.adapters.delete(path.name) for path in cold))
    return seconds


@asynccontextmanager
async def _hanging(stack: Stack, address: str, count: int) -> AsyncIterator[Done]:
    """Downloads that never get a byte, given up when the block ends."""
    digest = "0" * 64

    async def download(number: int) -> None:
        with suppress(LoraplexError):
            await stack.client.adapters.register(f"hanging-{number}", f"{address}/{number}", expected_digest=digest)
            raise AssertionError("a source that sends nothing was read")

    hanging = [asyncio.create_task(download(number)) for number in range(count)]
    try:
        yield Done()
        assert not any(task.done() for task in hanging), "the downloads did not hang"
    finally:
        for task in hanging:
            task.cancel()
        await asyncio.gather(*hanging, return_exceptions=True)


@asynccontextmanager
async def _silent_server() -> AsyncIterator[str]:
    """Serves files over HTTP of which it sends everything but the content."""
    ends: list[asyncio.StreamWriter] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        ends.append(writer)
        while request := await reader.readuntil(b"\r\n\r\n"):
            writer.write(b'HTTP/1.1 200 OK\r\netag: "%d"\r\ncontent-length: 9\r\n\r\n' % len(ends))
            if not request.startswith(b"HEAD"):
                return

    async def kept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        # A cancelled one ends like any other: the server is closed then.
        with suppress(asyncio.IncompleteReadError, asyncio.CancelledError, ConnectionError):
            await serve(reader, writer)

    server = await asyncio.start_server(kept, "127.0.0.1", 0)
    host, port = server.sockets[0].getsockname()[:2]
    try:
        yield f"http://{host}:{port}"
    finally:
        server.close()
        for writer in ends:
            writer.close()


def _p99(values: list[float]) -> float:
    return statistics.quantiles(values, n=100)[98]


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.residency.gaps", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="", help="a folder or hub id (default: the demo base)")
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument(
        "--tokens", type=int, default=400, help="of each stream that count, for each thing beside them in each round"
    )
    parser.add_argument("--adapters", type=int, default=100, help="brought up at once")
    parser.add_argument("--downloads", type=int, default=100, help="that hang")
    parser.add_argument("--asked", type=int, default=20, help="requests for adapters that are not on the device")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    return parser.parse_args()


if __name__ == "__main__":
    main()
