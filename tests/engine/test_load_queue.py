"""Loads take their turns on threads of their own."""

from __future__ import annotations

import asyncio
import threading
import time

import pytest

from engine.load_queue import LoadQueue


async def test_a_hundred_loads_nobody_waits_for_do_not_hold_up_the_one_a_sequence_waits_for() -> None:
    queue, begun = LoadQueue(lambda: True), threading.Event()
    done: list[str] = []

    def work(digest: str) -> None:
        begun.set()
        time.sleep(0.02)
        done.append(digest)

    async def load_ahead(number: int) -> None:
        await queue.load(f"ahead-{number}", lambda: work(f"ahead-{number}"))

    ahead = [asyncio.create_task(load_ahead(number)) for number in range(100)]
    await asyncio.to_thread(begun.wait)
    queue.heed(["waited-for"])
    began = time.monotonic()
    await queue.load("waited-for", lambda: work("waited-for"))
    # Alone it takes 20 ms. All that may come before it is the one that was under way.
    assert done.index("waited-for") <= 2
    assert time.monotonic() - began < 1.0
    for task in ahead:
        task.cancel()
    await asyncio.gather(*ahead, return_exceptions=True)


async def test_one_that_waits_already_goes_at_once_when_a_sequence_comes_to_wait_for_it() -> None:
    queue = LoadQueue(lambda: True)
    await queue.load("before", lambda: time.sleep(0.5))
    # A rest of 1.5 s has begun.
    loading = asyncio.create_task(queue.load("a", time.monotonic))
    await asyncio.sleep(0.01)
    began = time.monotonic()
    queue.heed(["a"])
    assert await loading - began < 0.5


async def test_without_running_sequences_nothing_rests() -> None:
    queue = LoadQueue(lambda: False)
    began = time.monotonic()
    for number in range(5):
        await queue.load(str(number), lambda: time.sleep(0.05))
    assert time.monotonic() - began < 0.25 + 0.5


async def test_work_that_fails_or_is_given_up_lets_the_next_one_in_when_it_is_over() -> None:
    queue = LoadQueue(lambda: False)
    running: list[str] = []
    begun = threading.Event()

    def fail() -> None:
        raise ValueError("broken")

    def long() -> None:
        running.append("long")
        begun.set()
        time.sleep(0.3)
        running.remove("long")

    with pytest.raises(ValueError, match="broken"):
        await queue.load("a", fail)
    given_up = asyncio.create_task(queue.load("b", long))
    waiting = asyncio.create_task(queue.load("c", lambda: None))
    await asyncio.to_thread(begun.wait)
    given_up.cancel()
    waiting.cancel()
    # Not beside the work that nobody waits for any more: it cannot be interrupted.
    assert await queue.load("d", lambda: list(running)) == []
