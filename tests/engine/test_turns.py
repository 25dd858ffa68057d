"""Whose turn it is to be brought to the device."""

from __future__ import annotations

import math
from collections.abc import Sequence

from hypothesis import given, settings
from hypothesis import strategies as st

from engine.turns import REST, Turns


def test_one_at_a_time_in_the_order_they_came() -> None:
    turns = Turns()
    first, second = turns.ask("a"), turns.ask("b")
    assert turns.give((), False, 0.0) == (first, 0.0)
    assert turns.give((), False, 5.0) == (None, math.inf)
    turns.end(first, 6.0)
    assert turns.give((), False, 6.0) == (second, 0.0)


def test_what_sequences_wait_for_goes_first_the_most_wanted_of_it_before_the_rest() -> None:
    turns = Turns()
    tickets = {digest: turns.ask(digest) for digest in "abcd"}
    order = []
    for moment in range(4):
        ticket, _ = turns.give(("d", "b"), False, float(moment))
        assert ticket is not None
        turns.end(ticket, float(moment))
        order.append(ticket)
    assert order == [tickets[digest] for digest in "dbac"]


def test_what_nobody_waits_for_rests_while_sequences_run_and_only_then() -> None:
    turns = Turns()
    first, second = turns.ask("a"), turns.ask("b")
    turns.give((), True, 10.0)
    turns.end(first, 12.0)
    assert turns.give((), True, 13.0) == (None, 2.0 * REST - 1.0)
    assert turns.give((), False, 13.0) == (second, 0.0)


def test_what_a_sequence_waits_for_does_not_rest() -> None:
    turns = Turns()
    first, _, third = turns.ask("a"), turns.ask("b"), turns.ask("c")
    turns.give((), True, 10.0)
    turns.end(first, 12.0)
    assert turns.give(("c",), True, 12.0) == (third, 0.0)


def test_who_has_given_up_waiting_gets_no_turn_and_its_turn_goes_on_to_the_next() -> None:
    turns = Turns()
    first, second, third = turns.ask("a"), turns.ask("b"), turns.ask("c")
    turns.end(second, 0.0)
    assert turns.give((), False, 0.0)[0] == first
    turns.end(first, 1.0)
    assert turns.give((), False, 1.0)[0] == third
    turns.end(third, 2.0)
    assert turns.give((), False, 2.0) == (None, math.inf)


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("ask"), st.sampled_from("abcde")),
        st.tuples(st.just("end"), st.integers(0, 5)),
        st.tuples(st.just("want"), st.lists(st.sampled_from("abcde"), unique=True)),
        st.tuples(st.just("pass"), st.floats(0.0, 2.0)),
        st.tuples(st.just("run"), st.booleans()),
    ),
    max_size=60,
)


@settings(max_examples=500, deadline=None)
@given(STEPS)
def test_nobody_is_forgotten_and_no_two_turns_overlap(steps: list[tuple[str, object]]) -> None:
    turns, now, running = Turns(), 0.0, False
    wanted: Sequence[str] = ()
    waiting: dict[int, str] = {}
    holder: tuple[int, float] | None = None
    rested = 0.0
    for what, value in steps:
        if what == "ask":
            waiting[turns.ask(str(value))] = str(value)
        elif what == "want":
            assert isinstance(value, list)
            wanted = value
        elif what == "pass":
            assert isinstance(value, float)
            now += value
        elif what == "run":
            running = bool(value)
        elif holder is not None:
            turns.end(holder[0], now)
            rested, holder = now + REST * (now - holder[1]), None
        ticket, wait = turns.give(wanted, running, now)
        if ticket is None:
            # There is a reason for it: a turn under way, nobody there, or a rest, which ends.
            assert holder or not waiting or (running and now < rested and not set(waiting.values()) & set(wanted))
            assert wait > 0 and (holder is not None or not waiting or now + wait >= rested)
            continue
        assert holder is None
        digest = waiting.pop(ticket)
        assert digest in wanted or not set(waiting.values()) & set(wanted)
        holder = (ticket, now)
    for _ in range(len(waiting) + 1):
        if holder is not None:
            turns.end(holder[0], now)
        ticket, _ = turns.give((), False, now)
        holder = (ticket, now) if ticket is not None else None
        waiting.pop(ticket or 0, None)
    assert not waiting
