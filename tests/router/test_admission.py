"""Who may wait, who gives way, and when to come back."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router.admission import Admit, Limits, Newcomer, Reject, admit, expected_wait, too_late
from router.flows import Flows, Tariff
from router.rate import Pace, ServiceRate

LIMITS = Limits(100, 40, 60, 100_000, 40_000, 60_000)


def flows_with(*backlogs: tuple[str, str, int], tokens: int = 10, weights: dict[str, float] | None = None) -> Flows:
    flows = Flows(Tariff.of(1, 2), tenant_weights=weights)
    for tenant, digest, count in backlogs:
        for _ in range(count):
            flows.enqueue(tenant, digest, 1.0, None, tokens)
    return flows


def refused(decision: Admit | Reject) -> Reject:
    assert isinstance(decision, Reject)
    return decision


@pytest.mark.parametrize(
    "backlog, newcomer, reason, limit",
    [
        (("t", "a", 40), Newcomer("t", "b", 1), "TENANT_QUEUE_FULL", 40),
        (("t", "a", 39), Newcomer("t", "b", 39_990), "TENANT_TOKENS_FULL", 40_000),
    ],
)
def test_a_tenant_that_has_enough_waiting_is_refused(
    backlog: tuple[str, str, int], newcomer: Newcomer, reason: str, limit: int
) -> None:
    decision = refused(admit(LIMITS, flows_with(backlog), newcomer, 10.0))
    assert (decision.reason, decision.limit) == (reason, limit)
    assert isinstance(admit(LIMITS, flows_with(backlog), replace(newcomer, tenant="u", prompt_tokens=1), 10.0), Admit)


def test_an_adapter_that_has_enough_waiting_is_refused_to_every_tenant() -> None:
    flows = flows_with(("t", "a", 30), ("u", "a", 30))
    assert refused(admit(LIMITS, flows, Newcomer("v", "a", 1), 10.0)).reason == "ADAPTER_QUEUE_FULL"
    assert isinstance(admit(LIMITS, flows, Newcomer("v", "b", 1), 10.0), Admit)


def test_one_request_may_wait_however_long_it_is() -> None:
    assert isinstance(admit(LIMITS, flows_with(), Newcomer("t", "a", 10**6), 10.0), Admit)


def test_a_full_queue_makes_room_for_who_asks_for_less() -> None:
    limits = replace(LIMITS, queued=30)
    flows = flows_with(("flood", "a", 25), ("other", "a", 5))
    decision = admit(limits, flows, Newcomer("modest", "a", 10), 10.0)
    # Then the latest of the flood gives way, and is told so
    assert isinstance(decision, Admit) and decision.instead_of and decision.refusal
    assert decision.instead_of.tenant == "flood" and decision.instead_of.number == 25
    assert decision.refusal.reason == "QUEUE_FULL" and decision.refusal.retry_after >= 0.1
    # And the flood itself gets no more in
    assert refused(admit(limits, flows, Newcomer("flood", "a", 10), 10.0)).reason == "QUEUE_FULL"


def test_with_more_weight_one_may_ask_for_more() -> None:
    limits = replace(LIMITS, queued=30)
    flows = flows_with(("paying", "a", 18), ("other", "a", 12), weights={"paying": 4.0})
    decision = admit(limits, flows, Newcomer("modest", "a", 10), 10.0)
    assert isinstance(decision, Admit) and decision.instead_of and decision.instead_of.tenant == "other"


def test_who_cannot_be_served_in_time_is_told_at_once() -> None:
    # Given 400 tokens of two tenants, at 10 tokens a second: a tenant's share of them takes 40 s
    flows = flows_with(("t", "a", 20), ("u", "a", 20))
    assert expected_wait(flows, Newcomer("t", "a", 1), 10.0) == pytest.approx(40.0)
    late = refused(admit(LIMITS, flows, Newcomer("t", "a", 1, seconds_left=15.0), 10.0))
    assert late.reason == "DEADLINE_UNREACHABLE" and late.retry_after == pytest.approx(25.0)
    # But a newcomer need not wait for what the others have queued, nor anyone who has the time
    assert isinstance(admit(LIMITS, flows, Newcomer("new", "a", 1, seconds_left=0.5), 10.0), Admit)
    assert isinstance(admit(LIMITS, flows, Newcomer("t", "a", 1, seconds_left=60.0), 10.0), Admit)
    # Nor is anyone refused as long as the rate is not known
    assert isinstance(admit(LIMITS, flows, Newcomer("t", "a", 1, seconds_left=0.5), None), Admit)


def test_an_answer_must_be_there_by_the_deadline_not_only_its_turn() -> None:
    flows = flows_with(("t", "a", 20), ("u", "a", 20))
    newcomer = Newcomer("t", "a", 1, seconds_left=45.0, answer_seconds=4.0)
    assert isinstance(admit(LIMITS, flows, newcomer, 10.0), Admit)
    late = refused(admit(LIMITS, flows, replace(newcomer, answer_seconds=8.0), 10.0))
    assert late.reason == "DEADLINE_UNREACHABLE" and late.retry_after == pytest.approx(3.0)
    # Nor is one begun, when its turn has come, whose answer would come too late
    assert too_late(replace(newcomer, seconds_left=7.0, answer_seconds=8.0))
    assert too_late(replace(newcomer, seconds_left=9.0, answer_seconds=8.0)) is None
    assert too_late(replace(newcomer, seconds_left=None, answer_seconds=8.0)) is None


def test_how_fast_a_tenant_was_served_says_more_than_its_share() -> None:
    flows = flows_with(("t", "a", 20), ("u", "a", 20))
    newcomer = Newcomer("t", "a", 1)
    assert expected_wait(flows, newcomer, 10.0) == pytest.approx(40.0)
    assert expected_wait(flows, replace(newcomer, per_second=2.0), 10.0) == pytest.approx(100.0)
    # And as long as nothing was served at all, the share is what there is
    assert expected_wait(flows, replace(newcomer, per_second=0.0), 10.0) == pytest.approx(40.0)


def test_a_flow_that_is_ahead_waits_for_the_others_though_nothing_waits_in_it() -> None:
    # Given three adapters with 10 requests of 10 tokens each, and one that was served 80 tokens of output just now
    flows = flows_with(("t", "a", 10), ("t", "b", 10), ("t", "c", 10))
    ticket = flows.enqueue("t", "served", 1.0, None, 0)
    assert flows.pick(lambda where: True)
    while (picked := flows.pick(lambda where: True)) and picked is not ticket:
        flows.requeue(picked)
    flows.charge(ticket, 0, 80)
    flows.end(ticket)
    # Then another request for it comes after as many of each of the others, and one for a fourth adapter at once
    assert 200 <= expected_wait(flows, Newcomer("t", "served", 1), 1.0) <= 300
    assert expected_wait(flows, Newcomer("t", "new", 1), 1.0) == 0.0


def test_the_pace_of_answers_is_found() -> None:
    pace = Pace()
    assert pace.seconds(100) == 0.0
    for tokens in (10, 20, 40):
        pace.note(0.05 * tokens, tokens)
    assert pace.seconds(100) == pytest.approx(5.0)
    for _ in range(400):
        pace.note(2.0, 20)
    assert pace.seconds(100) == pytest.approx(10.0, rel=0.01)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from("tuv"), st.sampled_from("ab"), st.integers(0, 300)), max_size=120),
    st.one_of(st.none(), st.floats(0, 1e6)),
)
def test_no_limit_is_ever_passed_and_nobody_is_dropped_silently(asks: list[tuple[str, str, int]], rate: Any) -> None:
    limits = Limits(50, 30, 40, 5_000, 3_000, 4_000)
    flows = flows_with()
    refusals = 0
    for tenant, digest, tokens in asks:
        decision = admit(limits, flows, Newcomer(tenant, digest, tokens), rate)
        if isinstance(decision, Reject):
            refusals += 1
            assert 0.1 <= decision.retry_after <= 30 and decision.reason and decision.message
            continue
        if decision.instead_of:
            assert decision.refusal and decision.instead_of.tenant != tenant
            flows.end(decision.instead_of)
            refusals += 1
        flows.enqueue(tenant, digest, 1.0, None, tokens)
        assert flows.queued <= 50 and flows.queued_by(tenant) <= 30
        assert flows.queued_tokens <= 5_000
    assert flows.queued + refusals == len(asks)


@pytest.mark.parametrize("rate, retry_after", [(None, 30.0), (0.0, 30.0), (100.0, 0.4), (1e9, 0.1)])
def test_the_faster_the_service_the_sooner_the_retry(rate: float | None, retry_after: float) -> None:
    flows = flows_with(("t", "a", 40))
    assert refused(admit(LIMITS, flows, Newcomer("t", "a", 1), rate)).retry_after == pytest.approx(retry_after)


def test_the_rate_of_steady_service_is_found_and_idle_time_does_not_count() -> None:
    rate = ServiceRate(window=10.0)
    assert rate.per_second(0.0) is None
    for step in range(1000):
        rate.note(100.0 + step / 20, 3, is_busy=True)
    assert rate.per_second(150.0) == pytest.approx(60, rel=0.05)
    # When the queue runs empty for a long time
    rate.note(150.0, 3, is_busy=False)
    assert rate.per_second(1000.0) == pytest.approx(60, rel=0.05)
    # And when it is stuck with requests waiting
    rate.note(1000.0, 3, is_busy=True)
    slow = rate.per_second(1100.0)
    assert slow is not None and slow < 10
