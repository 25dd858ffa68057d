"""Python's garbage collector while a service runs."""

from __future__ import annotations

import asyncio
import gc
import weakref
from collections.abc import Iterator

import pytest

from servicekit.garbage import collect_when_idle, settle


class Node:
    """Refers to itself: only the collector can tell that it is garbage."""

    def __init__(self) -> None:
        self.me = self


@pytest.fixture(autouse=True)
def usual_collector() -> Iterator[None]:
    thresholds = gc.get_threshold()
    yield
    gc.set_threshold(*thresholds)
    gc.unfreeze()


def test_what_is_there_when_a_service_begins_is_not_looked_at_again_and_garbage_does_not_stay() -> None:
    garbage = weakref.ref(Node())
    kept = [[number] for number in range(10_000)]
    settle()
    assert garbage() is None
    assert gc.get_freeze_count() > len(kept)
    assert len(gc.get_objects()) < len(kept)


async def test_all_objects_are_looked_at_only_while_the_service_is_idle() -> None:
    idle = False
    full: list[str] = []

    def note(phase: str, info: dict[str, int]) -> None:
        if info["generation"] == 2:
            full.append(phase)

    collecting = asyncio.create_task(collect_when_idle(lambda: idle, every=0.01))
    await asyncio.sleep(0.05)
    gc.callbacks.append(note)
    try:
        # Enough that live for all generations to be collected several times.
        kept = [[[number]] for number in range(400_000)]
        garbage = weakref.ref(Node())
        gc.collect(1)
        await asyncio.sleep(0.05)
        assert not full and len(kept) == 400_000
        idle = True
        await asyncio.sleep(0.2)
        assert full and garbage() is None
    finally:
        gc.callbacks.remove(note)
        collecting.cancel()
