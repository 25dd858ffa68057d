"""What a node needs of its artifacts now, as its engines and its operators say. No I/O, no clock."""

from __future__ import annotations

import math
from collections.abc import Iterable, Set
from dataclasses import dataclass

from cache.engines import Engine
from cache.residency import DevicePlace


@dataclass(frozen=True)
class Demand:
    """Digests that are needed.

    Attributes:
        kept: used, waited for or pinned: never given up.
        passing: on their way to somewhere, and kept until they are there.
        soon: what waits in the routers' queues, the longest first, then what devices hold, the last used first: a device gives
            things up all the time, and should find them near.
    """

    kept: Set[str]
    passing: Set[str]
    soon: tuple[str, ...]


def demand_of(engines: Iterable[Engine], pinned: Set[str], passing: Set[str]) -> Demand:
    """What engines need, and others besides."""
    kept = set(pinned)
    since: dict[str, float] = {}
    used: dict[str, float] = {}
    for engine in engines:
        kept |= engine.wants.keys() | engine.in_use
        for digest, expected in engine.expected.items():
            since[digest] = min(since.get(digest, math.inf), expected.since)
        for digest, entry in engine.device.items():
            used[digest] = max(used.get(digest, -math.inf), entry.last_used)
            if entry.place is DevicePlace.LOADING:
                kept.add(digest)
    waiting = sorted(since, key=lambda digest: since[digest])
    on_devices = sorted(used.keys() - since.keys(), key=lambda digest: (-used[digest], digest))
    return Demand(frozenset(kept), passing - kept, (*waiting, *on_devices))
