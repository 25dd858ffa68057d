"""Choice of an engine."""

from __future__ import annotations

import random
from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from router.placement import PATIENCE, Places, choose, homes_for, is_open, next_home, order

COLD: frozenset[str] = frozenset()


def taken(engine_id: str, most: int, count: int) -> Places:
    return Places(engine_id, most, held=set(range(count)))


def test_an_engine_that_has_the_adapter_is_preferred_to_an_idle_one() -> None:
    busy, idle = taken("busy", 8, 7), Places("idle", 8)
    assert choose("d", frozenset({"busy"}), [idle, busy], 0.0) is busy
    # And waited for: another gets it only when it is brought there
    busy.held.add(7)
    assert choose("d", frozenset({"busy"}), [idle, busy], 0.0) is None
    assert choose("d", frozenset({"busy", "idle"}), [idle, busy], 0.0) is idle


def test_the_base_goes_to_the_least_loaded() -> None:
    small, large = taken("small", 2, 1), taken("large", 32, 2)
    assert choose("", None, [small, large], 0.0) is large
    # Whoever loads it
    large.limit = 10
    assert choose("", None, [small, large], 0.0) is small


def test_a_load_holds_no_place_and_counts_for_a_moment() -> None:
    engine = Places("e", 4)
    engine.loading = {"a": 0.0, "b": 0.0}
    assert choose("c", COLD, [engine], 0.5) is None and not is_open(COLD, [engine], 0.5)
    assert choose("", None, [engine], 0.5) is engine and is_open(None, [engine], 0.5)
    assert choose("a", frozenset({"e"}), [engine], 0.5) is engine
    # However many hang, others load
    assert choose("c", COLD, [engine], PATIENCE) is engine and is_open(COLD, [engine], PATIENCE)


def test_an_engine_of_one_place_still_loads() -> None:
    assert choose("d", COLD, [Places("e", 1)], 0.0)


def test_a_full_or_draining_engine_takes_nothing() -> None:
    for engine in (taken("e", 3, 3), Places("e", 3, is_draining=True), Places("e", 3, limit=0)):
        assert choose("", None, [engine], 0.0) is choose("d", COLD, [engine], 0.0) is None
        assert not is_open(None, [engine], 0.0) and not is_open(COLD, [engine], 0.0)
    assert choose("", None, [], 0.0) is None


engine_lists = st.lists(
    st.builds(
        lambda n, most, held, limit, drains, loads: Places(
            f"e{n}", most, min(limit, most), set(range(min(held, most))), dict.fromkeys(map(str, range(loads)), 0.0), drains
        ),
        st.integers(0, 9), st.integers(1, 6), st.integers(0, 6), st.integers(0, 6), st.booleans(), st.integers(0, 3),
    ),
    max_size=6, unique_by=lambda places: places.engine_id,
)  # fmt: skip
wheres = st.none() | st.frozensets(st.sampled_from([f"e{n}" for n in range(10)]))


