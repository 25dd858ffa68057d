"""Loads wait here for their turns, see turns.py. Belongs to the event loop."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager

from engine.turns import Turns


class LoadQueue:
    """See the module.

    Args:
        is_running: whether sequences run.
    """

    def __init__(self, is_running: Callable[[], bool]) -> None:
        self._events = asyncio.get_running_loop()
        self._is_running = is_running
        self._turns = Turns()
        self._told: dict[int, asyncio.Future[None]] = {}
        self._wanted: Sequence[str] = ()
        self._later: asyncio.TimerHandle | None = None

    def heed(self, wanted: Sequence[str]) -> None:
        """Takes over what sequences wait for, the first most."""
        self._wanted = wanted
        self._advance()

    @asynccontextmanager
    async def turn(self, digest: str) -> AsyncIterator[None]:
        """Waits until it is this adapter's turn, which lasts as long as the block."""
        ticket = self._turns.ask(digest)
        self._told[ticket] = told = self._events.create_future()
        try:
            self._advance()
            await told
            yield
        finally:
            del self._told[ticket]
            self._turns.end(ticket, time.monotonic())
            self._advance()

    def _advance(self) -> None:
        if self._later is not None:
            self._later.cancel()
            self._later = None
        ticket, wait = self._turns.give(self._wanted, self._is_running(), time.monotonic())
        if ticket is not None and not self._told[ticket].done():
            # Who does not wait any more ends the turn.
            self._told[ticket].set_result(None)
        elif wait < math.inf:
            self._later = self._events.call_later(wait, self._advance)
