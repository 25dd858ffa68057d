"""Limits of the queues."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.admission import Admit, Limits, Reject, ServiceRate, admit

LIMITS = Limits(queued=100, queued_per_tenant=40)


@given(st.integers(0, 200), st.integers(0, 200), st.floats(0, 1e6))
def test_admitted_exactly_below_both_limits(queued: int, by_tenant: int, rate: float) -> None:
    decision = admit(LIMITS, queued, by_tenant, rate)
    assert isinstance(decision, Admit) == (queued < 100 and by_tenant < 40)
    if isinstance(decision, Reject):
        assert 0.1 <= decision.retry_after <= 30


def test_the_reason_names_the_limit_that_was_met() -> None:
    assert admit(LIMITS, 100, 0, 1.0) == Reject("QUEUE_FULL", 100, 10.0)
    assert admit(LIMITS, 50, 40, 1.0) == Reject("TENANT_QUEUE_FULL", 40, 4.0)


@pytest.mark.parametrize("rate, retry_after", [(0.0, 30.0), (0.1, 30.0), (5.0, 2.0), (1e9, 0.1)])
def test_the_faster_the_service_the_sooner_the_retry(rate: float, retry_after: float) -> None:
    decision = admit(LIMITS, 100, 0, rate)
    assert isinstance(decision, Reject) and decision.retry_after == pytest.approx(retry_after)


def test_the_rate_of_steady_service_is_found_and_forgotten() -> None:
    rate = ServiceRate(window=10.0)
    for step in range(1000):
        rate.note(100.0 + step / 20)
    assert rate.per_second(150.0) == pytest.approx(20, rel=0.05)
    assert rate.per_second(250.0) < 0.01
