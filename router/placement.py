"""Which engine takes a request, and which engines an adapter should be on. PURE.

An adapter that is on devices goes to one of the engines that have it: to its homes first, which are as many of them as
its demand needs, and among those to the least loaded; to the others only while its homes are full. So a copy that is
not needed any more is not used any more, and the cache drops it when it wants the room. Homes are the first in the
adapter's own order of engines (rendezvous hashing): every router finds the same without asking, and an engine that
comes or goes moves only the adapters it has.

An adapter that is on no device goes to the first engine of its order, or to the second while that is clearly less
loaded (power of two choices, Mitzenmacher 2001): an adapter finds its way back to where its bytes and prefixes are, and
yet no engine is given much more than others.

A sequence whose adapter is loading holds no place: the engine lets it wait by itself, and it takes no part in a step.
But loads compete for the device, and their order should be the router's, so only so many adapters may load for a router
on an engine at a time. A load that takes longer than PATIENCE counts no more: however many downloads hang, others load.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import TypeVar

from router.accounts import Where

# Seconds after which a load does not keep other loads from beginning.
PATIENCE = 1.0
# How much more of its places an engine may have taken than another before that one is preferred.
_LEAN = 0.125
# The same for one that does not have the adapter and would be given a copy.
_COPY = 0.25


@dataclass(slots=True, eq=False)
class Places:
    """The places of one engine.

    Attributes:
        max_sequences: most that the engine runs, those of all routers together.
        limit: most that this router may have there now.
        held: sequences of this router that hold a place.
        kept: places that are kept for others than those who are asked about.
        loading: digests this router waits for there, with the time their load was first waited for.
        is_draining: it takes nothing new.
    """

    engine_id: str
    max_sequences: int
    limit: int = -1
    held: set[int] = field(default_factory=set)
    loading: dict[str, float] = field(default_factory=dict)
    is_draining: bool = False
    kept: int = 0

    def __post_init__(self) -> None:
        if self.limit < 0:
            self.limit = self.max_sequences

    @property
    def has_room(self) -> bool:
        return not self.is_draining and len(self.held) + self.kept < self.limit

    @property
    def has_room_for_all(self) -> bool:
        """Whether there is room beyond the places that may be kept."""
        return not self.is_draining and len(self.held) + self._few < self.limit

    def keep(self, *, for_newcomers: bool) -> None:
        """Keeps a few of its places, or none, for tenants that have nothing on engines."""
        self.kept = self._few if for_newcomers else 0

    @property
    def _few(self) -> int:
        return (self.max_sequences + 8) // 16

    @property
    def load(self) -> float:
        """Share of its places that is taken, by whichever router."""
        return 1 - (self.limit - len(self.held)) / self.max_sequences

    def has(self, where: Where) -> bool:
        """Whether an adapter that is on these engines is on this one."""
        return where is None or self.engine_id in where

    def may_load(self, digest: str, now: float) -> bool:
        """Whether one more request for an adapter that is not there may be sent."""
        if not self.has_room or digest in self.loading:
            return False
        return self.loads(now) < max(1, self.max_sequences // 2)

    def loads(self, now: float) -> int:
        """Loads under way that have not taken too long."""
        return sum(now - since < PATIENCE for since in self.loading.values())


P = TypeVar("P", bound=Places)


def order(digest: str, engines: Iterable[P]) -> list[P]:
    """All engines, the one an adapter belongs to first."""
    return sorted(engines, key=lambda places: _score(digest, places.engine_id), reverse=True)


def choose(digest: str, where: Where, engines: Sequence[P], now: float, homes: int = 1) -> P | None:
    """The engine for a request; None while none can take it.

    Args:
        digest: of its adapter; empty for the base.
        where: engines that have the adapter.
        homes: engines that its demand needs.
    """
    there = [places for places in engines if places.has(where)]
    if where is None:
        return _least_loaded(there)
    if there:
        ranked = order(digest, there)
        return _least_loaded(ranked[:homes]) or _least_loaded(ranked[homes:])
    ranked = order(digest, [places for places in engines if places.may_load(digest, now)])[:2]
    if len(ranked) == 2 and ranked[0].load > ranked[1].load + _LEAN:
        return ranked[1]
    return ranked[0] if ranked else None


def is_open(where: Where, engines: Iterable[Places], now: float) -> bool:
    """Whether an adapter that is on these engines, and that does not load yet where it is on none, can be sent."""
    if where:
        return any(places.has_room and places.has(where) for places in engines)
    if where is None:
        return any(places.has_room for places in engines)
    return any(places.may_load("", now) for places in engines)


def next_home(digest: str, where: Where, engines: Sequence[P], homes: int) -> P | None:
    """The engine an adapter should be brought to next; None when it need not.

    It should be on `homes` engines, and on one more when those it is on are as good as full and another is clearly less so:
    an engine that many adapters happen to belong to is relieved before anyone waits for it.
    """
    if where is None:
        return None
    there = [places for places in engines if places.has(where)]
    others = [places for places in engines if not places.is_draining and not places.has(where)]
    if len(there) >= homes:
        if any(places.has_room_for_all for places in there):
            return None
        least = min(places.load for places in there)
        others = [places for places in others if places.load <= least - _COPY]
    ranked = order(digest, others)[:2]
    if len(ranked) == 2 and ranked[0].load > ranked[1].load + _LEAN:
        return ranked[1]
    return ranked[0] if ranked else None


def homes_for(demand: int, homes: int, capacity: int, engines: int) -> int:
    """How many engines an adapter should be served by.

    Grows as soon as those it has could not run all its requests at once, and shrinks when half of one fewer could: a
    demand that swings around a boundary moves nothing.

    Args:
        demand: its requests, waiting and running.
        homes: how many it has now.
        capacity: sequences one engine runs.
        engines: how many there are.
    """
    most = max(1, engines)
    needed = min(most, max(1, -(-demand // capacity)))
    if needed > homes:
        return needed
    while homes > 1 and 2 * demand <= (homes - 1) * capacity:
        homes -= 1
    return min(homes, most)


class Demand:
    """Requests of each adapter that have not ended, and how many engines they need."""

    def __init__(self) -> None:
        self._requests: Counter[str] = Counter()
        # Of those that need more than one.
        self._homes: dict[str, int] = {}

    def count(self, digest: str) -> int:
        return self._requests[digest]

    def homes(self, digest: str) -> int:
        return self._homes.get(digest, 1)

    def add(self, digest: str, engines: Collection[Places]) -> None:
        """One more, with these engines."""
        self._requests[digest] += 1
        self._count(digest, engines)

    def remove(self, digest: str, engines: Collection[Places]) -> None:
        """One less."""
        self._requests[digest] -= 1
        self._count(digest, engines)
        if not self._requests[digest]:
            del self._requests[digest]

    def _count(self, digest: str, engines: Collection[Places]) -> None:
        if len(engines) < 2 and digest not in self._homes:
            return
        capacity = min((places.max_sequences for places in engines), default=1)
        homes = homes_for(self._requests[digest], self.homes(digest), capacity, len(engines))
        if homes > 1:
            self._homes[digest] = homes
        else:
            self._homes.pop(digest, None)


def _least_loaded(engines: Iterable[P]) -> P | None:
    return min((places for places in engines if places.has_room), key=lambda places: places.load, default=None)


def _score(digest: str, engine_id: str) -> bytes:
    return blake2b(f"{digest}/{engine_id}".encode(), digest_size=8).digest()
