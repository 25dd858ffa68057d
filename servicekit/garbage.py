"""Python's garbage collector, kept away from those who wait: no thread of the process runs while it looks at all objects.

What a service has made by the time it serves, some hundred thousand objects for the libraries alone, stays until it ends:
it is looked at once and never again.
"""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import Callable

LOOK_SECONDS = 60.0
# What is never idle is collected all the same, so rarely that nobody notices.
LONGEST_SECONDS = 3600.0


def settle() -> None:
    """Collects what is garbage now, and takes all else to stay."""
    gc.collect()
    gc.freeze()


async def collect_when_idle(is_idle: Callable[[], bool], every: float = LOOK_SECONDS) -> None:
    """Collects all generations only while a service has nothing to do, for ever; young objects as ever."""
    settle()
    young, middle, _ = gc.get_threshold()
    gc.set_threshold(young, middle, 1 << 30)
    last = time.monotonic()
    while True:
        await asyncio.sleep(every)
        if is_idle() or time.monotonic() - last > LONGEST_SECONDS:
            settle()
            last = time.monotonic()
