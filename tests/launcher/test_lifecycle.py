"""States of the services."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launcher.errors import IllegalTransition
from launcher.lifecycle import Lifecycle, NeverStarted, Restart, State, TooManyDeaths
from launcher.restart import RestartPolicy

NEEDS = {"store": (), "cache": ("store",), "engine": ("store",), "router": ("cache", "engine")}


def lifecycle() -> Lifecycle:
    return Lifecycle(NEEDS, RestartPolicy(patience=2))


def test_a_service_starts_once_what_it_needs_has_answered() -> None:
    services = lifecycle()
    order = []
    while names := services.startable():
        order.append(names)
        for name in names:
            services.started(name)
        assert not services.startable() and not services.all_ready
        for name in names:
            services.answers(name)
    assert order == [["store"], ["cache", "engine"], ["router"]]
    assert services.all_ready


def test_what_died_before_it_answered_is_not_restarted() -> None:
    services = lifecycle()
    services.started("store")
    assert services.died("store", 0.0) == NeverStarted()
    assert services.states["store"] is State.LOST
    assert services.startable() == []


def test_what_died_later_is_restarted_until_patience_ends() -> None:
    services = lifecycle()
    verdicts = []
    for _ in range(3):
        services.started("store")
        services.answers("store")
        verdicts.append(services.died("store", 0.0))
    assert verdicts == [Restart(0.5), Restart(1.0), TooManyDeaths()]


def test_a_restart_that_dies_before_it_answers_counts_as_one_death_more() -> None:
    services = lifecycle()
    services.started("store")
    services.answers("store")
    assert services.died("store", 0.0) == Restart(0.5)
    services.started("store")
    assert services.died("store", 1.0) == Restart(1.0)
    # What needed it once goes on without it.
    assert services.startable() == ["cache", "engine"]


@given(st.lists(st.tuples(st.sampled_from(["started", "answers", "died"]), st.sampled_from(list(NEEDS)))))
def test_an_illegal_event_changes_nothing(events: list[tuple[str, str]]) -> None:
    services = lifecycle()
    for event, name in events:
        before = dict(services.states)
        arguments: tuple[Any, ...] = (name, 0.0) if event == "died" else (name,)
        try:
            getattr(services, event)(*arguments)
        except IllegalTransition:
            assert services.states == before
        else:
            assert services.states[name] is not before[name]
            assert {k: v for k, v in services.states.items() if k != name} == {
                k: v for k, v in before.items() if k != name
            }


def test_an_illegal_event_says_what_it_was() -> None:
    with pytest.raises(IllegalTransition, match="store is WAITING and cannot ANSWER"):
        lifecycle().answers("store")
