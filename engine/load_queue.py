"""Loads wait here for their turns, see turns.py, and are carried out. Belongs to the event loop."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

from engine.turns import Turns

T = TypeVar("T")


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
        # One CPU thread of torch's: more would be workers of its own, see engine/__main__.py. No nicer than the others:
        # a sequence may come to wait for a load that has begun, and niceness cannot be taken back.
        self._thread = ThreadPoolExecutor(1, "load", initializer=torch.set_num_threads, initargs=(1,))
        self._wanted: Sequence[str] = ()
        self._later: asyncio.TimerHandle | None = None

    def heed(self, wanted: Sequence[str]) -> None:
        """Takes over what sequences wait for, the first most."""
        self._wanted = wanted
        self._advance()

    async def load(self, digest: str, work: Callable[[], T]) -> T:
        """Does the work, which blocks, when it is this adapter's turn; never beside another's."""
        ticket = self._turns.ask(digest)
        self._told[ticket] = told = self._events.create_future()
        self._advance()
        try:
            await told
        except asyncio.CancelledError:
            self._end(ticket)
            raise
        working = self._events.run_in_executor(self._thread, work)
        working.add_done_callback(lambda _: self._end(ticket))
        # Work that has begun cannot be interrupted: the turn lasts until it is done, whoever still waits for it.
        return await asyncio.shield(working)

    def _end(self, ticket: int) -> None:
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