@given(engine_lists, wheres, st.integers(1, 4))
def test_what_is_chosen_has_room_and_whoever_is_open_is_placed(
    engines: list[Places], where: frozenset[str] | None, homes: int
) -> None:
    chosen = choose("digest", where, engines, 0.5, homes)
    known = where and where & {places.engine_id for places in engines}
    assert (chosen is not None) == is_open(known, engines, 0.5)
    if chosen is not None:
        assert chosen.has_room and chosen in engines
        assert chosen.has(where) or not any(places.has(where) for places in engines)
        assert chosen.has(where) or chosen.loads(0.5) < max(1, chosen.max_sequences // 2)


@given(st.lists(st.integers(0, 400), max_size=30), st.integers(1, 32), st.integers(1, 8))
def test_homes_follow_demand_up_at_once_and_down_with_slack(demands: list[int], capacity: int, engines: int) -> None:
    homes = 1
    for demand in demands:
        before, homes = homes, homes_for(demand, homes, capacity, engines)
        assert 1 <= homes <= engines
        # Enough for all of it, where there are enough engines
        assert homes == engines or homes * capacity >= demand
        # And it stays where it is while the same demand lasts
        assert homes_for(demand, homes, capacity, engines) == homes
        if homes < before:
            assert 2 * demand <= homes * capacity
    assert homes_for(0, homes, capacity, engines) == 1


def test_a_demand_that_swings_around_a_boundary_moves_nothing() -> None:
    homes, moves = 1, 0
    for n in range(1000):
        before, homes = homes, homes_for(33 if n % 2 else 31, homes, 32, 4)
        moves += homes != before
    assert moves == 1


def test_the_next_home_is_one_that_does_not_have_it() -> None:
    engines = [Places(f"e{n}", 8) for n in range(4)]
    first = next_home("d", COLD, engines, 1)
    assert first is order("d", engines)[0]
    assert first is not None and next_home("d", frozenset({first.engine_id}), engines, 1) is None
    second = next_home("d", frozenset({first.engine_id}), engines, 2)
    assert second is order("d", engines)[1]
    assert next_home("", None, engines, 4) is None


def test_an_adapter_on_a_busy_engine_is_brought_to_one_that_is_clearly_less_busy() -> None:
    busy, other = taken("busy", 32, 30), taken("other", 32, 22)
    assert next_home("d", frozenset({"busy"}), [busy, other], 1) is other
    # The last places are kept for newcomers: an engine is as good as full before they are taken
    assert busy.has_room
    # Not where there is enough room as it is, nor to one that is little better off
    busy.held = set(range(27))
    assert next_home("d", frozenset({"busy"}), [busy, other], 1) is None
    busy.held = set(range(30))
    other.held = set(range(23))
    assert next_home("d", frozenset({"busy"}), [busy, other], 1) is None


def test_an_engine_that_goes_moves_only_its_own_adapters() -> None:
    engines = [Places(f"e{n}", 8) for n in range(5)]
    for n in range(500):
        before = order(str(n), engines)
        after = order(str(n), engines[1:])
        assert after == [places for places in before if places is not engines[0]]
    firsts = Counter(order(str(n), engines)[0].engine_id for n in range(2000))
    assert min(firsts.values()) > 300


def test_many_adapters_are_spread_evenly_and_copied_no_more_than_their_demand_needs() -> None:
    """Ten thousand requests by a Zipf law, at nine tenths of what four engines can run; adapters arrive when asked for."""
    chance = random.Random(7)
    engines = [Places(f"e{n}", 16) for n in range(4)]
    weights = [1 / (rank + 1) for rank in range(200)]
    resident: dict[str, set[str]] = {}
    homes: dict[str, int] = {}
    demand: Counter[str] = Counter()
    running: list[tuple[Places, int, str]] = []
    loads, refused, imbalance = 0, 0, []
    for number, pick in enumerate(chance.choices(range(200), weights, k=10_000)):
        digest = str(pick)
        demand[digest] += 1
        homes[digest] = homes_for(demand[digest], homes.get(digest, 1), 16, 4)
        where = frozenset(resident.get(digest, ()))
        if home := next_home(digest, where, engines, homes[digest]):
            resident.setdefault(digest, set()).add(home.engine_id)
            loads += 1
        chosen = choose(digest, frozenset(resident[digest]), engines, 0.0, homes[digest])
        if chosen is None:
            refused += 1
            demand[digest] -= 1
        else:
            chosen.held.add(number)
            running.append((chosen, number, digest))
        while len(running) > 57:
            places, ended, done = running.pop(chance.randrange(len(running)))
            places.held.discard(ended)
            demand[done] -= 1
        imbalance.append(max(places.load for places in engines) - min(places.load for places in engines))
    # Most are on one or two engines, nearly everyone gets a place at once, and no engine is left out
    assert loads < 2.5 * 200, loads
    assert refused < 0.05 * 10_000, refused
    assert sum(imbalance) / len(imbalance) < 0.5
