"""python -m bench.fairness.overload: the router's admission before four modelled engines that are asked for twice as much.

Five tenants ask for more than their part, one of them for far more. Who waits is gone after a while. Prints who was refused,
who waited in vain, how the tenants fared, and how long it really took until there was room for those who were told when to
come back.
"""

from __future__ import annotations

import argparse
import random
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from bench.fairness.cluster import NO_LIMITS, Answer, Cluster, Setting
from bench.fairness.engine import Job
from bench.fairness.placement import ENGINE, sizes_of
from router.admission import Limits, Reject
from router.errors import QueueFull

LIMITS = Limits(400, 120, 400, 10**9, 10**9, 10**9)
DEADLINE = 20.0
MODEST, FLOOD = 4.0, 12.0
# Of those that are refused, one in so many is followed until there is room for it.
_FOLLOWED = 5


@dataclass(frozen=True)
class Way:
    """How the router protects itself."""

    limits: Limits
    is_told: bool


WAYS: Mapping[str, Way] = {
    "neither": Way(NO_LIMITS, is_told=False),
    "limits": Way(LIMITS, is_told=False),
    "deadlines": Way(NO_LIMITS, is_told=True),
    "both": Way(LIMITS, is_told=True),
}


def asks(seconds: float, seed: int = 1) -> list[Job]:
    """Four tenants that ask MODEST times a second each, and one that asks FLOOD times, for 40 adapters each."""
    rng = random.Random(seed)
    jobs = []
    for tenant, rate in enumerate((MODEST,) * 4 + (FLOOD,)):
        moment = 0.0
        while (moment := moment + rng.expovariate(rate)) < seconds:
            adapter = tenant + 5 * int(40 * rng.random() ** 2)
            name = "flood" if tenant == 4 else f"tenant {tenant}"
            jobs.append(Job(moment, name, f"adapter {adapter}", rng.randint(8, 512), rng.randint(8, 256)))
    return sorted(jobs, key=lambda job: job.arrived)


@dataclass
class Promises:
    """What those were told who were refused: the reason, the seconds promised, and after how many there was room."""

    kept: list[tuple[str, float, float]] = field(default_factory=list)
    # Refusals for which there has been no room yet.
    open: list[Answer] = field(default_factory=list)
    _looked_at: int = 0
    _refused: Counter[str] = field(default_factory=Counter)

    def watch(self, cluster: Cluster) -> None:
        for answer in cluster.answers[self._looked_at :]:
            if isinstance(answer.error, QueueFull):
                self._refused[answer.error.reason] += 1
                if self._refused[answer.error.reason] % _FOLLOWED == 1:
                    self.open.append(answer)
        self._looked_at = len(cluster.answers)
        self.open = [answer for answer in self.open if not self._has_room(cluster, answer)]

    def _has_room(self, cluster: Cluster, answer: Answer) -> bool:
        """Asks admission whether the same request would be let in if it came now."""
        setting = cluster.setting
        if setting.deadline is not None and setting.is_told:
            answer.request.deadline = cluster.now + setting.deadline
        if isinstance(cluster.groups[0].dispatcher.gate.decide(answer.request, cluster.now), Reject):
            return False
        assert isinstance(answer.error, QueueFull) and answer.error.retry_after is not None
        assert answer.ended is not None
        self.kept.append((answer.error.reason, answer.error.retry_after, cluster.now - answer.ended))
        return True


@dataclass(frozen=True)
class Outcome:
    """What became of the requests that came in time to be answered, as shares; `wasted` of the output tokens computed."""

    refused: float
    refused_late: float
    answered: float
    missed_waiting: float
    missed_answering: float
    wasted: float
    tokens: float
    jain: float


