"""Whose turn it is to be brought to the device. No I/O, no clock, no threads.

One at a time, as steps share processors, memory and Python's lock with whoever loads. What sequences wait for has its turn
at once, in the order they asked; what nobody waits for yet comes after it, first come, first served, and rests after each
turn while sequences run, so that most steps have nothing beside them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

# So many times as long as a turn has taken.
REST = 3.0


class Turns:
    """See the module. Tickets are names of who waits for a turn."""

    def __init__(self) -> None:
        self._waiting: dict[int, str] = {}
        self._tickets = itertools.count(1)
        self._holder: int | None = None
        self._began = 0.0
        self._rested = -math.inf

    def ask(self, digest: str) -> int:
        """Waits for a turn; returns the ticket."""
        ticket = next(self._tickets)
        self._waiting[ticket] = digest
        return ticket

    def give(self, wanted: Sequence[str], is_running: bool, now: float) -> tuple[int | None, float]:
        """The ticket whose turn begins now, if any; else seconds until there may be one, infinity for not before a change.

        Args:
            wanted: what sequences wait for, the first most.
            is_running: whether sequences run, which a load would disturb.
        """
        if self._holder is not None or not self._waiting:
            return None, math.inf
        place = {digest: number for number, digest in enumerate(wanted)}
        ticket = min(self._waiting, key=lambda each: (place.get(self._waiting[each], math.inf), each))
        rest = self._rested - now
        if self._waiting[ticket] not in place and is_running and rest > 0:
            return None, rest
        del self._waiting[ticket]
        self._holder, self._began = ticket, now
        return ticket, 0.0

    def end(self, ticket: int, now: float) -> None:
        """A turn is over, or is not waited for any more."""
        self._waiting.pop(ticket, None)
        if ticket == self._holder:
            self._holder = None
            self._rested = now + REST * (now - self._began)
