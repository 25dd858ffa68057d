"""What this router has served that others do not know of, and what they have. PURE.

Routers that share engines share charges: each tells what it has served of a flow once that comes to a quantum, and takes
over what the others tell. A charge is then at most a quantum, and what is served in one interval of telling, behind for
each other router; so the bound of flows.py grows by that much for each router. A router that ends without a word loses no
more than that either: one that begins reads how far each flow was ahead, and goes on from there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

MICRO = 1_000_000

# A tenant and the digest of an adapter.
Name = tuple[str, str]


@dataclass(frozen=True)
class Elsewhere:
    """Weighted tokens, before weights, that other routers have served of flows."""

    served: Mapping[Name, int]


@dataclass(frozen=True)
class Begun:
    """How far flows, and their tenants, were ahead of others, in weighted tokens, when a router told of them last."""

    leads: Mapping[Name, tuple[int, int]]


class Ledger:
    """Whole weighted tokens are told; what is less stays here."""

    def __init__(self, quantum: int) -> None:
        self._quantum = quantum * MICRO
        self._untold: dict[Name, int] = {}
        self._known: dict[Name, int] = {}

    def note(self, name: Name, cost: int) -> None:
        """A flow has been served; a negative cost takes something back. In micro-tokens."""
        untold = self._untold.get(name, 0) + cost
        if untold:
            self._untold[name] = untold
        else:
            self._untold.pop(name, None)

    def untold(self, name: Name) -> int:
        """Micro-tokens that others do not know of."""
        return self._untold.get(name, 0)

    def take(self, *, all_of_it: bool = False) -> dict[Name, int]:
        """What is to be told now, in weighted tokens; it counts as told."""
        least = MICRO if all_of_it else self._quantum
        told = {name: int(cost / MICRO) for name, cost in self._untold.items() if abs(cost) >= least}
        for name, tokens in told.items():
            self.note(name, -tokens * MICRO)
        return told

    def put_back(self, told: Mapping[Name, int]) -> None:
        """It could not be told."""
        for name, tokens in told.items():
            self.note(name, tokens * MICRO)

    def begin(self, served: Mapping[Name, int]) -> None:
        """All that was served before this router knew of anything."""
        self._known = dict(served)

    def learn(self, served: Mapping[Name, int], told: Mapping[Name, int]) -> dict[Name, int]:
        """Takes in the totals of all routers; returns what others have served since, in weighted tokens."""
        news: dict[Name, int] = {}
        for name, total in served.items():
            by_others = total - self._known.get(name, 0) - told.get(name, 0)
            self._known[name] = total
            # Totals begin again where they were forgotten.
            if by_others > 0:
                news[name] = by_others
        return news
