"""python -m demo: starts everything, streams through the base and every demo adapter at once, prints tables, stops."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from demo.catalog import Catalog, load_catalog
from demo.screen import Screen, wrapped_table
from launcher import demo_adapters
from launcher.errors import LauncherError
from launcher.options import parse_options
from launcher.progress import Progress
from launcher.supervisor import Supervisor
from launcher.up import Prepared, prepare
from loraplex import AsyncClient, LoraplexError

OUTPUT_TOKENS = 48
BASE = "(base)"
HEADERS = ("adapter", "prompt", "answer", "first token", "tokens/s")
WIDE = {"prompt": 0.4, "answer": 0.6}


class DemoFailed(Exception):
    """Raised when the demo cannot show what it is for; its text is one line for people."""


@dataclass(frozen=True)
class Question:
    """A prompt for an adapter; the base's id is empty."""

    adapter_id: str
    prompt: str

    @property
    def name(self) -> str:
        """How it is shown."""
        return self.adapter_id or BASE


@dataclass(frozen=True)
class Told:
    """An answer, and how long it took in seconds from the moment it was asked for."""

    question: Question
    text: str
    tokens: int
    first: float
    total: float

    @property
    def rate(self) -> float:
        """Tokens per second after the first one."""
        return (self.tokens - 1) / (self.total - self.first) if self.total > self.first else 0.0

    @property
    def row(self) -> tuple[str, ...]:
        """As a line of the table."""
        question = self.question
        return question.name, question.prompt, self.text, f"{self.first * 1000:.0f} ms", f"{self.rate:.1f}"


def main() -> int:
    """Returns the exit code."""
    progress = Progress(sys.stdout)
    folder = Path(tempfile.mkdtemp(prefix="loraplex-demo-"))
    try:
        options = parse_options([*sys.argv[1:], "--port", "0", "--data-dir", str(folder)], os.environ)
        prepared = prepare(options, progress)
        try:
            return asyncio.run(_run(prepared, progress))
        finally:
            prepared.layout.close()
            shutil.rmtree(prepared.layout.host_tier, ignore_errors=True)
    except (LauncherError, LoraplexError, DemoFailed) as error:
        progress.clear()
        sys.stderr.write(f"demo: {' '.join(str(error).split())}\n")
        return 1
    except KeyboardInterrupt:
        return 130
    finally:
        shutil.rmtree(folder, ignore_errors=True)


async def _run(prepared: Prepared, progress: Progress) -> int:
    """Shows the demo beside the running services; a service that dies, or a signal, ends it."""
    supervisor = Supervisor(prepared.services, prepared.layout, progress)
    showing = asyncio.create_task(_show(supervisor, prepared.address, progress))
    interrupted = asyncio.Event()

    def on_signal() -> None:
        interrupted.set()
        showing.cancel()
        supervisor.stop()

    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, on_signal)
    showing.add_done_callback(lambda done: None if interrupted.is_set() else supervisor.stop())
    try:
        await supervisor.run()
    finally:
        showing.cancel()
        await asyncio.gather(showing, return_exceptions=True)
    if interrupted.is_set():
        return 130
    showing.result()
    return 0


async def _show(supervisor: Supervisor, address: str, progress: Progress) -> None:
    await supervisor.ready.wait()
    outcome = await demo_adapters.register(address)
    if outcome.problems:
        raise DemoFailed("; ".join(outcome.problems))
    progress.line(f"{'adapters':10} {len(outcome.registered)} registered: {', '.join(outcome.registered)}")
    catalog = load_catalog()
    async with AsyncClient(address) as client:
        for title, questions in _rounds(catalog):
            print(f"\n{title}\n", flush=True)
            await _round(client, questions)
    print()


def _rounds(catalog: Catalog) -> list[tuple[str, list[Question]]]:
    ids = ["", *(adapter.id for adapter in catalog.adapters)]
    own = [Question(adapter.id, adapter.prompt) for adapter in catalog.adapters]
    return [
        (
            f"One prompt, the base and {len(own)} adapters at once: {catalog.shared_prompt}",
            [Question(adapter_id, catalog.shared_prompt) for adapter_id in ids],
        ),
        ("Each adapter's own task, again at once:", own),
    ]


async def _round(client: AsyncClient, questions: Sequence[Question]) -> None:
    screen = Screen([question.name for question in questions])
    began = time.monotonic()
    tasks = [asyncio.create_task(_ask(client, question, screen)) for question in questions]
    try:
        told = await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
    elapsed = time.monotonic() - began
    print("\n" + wrapped_table(HEADERS, [one.row for one in told], WIDE))
    tokens = sum(one.tokens for one in told)
    print(f"{len(told)} answers, {tokens} tokens in {elapsed:.1f} s: {tokens / elapsed:.1f} tokens/s", flush=True)


async def _ask(client: AsyncClient, question: Question, screen: Screen) -> Told:
    began = time.monotonic()
    first, text = 0.0, ""
    stream = client.stream(
        messages=question.prompt, adapter=question.adapter_id, max_output_tokens=OUTPUT_TOKENS, timeout=300
    )
    async for delta in stream:
        first = first or time.monotonic() - began
        text += delta.text
        screen.grow(question.name, text)
    tokens = stream.completion.usage.output_tokens
    told = Told(question, text, tokens, first, time.monotonic() - began)
    if not text.strip():
        raise DemoFailed(f"{question.name} answered nothing to {question.prompt!r}")
    screen.end(question.name, text, f"{tokens} tokens, the first after {first * 1000:.0f} ms")
    return told


if __name__ == "__main__":
    sys.exit(main())
