"""When a service that died is started again."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from launcher.restart import Deaths, RestartPolicy

policies = st.builds(
    RestartPolicy,
    first_delay=st.floats(0.01, 2),
    longest_delay=st.floats(2, 30),
    patience=st.integers(1, 8),
    window=st.floats(1, 300),
)
pauses = st.lists(st.floats(0, 400), max_size=40)


@given(policies, pauses)
def test_never_more_restarts_in_a_window_than_there_is_patience(policy: RestartPolicy, pauses: list[float]) -> None:
    deaths, now, restarted = Deaths(policy), 0.0, []
    for pause in pauses:
        now += pause
        if deaths.restart_after(now) is None:
            break
        restarted.append(now)
    for end in restarted:
        assert sum(time <= end and end - time < policy.window for time in restarted) <= policy.patience


@given(policies, pauses)
def test_a_delay_is_within_its_bounds_and_doubles_in_a_burst(policy: RestartPolicy, pauses: list[float]) -> None:
    deaths = Deaths(policy)
    burst = [deaths.restart_after(0.0) for _ in range(policy.patience + 1)]
    delays = [delay for delay in burst if delay is not None]
    assert burst[-1] is None and len(delays) == policy.patience
    assert delays == sorted(delays) and delays[0] == min(policy.first_delay, policy.longest_delay)
    assert all(delay <= policy.longest_delay for delay in delays)


@given(policies)
def test_a_death_long_ago_is_forgotten(policy: RestartPolicy) -> None:
    deaths = Deaths(policy)
    assert all(deaths.restart_after(n * policy.window * 1.01) == policy.first_delay for n in range(50))
