"""The router's loop before several modelled engines: what placement and admission bring about. No clock, no network."""

from __future__ import annotations

import functools
import random
from dataclasses import replace

import pytest

from bench.fairness import overload, placement
from bench.fairness.cluster import Cluster, Setting
from bench.fairness.engine import Job
from bench.fairness.placement import ENGINE, HOT, WAYS, Seen, burst, burst_sizes, first_tokens, sizes_of
from bench.fairness.workloads import slora

SECONDS = 60.0


@functools.cache
def placed(name: str) -> tuple[Cluster, Seen]:
    """At four fifths of what the engines can do, with a few popular adapters among many."""
    jobs = slora(200, 7.0, SECONDS, alpha=0.3, seed=3)
    return placement.run(WAYS[name], jobs, Setting(ENGINE, sizes_of(200)), SECONDS)


def moved(name: str) -> int:
    return sum(machine.moved_bytes for machine in placed(name)[0].machines)


def p99(times: list[float]) -> float:
    return times[int(0.99 * (len(times) - 1))]


def test_it_moves_little_more_than_one_home_for_each_adapter_would() -> None:
    assert moved("Loraplex") < 0.7 * moved("round robin")
    assert moved("Loraplex") < 0.7 * moved("least requests")
    assert moved("Loraplex") < 1.3 * moved("one home each")


def test_nobody_waits_for_a_crowded_home() -> None:
    ours = p99(first_tokens(placed("Loraplex")[0]))
    assert ours < 0.25 * p99(first_tokens(placed("one home each")[0]))
    assert ours < 1.5 * p99(first_tokens(placed("least requests")[0]))


def test_no_engine_is_given_much_more_than_others() -> None:
    assert placement.imbalance(placed("Loraplex")[1]) < min(1.35, placement.imbalance(placed("one home each")[1]))


def test_everything_is_answered_and_charged_on_one_engine_each() -> None:
    jobs = slora(40, 5.0, 20.0, alpha=0.3, seed=5)
    cluster, _ = placement.run(WAYS["Loraplex"], jobs, Setting(ENGINE, sizes_of(40)), 200.0)
    assert all(answer.ended is not None and answer.error is None for answer in cluster.answers)
    assert [answer.tokens for answer in cluster.answers] == [job.output for job in jobs]
    assert sum(machine.served for machine in cluster.machines) == sum(job.prompt + job.output for job in jobs)


def test_a_hot_adapter_is_on_more_engines_with_its_demand_and_runs_on_one_after_it() -> None:
    _, seen = placement.run(WAYS["Loraplex"], burst(200.0), Setting(ENGINE, burst_sizes()), 200.0, HOT)
    before, during, after = seen.copies[20:60], seen.copies[90:120], seen.running[-20:]
    assert max(before) <= 1
    # Enough engines for what was asked for, while it was asked for
    assert min(during) >= max(2, max(seen.wanted) // 1)
    # Copies that nobody asks for any more lie on devices until their room is worth more to others
    assert max(after) <= 1


@pytest.mark.parametrize("name, most_missed", [("neither", 1.0), ("both", 0.25)])
def test_who_is_let_in_is_answered_in_time(name: str, most_missed: float) -> None:
    cluster, _ = overload.run(overload.WAYS[name], overload.asks(70.0), 70.0)
    seen = overload.outcome(cluster, 15.0, 50.0)
    let_in = 1 - seen.refused - seen.refused_late
    assert seen.missed_waiting + seen.missed_answering < most_missed * let_in
    if name == "neither":
        # Without protection most work is in vain: that is what it is for
        assert seen.answered < 0.5 * let_in and seen.wasted > 0.2
    else:
        assert seen.jain > 0.97 and seen.wasted < 0.25


def test_who_is_told_to_come_back_for_the_deadline_finds_room_about_then() -> None:
    _, promises = overload.run(overload.WAYS["deadlines"], overload.asks(90.0), 90.0)
    errors = sorted(promised - real for _, promised, real in promises.kept)
    assert len(errors) > 50
    assert abs(errors[len(errors) // 2]) < 1.5


def test_a_request_whose_deadline_cannot_be_met_any_more_is_not_begun() -> None:
    """One engine of one place; a flow whose answers take about 5 s, and a request that has 3 s left when its turn comes."""
    rng = random.Random(1)
    sizes = {"adapter 0": 1 << 20}
    one = Setting(replace(ENGINE, places=1), sizes, engines=1, deadline=8.0, is_told=True, limits=overload.LIMITS)
    learned = [Job(8.0 * number, "t", "adapter 0", 64, 180) for number in range(5)]
    late = [Job(40.0 + 0.1 * number, "t", "adapter 0", 64, 180 + rng.randint(0, 1)) for number in range(3)]
    cluster = Cluster(one).run([*learned, *late], 80.0)
    assert all(answer.service for answer in cluster.answers[:6])
    # The last is begun, in vain perhaps: nobody else waits for the place, and its answer may be shorter than those before it
    assert [answer.is_refused for answer in cluster.answers[6:]] == [True, False]
    assert not cluster.answers[6].tokens
