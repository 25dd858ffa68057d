"""Where artifacts can be, and how they get from one place to another. No devices, clocks or I/O.

Every change of an artifact's place is a row of MOVES or DEVICE_MOVES; any other move raises and changes nothing. What should
move is decided in cache/plan.py.

An artifact on a node:      REMOTE -> FETCHING -> DISK -> STAGING -> HOST, back down one tier at a time,
                            FETCHING or STAGING -> FAILED -> FETCHING.
An artifact on an engine:   ABSENT -> LOADING -> DEVICE -> EVICTING -> ABSENT. The engine is the truth about its device:
                            what it says is there is there (REPORTED), whatever we thought.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from enum import Enum

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


def retry_delay(failures: int, jitter: Callable[[], float]) -> float:
    """Seconds to wait after so many failures in a row: 1, 2, 4 ... 60, each up to a quarter longer."""
    return float(min(60, 2 ** min(failures - 1, 6)) * (1 + jitter() / 4))
