"""How requests come to one of several engines when nobody knows all queues: what stands before engines elsewhere."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from bench.fairness.cluster import Deal
from router.placement import Places, order

# How much more than its part an engine may have before adapters go past it.
_BOUND = 1.25


def in_turn() -> Deal:
    """Round robin."""
    turns = itertools.count()
    return lambda adapter, open_requests: next(turns) % len(open_requests)


def least_open() -> Deal:
    """The engine with the fewest requests; of several, in turn."""
    turns = itertools.count()

    def deal(adapter: str, open_requests: Sequence[int]) -> int:
        begin, count = next(turns), len(open_requests)
        return min(range(count), key=lambda number: (open_requests[number], (number - begin) % count))

    return deal


def affinity() -> Deal:
    """Each adapter has one home, by its hash."""
    return lambda adapter, open_requests: _order(adapter, len(open_requests))[0]


def bounded_affinity() -> Deal:
    """Consistent hashing with bounded loads (arXiv 1608.01350): the first engine in the adapter's order that does not have a
    quarter more than its part."""

    def deal(adapter: str, open_requests: Sequence[int]) -> int:
        count = len(open_requests)
        most = math.ceil(_BOUND * (sum(open_requests) + 1) / count)
        return next(number for number in _order(adapter, count) if open_requests[number] < most)

    return deal


def _order(adapter: str, count: int) -> list[int]:
    return [int(places.engine_id) for places in order(adapter, [Places(str(number), 1) for number in range(count)])]
