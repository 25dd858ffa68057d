"""Where artifacts are and what should move: decided here, without devices, clocks or I/O.

Rules of this file:
1. Every change of an artifact's place is a row of MOVES or DEVICE_MOVES; any other move raises and changes nothing.
2. `plan` is a pure function. What is pinned, leased, in use or wanted is never evicted, and what it loads fits the budget.
3. What a router has asked for ahead (`expected`) is given up only for what a sequence already waits for: look-ahead must not
   push out look-ahead, and must not hold up a sequence either.

An artifact on a node:      REMOTE -> FETCHING -> DISK -> STAGING -> HOST, back down one tier at a time,
                            FETCHING or STAGING -> FAILED -> FETCHING.
An artifact on an engine:   ABSENT -> LOADING -> DEVICE -> EVICTING -> ABSENT. The engine is the truth about its device:
                            what it says is there is there (REPORTED), whatever we thought.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

from cache.errors import IllegalMove


class Place(Enum):
    """Where an artifact is on a node."""

    REMOTE = "remote"
    FETCHING = "fetching"
    DISK = "disk"
    STAGING = "staging"
    HOST = "host"
    FAILED = "failed"


class DevicePlace(Enum):
    """Where an artifact is on one engine."""

    ABSENT = "absent"
    LOADING = "loading"
    DEVICE = "device"
    EVICTING = "evicting"


class Move(Enum):
    """What can happen to an artifact on a node."""

    FIND = "find"
    FETCH = "fetch"
    STORE = "store"
    STAGE = "stage"
    STAGED = "staged"
    UNSTAGE = "unstage"
    DROP = "drop"
    FAIL = "fail"


class DeviceMove(Enum):
    """What can happen to an artifact on an engine."""

    LOAD = "load"
    LOADED = "loaded"
    LOAD_FAILED = "load_failed"
    EVICT = "evict"
    EVICTED = "evicted"
    KEPT = "kept"
    REPORTED = "reported"


MOVES: Mapping[tuple[Place, Move], Place] = {
    (Place.REMOTE, Move.FIND): Place.DISK,
    (Place.REMOTE, Move.FETCH): Place.FETCHING,
    (Place.FAILED, Move.FETCH): Place.FETCHING,
    (Place.FETCHING, Move.STORE): Place.DISK,
    (Place.FETCHING, Move.FAIL): Place.FAILED,
    (Place.DISK, Move.STAGE): Place.STAGING,
    (Place.DISK, Move.DROP): Place.REMOTE,
    (Place.STAGING, Move.STAGED): Place.HOST,
    # The host tier has no room after all; the file on disk is as good as before.
    (Place.STAGING, Move.UNSTAGE): Place.DISK,
    # The file on disk is damaged or gone.
    (Place.STAGING, Move.FAIL): Place.FAILED,
    (Place.HOST, Move.UNSTAGE): Place.DISK,
    (Place.FAILED, Move.DROP): Place.REMOTE,
}
DEVICE_MOVES: Mapping[tuple[DevicePlace, DeviceMove], DevicePlace] = {
    (DevicePlace.ABSENT, DeviceMove.LOAD): DevicePlace.LOADING,
    (DevicePlace.LOADING, DeviceMove.LOADED): DevicePlace.DEVICE,
    (DevicePlace.LOADING, DeviceMove.LOAD_FAILED): DevicePlace.ABSENT,
    (DevicePlace.DEVICE, DeviceMove.EVICT): DevicePlace.EVICTING,
    (DevicePlace.EVICTING, DeviceMove.EVICTED): DevicePlace.ABSENT,
    (DevicePlace.EVICTING, DeviceMove.KEPT): DevicePlace.DEVICE,
    # Not asked for: the engine says what is so.
    (DevicePlace.DEVICE, DeviceMove.EVICTED): DevicePlace.ABSENT,
    (DevicePlace.ABSENT, DeviceMove.REPORTED): DevicePlace.DEVICE,
}


def moved(place: Place, move: Move) -> Place:
    """The place after a move; raises IllegalMove."""
    if (place, move) not in MOVES:
        raise IllegalMove(place.value, move.value)
    return MOVES[place, move]


def device_moved(place: DevicePlace, move: DeviceMove) -> DevicePlace:
    """The place on an engine after a move; raises IllegalMove."""
    if (place, move) not in DEVICE_MOVES:
        raise IllegalMove(place.value, move.value)
    return DEVICE_MOVES[place, move]


@dataclass(frozen=True)
class Resident:
    """Something that takes room in a tier.

    Attributes:
        last_used: time of its last use, any unit that grows.
        kept: it is pinned, leased, in use, or on its way in or out; never evicted.
        expected: asked for ahead and not used yet; evicted only for something urgent.
    """

    digest: str
    size_bytes: int
    last_used: float
    kept: bool = False
    expected: bool = False


@dataclass(frozen=True)
class Wanted:
    """Something that should get room in a tier; urgent when a sequence waits for it."""

    digest: str
    size_bytes: int
    urgent: bool = False


@dataclass(frozen=True)
class Plan:
    """What to do now.

    Attributes:
        loads: fit into what is free, in the order wanted.
        evictions: make room for those of `waiting` that can be helped.
        waiting: do not fit yet.
        hopeless: are larger than the whole budget.
    """

    loads: tuple[str, ...]
    evictions: tuple[str, ...]
    waiting: tuple[str, ...]
    hopeless: tuple[str, ...]


class EvictionPolicy(Protocol):
    """Says in which order things are given up."""

    def order(self, candidates: Iterable[Resident]) -> Sequence[Resident]:
        """The candidates, the first to be evicted first."""
        ...


class LeastRecentlyUsed:
    """Gives up what was not used for longest."""

    def order(self, candidates: Iterable[Resident]) -> Sequence[Resident]:
        """The candidates by the time of their last use."""
        return sorted(candidates, key=lambda resident: (resident.last_used, resident.digest))


def plan(residents: Sequence[Resident], wanted: Sequence[Wanted], budget_bytes: int, policy: EvictionPolicy) -> Plan:
    """What to load into a tier and what to evict from it; `wanted` is in the order of importance.

    Loads are those that fit now; room that an eviction will make is used by the next plan, after the eviction was done.
    A wanted artifact that does not fit does not stop smaller ones behind it, unless room is being made for it: then what is
    free is kept for it, so that it cannot starve.
    """
    here = {resident.digest for resident in residents}
    keep = here & {want.digest for want in wanted}
    free = budget_bytes - sum(resident.size_bytes for resident in residents)
    victims = list(policy.order(r for r in residents if not r.kept and r.digest not in keep))
    loads: list[str] = []
    evictions: list[str] = []
    waiting: list[str] = []
    hopeless: list[str] = []
    for want in _without_repeats(wanted, here):
        if want.size_bytes > budget_bytes:
            hopeless.append(want.digest)
        elif want.size_bytes <= free:
            loads.append(want.digest)
            free -= want.size_bytes
        else:
            waiting.append(want.digest)
            chosen = _enough(victims, want.size_bytes - free, want.urgent)
            if chosen:
                evictions.extend(victim.digest for victim in chosen)
                victims = [victim for victim in victims if victim not in chosen]
                # What is free now is spoken for; the room that is being made is not there yet.
                free = 0
    return Plan(tuple(loads), tuple(evictions), tuple(waiting), tuple(hopeless))


def _without_repeats(wanted: Sequence[Wanted], here: set[str]) -> list[Wanted]:
    first: dict[str, Wanted] = {}
    for want in wanted:
        if want.digest not in here:
            first.setdefault(want.digest, want)
    return list(first.values())


def _enough(victims: Sequence[Resident], needed: int, urgent: bool) -> list[Resident]:
    """The first victims that together free `needed` bytes; none when all of them do not."""
    allowed = [victim for victim in victims if not victim.expected]
    if urgent:
        allowed += [victim for victim in victims if victim.expected]
    freed = 0
    for count, victim in enumerate(allowed, 1):
        freed += victim.size_bytes
        if freed >= needed:
            return allowed[:count]
    return []


def retry_delay(failures: int, jitter: Callable[[], float]) -> float:
    """Seconds to wait after so many failures in a row: 1, 2, 4 ... 60, each up to a quarter longer."""
    return float(min(60, 2 ** min(failures - 1, 6)) * (1 + jitter() / 4))
