"""Choice of an engine."""

from __future__ import annotations

from router.placement import Places, choose

COLD: frozenset[str] = frozenset()


def test_an_engine_that_has_the_adapter_is_preferred_to_an_idle_one() -> None:
    busy, idle = Places("busy", 8, taken=7), Places("idle", 8)
    assert choose(frozenset({"busy"}), [idle, busy]) is busy
    busy.taken = 8
    assert choose(frozenset({"busy"}), [idle, busy]) is idle


def test_the_base_goes_to_the_least_loaded() -> None:
    small, large = Places("small", 2, taken=1), Places("large", 32, taken=2)
    assert choose(None, [small, large]) is large


def test_loading_sequences_hold_half_the_places_at_most() -> None:
    engine = Places("e", 8, taken=4, loading={1, 2, 3, 4})
    assert choose(COLD, [engine]) is None
    assert choose(None, [engine]) is engine
    assert choose(frozenset({"e"}), [engine]) is engine
    engine.loading.pop()
    assert choose(COLD, [engine]) is engine


def test_an_engine_of_one_place_still_loads() -> None:
    assert choose(COLD, [Places("e", 1)])


def test_a_full_engine_takes_nothing() -> None:
    assert choose(None, [Places("e", 3, taken=3)]) is None
    assert choose(None, []) is None
