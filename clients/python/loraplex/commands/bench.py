"""loraplex bench: asks many requests at once and measures the answers.

Prompts are random token ids, answers go on to their full length, so that only the counts decide how much work it is.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from loraplex.aio import AsyncClient
from loraplex.commands.output import as_json, at_least, say, table, write
from loraplex.errors import LoraplexError

HEADERS = (
    "adapter", "requests", "errors", "output tokens", "tokens/s", "TTFT p50 ms", "TTFT p95 ms", "inter-token p50 ms",
    "inter-token p95 ms",
)  # fmt: skip
BASE = "(base)"
_PROGRESS_SECONDS = 0.5


@dataclass
class Measured:
    """What was seen of one adapter. All times in seconds.

    Attributes:
        firsts: from sending a request to its first delta.
        gaps: between two tokens; the pause before a delta, divided among its tokens.
    """

    requests: int = 0
    tokens: int = 0
    firsts: list[float] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)
    errors: Counter[str] = field(default_factory=Counter)

    def add(self, other: Measured) -> None:
        self.requests += other.requests
        self.tokens += other.tokens
        self.firsts += other.firsts
        self.gaps += other.gaps
        self.errors += other.errors


def add_parser(commands: Any, common: argparse.ArgumentParser) -> None:
    parser = commands.add_parser("bench", parents=[common], help="load generator", description=__doc__)
    parser.set_defaults(run=run)
    add = parser.add_argument
    add("--concurrency", type=at_least(1), default=8, metavar="N", help="requests at once (default: %(default)s)")
    add("--requests", type=at_least(1), default=64, metavar="N", help="requests in all (default: %(default)s)")
    add("--adapters", default="", metavar="A,B,...", help="adapters, taken in turn; all takes every registered one")
    add("--prompt-tokens", type=at_least(1), default=64, metavar="N", help="(default: %(default)s)")
    add("--output-tokens", type=at_least(1), default=64, metavar="N", help="(default: %(default)s)")
    add("--seed", type=int, default=0, help="of the prompts (default: %(default)s)")
    add("--json", action="store_true", help="one line of JSON for each row")


def run(options: argparse.Namespace) -> int:
    return asyncio.run(_bench(options))


async def _bench(options: argparse.Namespace) -> int:
    async with AsyncClient(options.address, tenant=options.tenant, timeout=options.timeout) as client:
        vocabulary = (await client.model_info()).vocab_size
        adapters = await _adapters(client, options.adapters)
        measured = {adapter: Measured() for adapter in adapters}
        showing = asyncio.create_task(_show_progress(measured, options.requests))
        began = time.perf_counter()
        try:
            await _load(client, options, vocabulary, measured)
        finally:
            showing.cancel()
        elapsed = time.perf_counter() - began
    _report(measured, elapsed, options)
    return 1 if any(one.errors for one in measured.values()) else 0


async def _adapters(client: AsyncClient, asked: str) -> list[str]:
    if asked == "all":
        found = [adapter.adapter_id async for adapter in client.adapters.list()]
        if not found:
            raise ValueError("--adapters all: no adapters are registered")
        return found
    return list(dict.fromkeys(name for name in asked.split(",") if name)) or [""]


async def _load(
    client: AsyncClient, options: argparse.Namespace, vocabulary: int, measured: dict[str, Measured]
) -> None:
    """Keeps `concurrency` requests running until `requests` were made."""
    numbers = iter(range(options.requests))
    adapters = list(measured)

    async def worker() -> None:
        for number in numbers:
            adapter = adapters[number % len(adapters)]
            prompt = random.Random(f"{options.seed}/{number}").choices(range(vocabulary), k=options.prompt_tokens)
            await _ask(client, adapter, prompt, options, measured[adapter])

    async with asyncio.TaskGroup() as group:
        for _ in range(min(options.concurrency, options.requests)):
            group.create_task(worker())


async def _ask(
    client: AsyncClient, adapter: str, prompt: Sequence[int], options: argparse.Namespace, into: Measured
) -> None:
    into.requests += 1
    last = began = time.perf_counter()
    first = True
    stream = client.stream(
        token_ids=prompt,
        adapter=adapter,
        max_output_tokens=options.output_tokens,
        ignore_eos=True,
        timeout=options.timeout,
    )
    try:
        async for delta in stream:
            now = time.perf_counter()
            count = len(delta.token_ids)
            if first:
                into.firsts.append(now - began)
            elif count:
                into.gaps += [(now - last) / count] * count
            first = False
            last = now if count else last
            into.tokens += count
    except LoraplexError as error:
        into.errors[f"{error.status.name} {error.reason}".strip()] += 1


def _report(measured: dict[str, Measured], elapsed: float, options: argparse.Namespace) -> None:
    total = Measured()
    for one in measured.values():
        total.add(one)
    rows = [_row(adapter or BASE, one, elapsed) for adapter, one in measured.items()]
    if len(rows) > 1:
        rows.append(_row("all", total, elapsed))
    if options.json:
        write("".join(as_json(dict(zip(HEADERS, row, strict=True))) for row in rows))
    else:
        write(table(HEADERS, rows))
        write(f"\n{total.requests} requests, {options.concurrency} at once, in {elapsed:.2f} s\n")
    for name, count in total.errors.most_common():
        say(f"{count} requests failed: {name}")


def _row(name: str, one: Measured, elapsed: float) -> tuple[object, ...]:
    return (
        name,
        one.requests,
        sum(one.errors.values()),
        one.tokens,
        round(one.tokens / elapsed, 1),
        *(_milliseconds(one.firsts, share) for share in (0.5, 0.95)),
        *(_milliseconds(one.gaps, share) for share in (0.5, 0.95)),
    )


def _milliseconds(seconds: Iterable[float], share: float) -> float:
    """Nearest-rank quantile; 0 of nothing."""
    ordered = sorted(seconds)
    if not ordered:
        return 0.0
    return round(ordered[min(len(ordered) - 1, int(share * len(ordered)))] * 1000, 1)


async def _show_progress(measured: dict[str, Measured], requests: int) -> None:
    if not sys.stderr.isatty():
        return
    try:
        while True:
            done = sum(one.requests for one in measured.values())
            tokens = sum(one.tokens for one in measured.values())
            sys.stderr.write(f"\r\x1b[K{done} of {requests} requests sent, {tokens} tokens received")
            sys.stderr.flush()
            await asyncio.sleep(_PROGRESS_SECONDS)
    finally:
        sys.stderr.write("\r\x1b[K")
