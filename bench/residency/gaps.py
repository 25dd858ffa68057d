"""python -m bench.residency.gaps: what running streams notice while adapters are brought up, whole stack.

Streams run, each with its own adapter. In turn nothing else happens, or adapters nobody has seen come up at once from their
source to the device (read, validated, packed, stored, mapped, copied; they are deleted afterwards), or downloads hang whose
source never sends their bytes. Gaps are the times between the tokens of a stream, at the client. The engine gets one thread,
so that a machine of two cores has one for everything that is beside the steps.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import statistics
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from bench.engine.adapters import write_peft_folder
from bench.engine.stack import Stack
from bench.engine.workload import prompts
from demo.base import default_base_dir, prepare_base
from engine.config import Settings
from engine.model import load_base
from loraplex import LoraplexError

# Tokens of each stream before its gaps count: all of them run by then.
SETTLED = 8
PROMPT_TOKENS = 16


@dataclass
class Done:
    """How many of the things beside the streams are done."""

    count: int = 0


@dataclass(frozen=True)
class Round:
    """Gaps of all streams in ms, and how much was done beside them when the last stream ended."""

    gaps: list[float]
    done: int

    @property
    def figures(self) -> tuple[float, float, float]:
        """Median, p99 and largest."""
        return statistics.median(self.gaps), statistics.quantiles(self.gaps, n=100)[98], max(self.gaps)


Beside = Callable[[], AbstractAsyncContextManager[Done]]


def main() -> None:
    """Prints one table."""
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
        numbers = range(arguments.streams, arguments.streams + arguments.adapters)
        return [write_peft_folder(stack.roots, number, targets, arguments.rank) for number in numbers]

    asyncio.run(_measure(stack, write, arguments))


async def _measure(stack: Stack, write: Callable[[], list[Path]], arguments: argparse.Namespace) -> None:
    async with stack, _silent_server() as silent:
        cold = write()
        kinds: dict[str, Beside] = {
            "nothing": _nothing,
            f"{len(cold)} cold adapters": lambda: _brought_up(stack, cold),
            f"{arguments.adapters} hanging downloads": lambda: _hanging(stack, silent, arguments.adapters),
        }
        rounds: dict[str, list[Round]] = {name: [] for name in kinds}
        for number in range(arguments.rounds + 1):
            for name, beside in kinds.items():
                one = await _round(stack, beside, number, arguments)
                # The first round warms up.
                rounds[name] += [one] if number else []
    print(f"\n{arguments.streams} streams of {arguments.tokens} tokens, adapters of rank {arguments.rank}")
    print(f"medians of {arguments.rounds} rounds; in brackets: beside the round with nothing that ran just before\n")
    print("| beside the streams | median gap ms | p99 | largest | done meanwhile |\n|---|---|---|---|---|")
    quiet = [each.figures for each in rounds["nothing"]]
    for name, found in rounds.items():
        cells = []
        for place in range(3):
            values = [each.figures[place] for each in found]
            ratio = statistics.median(value / other[place] for value, other in zip(values, quiet, strict=True))
            cells.append(f"{statistics.median(values):.1f} ({ratio - 1:+.1%})")
        print(f"| {name} | {' | '.join(cells)} | {statistics.median(each.done for each in found):.0f} |")


async def _round(stack: Stack, beside: Beside, seed: int, arguments: argparse.Namespace) -> Round:
    """The streams once, with something beside them."""
    texts = [text[:PROMPT_TOKENS] for text in prompts(arguments.streams, stack.vocab_size, seed)]
    asked = [asyncio.create_task(stack.ask(text, each, arguments.tokens)) for each, text in enumerate(texts)]
    async with beside() as done:
        arrivals = await asyncio.gather(*asked)
        count = done.count
    gaps = [1e3 * (b - a) for times in arrivals for a, b in itertools.pairwise(times[SETTLED:])]
    return Round(gaps, count)


@asynccontextmanager
async def _nothing() -> AsyncIterator[Done]:
    yield Done()


@asynccontextmanager
async def _brought_up(stack: Stack, cold: list[Path]) -> AsyncIterator[Done]:
    """All adapters at once; waits for the last of them, and removes them."""
    done = Done()

    async def bring(path: Path) -> None:
        await stack.client.adapters.register(path.name, path)
        await stack.client.adapters.preload(path.name, "device")
        done.count += 1

    bringing = [asyncio.create_task(bring(path)) for path in cold]
    yield done
    await asyncio.gather(*bringing)
    await asyncio.gather(*(stack.client.adapters.delete(path.name) for path in cold))


@asynccontextmanager
async def _hanging(stack: Stack, address: str, count: int) -> AsyncIterator[Done]:
    """Downloads that never get a byte, given up when the block ends."""
    digest = "0" * 64

    async def download(number: int) -> None:
        with suppress(LoraplexError):
            await stack.client.adapters.register(f"hanging-{number}", f"{address}/{number}", expected_digest=digest)
            raise AssertionError("a source that sends nothing was read")

    hanging = [asyncio.create_task(download(number)) for number in range(count)]
    yield Done()
    running = [task for task in hanging if not task.done()]
    assert len(running) == count, "the downloads did not hang"
    for task in running:
        task.cancel()
    await asyncio.gather(*running, return_exceptions=True)


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


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.residency.gaps", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="", help="a folder or hub id (default: the demo base)")
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=400, help="of each stream in each round")
    parser.add_argument("--adapters", type=int, default=100, help="brought up in a round, or downloads that hang")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    return parser.parse_args()


if __name__ == "__main__":
    main()