def outcome(cluster: Cluster, first: float, last: float) -> Outcome:
    """Of the requests that came in an interval of seconds."""
    came = [answer for answer in cluster.answers if first <= answer.job.arrived < last]
    kinds = Counter(map(_kind, came))
    tokens = sum(answer.tokens for answer in came)
    whole = sum(answer.tokens for answer in came if answer.service)
    got: defaultdict[str, float] = defaultdict(float)
    for answer in came:
        got[answer.job.tenant] += answer.service
    part = {kind: count / len(came) for kind, count in kinds.items()}
    return Outcome(
        refused=part.get("refused", 0.0),
        refused_late=part.get("refused later", 0.0),
        answered=part.get("answered", 0.0),
        missed_waiting=part.get("missed waiting", 0.0),
        missed_answering=part.get("missed answering", 0.0),
        wasted=1 - whole / max(1, tokens),
        tokens=whole / (last - first),
        jain=jain(got.values()),
    )


def jain(values: Iterable[float]) -> float:
    """Jain's index: 1 when all have the same, 1/n when one has everything."""
    values = list(values)
    squares = sum(value * value for value in values)
    return sum(values) ** 2 / (len(values) * squares) if squares else 1.0


def run(way: Way, jobs: Sequence[Job], seconds: float) -> tuple[Cluster, Promises]:
    """One way to be protected, and what was promised."""
    promises = Promises()
    setting = Setting(ENGINE, sizes_of(200), limits=way.limits, deadline=DEADLINE, is_told=way.is_told, sample=0.1)
    return Cluster(setting, promises.watch).run(jobs, seconds), promises


def _kind(answer: Answer) -> str:
    if isinstance(answer.error, QueueFull):
        return "refused" if answer.ended == answer.job.arrived else "refused later"
    if answer.ended is None or answer.error is None:
        return "answered"
    return "missed waiting" if answer.first_token is None else "missed answering"


def main() -> None:
    """Prints everything."""
    parser = argparse.ArgumentParser(prog="python -m bench.fairness.overload")
    parser.add_argument("--seconds", type=float, default=150.0, help="length of the trace")
    seconds = parser.parse_args().seconds
    jobs = asks(seconds)
    first, last = 20.0, seconds - DEADLINE
    print(
        f"Four tenants ask {MODEST:g} times a second each, one {FLOOD:g} times; clients are gone after {DEADLINE:g} s. "
        f"Of those that came from {first:g} to {last:g} s\n"
    )
    print(
        "| the router knows of | refused at once | refused at its turn | answered in time | gone while waiting | "
        "gone while answered | tokens in vain | tokens/s of whole answers | Jain's index of tenants |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    told = {}
    for name, way in WAYS.items():
        cluster, promises = run(way, jobs, seconds)
        told[name] = promises
        seen = outcome(cluster, first, last)
        print(
            f"| {name} | {seen.refused:.1%} | {seen.refused_late:.1%} | {seen.answered:.1%} | {seen.missed_waiting:.1%} | "
            f"{seen.missed_answering:.1%} | {seen.wasted:.1%} | {seen.tokens:.0f} | {seen.jain:.3f} |",
            flush=True,
        )
    print(
        "\nWhen those that were refused were told to come back, and when there was room for them; medians, 10th to 90th "
        "percentile\n"
    )
    print(
        "| the router knows of | reason | followed | promised | room after | too early | off by |\n"
        "|---|---|---|---|---|---|---|"
    )
    for name, promises in told.items():
        _promises(name, promises)


def _promises(name: str, promises: Promises) -> None:
    for reason in sorted({kept[0] for kept in promises.kept}):
        kept = [(promised, real) for why, promised, real in promises.kept if why == reason]
        columns = [
            sorted(values) for values in ([one[0] for one in kept], [one[1] for one in kept], [a - b for a, b in kept])
        ]
        promised, real, off = (
            f"{statistics.median(one):.1f} s ({one[len(one) // 10]:.1f} to {one[9 * len(one) // 10]:.1f})"
            for one in columns
        )
        early = sum(a < b for a, b in kept) / len(kept)
        open_still = sum(1 for answer in promises.open if answer.error and answer.error.reason == reason)
        print(
            f"| {name} | {reason} | {len(kept)} and {open_still} without room | {promised} | {real} | {early:.0%} | {off} |"
        )


if __name__ == "__main__":
    main()
