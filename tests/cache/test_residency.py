"""The residency machine: only moves of the tables are made."""

from __future__ import annotations

import pytest

from cache.errors import IllegalMove
from cache.residency import (
    DEVICE_MOVES,
    MOVES,
    DeviceMove,
    DevicePlace,
    Move,
    Place,
    device_moved,
    moved,
    retry_delay,
)


@pytest.mark.parametrize("place", Place)
@pytest.mark.parametrize("move", Move)
def test_only_moves_of_the_table_are_made(place: Place, move: Move) -> None:
    if (place, move) in MOVES:
        assert moved(place, move) is MOVES[place, move]
    else:
        with pytest.raises(IllegalMove):
            moved(place, move)


@pytest.mark.parametrize("place", DevicePlace)
@pytest.mark.parametrize("move", DeviceMove)
def test_only_device_moves_of_the_table_are_made(place: DevicePlace, move: DeviceMove) -> None:
    if (place, move) in DEVICE_MOVES:
        assert device_moved(place, move) is DEVICE_MOVES[place, move]
    else:
        with pytest.raises(IllegalMove):
            device_moved(place, move)


def test_retries_back_off_to_a_minute() -> None:
    assert [retry_delay(count, lambda: 0.0) for count in (1, 2, 3, 7, 100)] == [1, 2, 4, 60, 60]
    assert retry_delay(1, lambda: 1.0) == 1.25
