"""The residency machine and the plan: what must never happen, on hundreds of random states."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cache.errors import IllegalMove
from cache.residency import (
    DEVICE_MOVES,
    MOVES,
    DeviceMove,
    DevicePlace,
    LeastRecentlyUsed,
    Move,
    Place,
    Resident,
    Wanted,
    device_moved,
    moved,
    plan,
    retry_delay,
)

DIGESTS = [f"d{number}" for number in range(12)]
sizes = st.integers(1, 50)
residents = st.lists(
    st.builds(Resident, st.sampled_from(DIGESTS), sizes, st.integers(0, 9), st.booleans(), st.booleans()),
    unique_by=lambda resident: resident.digest,
)
wishes = st.lists(st.builds(Wanted, st.sampled_from(DIGESTS), sizes, st.booleans()), unique_by=lambda want: want.digest)


@given(residents, wishes, st.integers(0, 200))
def test_a_plan_keeps_what_is_kept_and_fits_the_budget(here: list[Resident], wanted: list[Wanted], spare: int) -> None:
    budget = sum(resident.size_bytes for resident in here) + spare
    decided = plan(here, wanted, budget, LeastRecentlyUsed())
    by_digest = {resident.digest: resident for resident in here}
    want_sizes = {want.digest: want.size_bytes for want in wanted}
    # Nothing kept and nothing wanted is evicted, nothing twice
    assert all(not by_digest[digest].kept and digest not in want_sizes for digest in decided.evictions)
    assert len(set(decided.evictions)) == len(decided.evictions)
    # What is expected goes only for something urgent
    if not any(want.urgent for want in wanted):
        assert not any(by_digest[digest].expected for digest in decided.evictions)
    # Loads fit into what is free now, before any eviction is done
    assert sum(want_sizes[digest] for digest in decided.loads) <= spare
    # Every wish not there yet is answered in exactly one way
    answers = [*decided.loads, *decided.waiting, *decided.hopeless]
    assert sorted(answers) == sorted(want_sizes.keys() - by_digest.keys())
    assert all((want_sizes[digest] > budget) == (digest in decided.hopeless) for digest in answers)


@given(residents, wishes, st.integers(0, 200))
def test_following_plans_ends_with_everything_loaded_that_can_be(
    here: list[Resident], wanted: list[Wanted], spare: int
) -> None:
    budget = sum(resident.size_bytes for resident in here) + spare
    state = {resident.digest: resident for resident in here}
    want_sizes = {want.digest: want.size_bytes for want in wanted}
    for _ in range(50):
        decided = plan(list(state.values()), wanted, budget, LeastRecentlyUsed())
        for digest in decided.evictions:
            del state[digest]
        for digest in decided.loads:
            state[digest] = Resident(digest, want_sizes[digest], 0, kept=True)
        assert sum(resident.size_bytes for resident in state.values()) <= budget
        if not decided.evictions and not decided.loads:
            break
    # What still waits could not be helped by evicting everything that may go for it
    urgent = {want.digest for want in wanted if want.urgent}
    for digest in decided.waiting:
        stays = [r for r in state.values() if r.kept or r.digest in want_sizes or (r.expected and digest not in urgent)]
        assert want_sizes[digest] > budget - sum(resident.size_bytes for resident in stays)


def test_the_least_recently_used_goes_first() -> None:
    here = [Resident("new", 10, 9.0, False), Resident("old", 10, 1.0, False), Resident("kept", 10, 0.0, True)]
    assert plan(here, [Wanted("x", 10)], 30, LeastRecentlyUsed()).evictions == ("old",)


def test_what_a_router_expects_goes_last_and_only_for_a_waiting_sequence() -> None:
    here = [Resident("ahead", 10, 1.0, expected=True), Resident("plain", 10, 9.0)]
    assert plan(here, [Wanted("x", 20)], 20, LeastRecentlyUsed()).evictions == ()
    assert plan(here, [Wanted("x", 10)], 20, LeastRecentlyUsed()).evictions == ("plain",)
    assert plan(here, [Wanted("x", 20, urgent=True)], 20, LeastRecentlyUsed()).evictions == ("plain", "ahead")


def test_a_wish_repeated_counts_once_where_it_was_first() -> None:
    decided = plan([], [Wanted("a", 5), Wanted("b", 5), Wanted("a", 5)], 10, LeastRecentlyUsed())
    assert decided.loads == ("a", "b")


def test_room_being_made_is_not_taken_by_those_behind() -> None:
    here = [Resident("old", 10, 1.0, False)]
    decided = plan(here, [Wanted("large", 12), Wanted("small", 2)], 13, LeastRecentlyUsed())
    assert decided == type(decided)(loads=(), evictions=("old",), waiting=("large", "small"), hopeless=())


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
