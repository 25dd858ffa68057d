"""Which engine takes a request. PURE.

The rule for adapters that are not on the device: their sequences may be dispatched, since the engine lets each wait by
itself and asks for its adapter, but they hold places meanwhile. So at most half the places of an engine are held by
sequences that have not started and whose adapter is not there. The other half always turns over, however long a load
takes.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TypeVar

from router.accounts import Where


@dataclass(slots=True, eq=False)
class Places:
    """The places of one engine.

    Attributes:
        taken: places held by this router's sequences.
        loading: those of them, by number of the sequence, that have not started and whose adapter is not on the device.
    """

    engine_id: str
    max_sequences: int
    taken: int = 0
    loading: set[int] = field(default_factory=set)

    @property
    def max_loading(self) -> int:
        return max(1, self.max_sequences // 2)

    def has(self, where: Where) -> bool:
        """Whether an adapter that is on these engines is on this one."""
        return where is None or self.engine_id in where

    @property
    def kept(self) -> int:
        """Places that are kept for tenants that have nothing on engines."""
        return (self.max_sequences + 8) // 16

    def can_take(self, where: Where, kept: int = 0) -> bool:
        has_room = self.taken + kept < self.max_sequences
        return has_room and (self.has(where) or len(self.loading) < self.max_loading)


P = TypeVar("P", bound=Places)


def choose(where: Where, engines: Iterable[P]) -> P | None:
    """The engine for an adapter that is on the engines `where`: one that has it, then the least loaded; None if all
    are full."""
    open_ = [places for places in engines if places.can_take(where)]
    return min(open_, key=lambda places: (not places.has(where), places.taken / places.max_sequences), default=None)
