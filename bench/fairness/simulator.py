"""Runs a trace through a rule and a modelled engine, and notes who received what when."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field

from bench.fairness.engine import Engine, Job, Model, Running
from bench.fairness.rules import OUTPUT_WEIGHT, PROMPT_WEIGHT, Rule

# Seconds between two entries of the history.
TICK = 1.0


@dataclass
class History:
    """What happened.

    Attributes:
        received: name -> service received so far, in weighted tokens, at each tick.
        first_tokens: name -> (arrival, seconds to the first token) of each request.
        answered: requests that were answered, and `seconds`, when the last of them was.
    """

    received: dict[str, list[float]] = field(default_factory=dict)
    first_tokens: dict[str, list[tuple[float, float]]] = field(default_factory=lambda: defaultdict(list))
    answered: int = 0
    tokens: int = 0
    seconds: float = 0.0
    loads: int = 0

    def at(self, name: str, tick: int) -> float:
        series = self.received[name]
        return series[min(tick, len(series) - 1)]

    def gap(self, first: int, last: int) -> float:
        """The most that two differ in what they received from tick `first` on, at any tick up to `last`."""
        started = {name: self.at(name, first) for name in self.received}
        worst = 0.0
        for tick in range(first, last + 1):
            got = [self.at(name, tick) - begun for name, begun in started.items()]
            worst = max(worst, max(got) - min(got))
        return worst

    def shares(self, first: int, last: int) -> dict[str, float]:
        """Service received between two ticks, by name."""
        return {name: self.at(name, last) - self.at(name, first) for name in self.received}

    @property
    def rate(self) -> float:
        return self.answered / self.seconds


def simulate(
    rule: Rule,
    jobs: list[Job],
    model: Model,
    until: float = float("inf"),
    by: Callable[[Job], str] = lambda job: job.tenant,
) -> History:
    """Runs all jobs, in the order of their arrival, to the end or for `until` seconds."""
    return _Run(rule, jobs, model, by).run(until)


class _Run:
    def __init__(self, rule: Rule, jobs: list[Job], model: Model, by: Callable[[Job], str]) -> None:
        self.rule, self.jobs, self.by = rule, jobs, by
        self.engine = Engine(model)
        self.history = History()
        self.totals = dict.fromkeys(dict.fromkeys(by(job) for job in jobs), 0.0)
        self.history.received = {name: [] for name in self.totals}
        self.arrived = 0
        self.now = 0.0
        self.steps = model.join_every

    def run(self, until: float) -> History:
        while self.now < until:
            self._arrivals()
            if self.engine.load(self.now):
                self.rule.moved(self.engine)
            if self.steps >= self.engine.model.join_every or not self.engine.running:
                self._join()
            if any(self.engine.is_resident(one.job.adapter) for one in self.engine.running):
                self._step()
            elif not self._wait():
                break
            self._tick()
        self.history.loads = self.engine.loads
        return self.history

    def _arrivals(self) -> None:
        while self.arrived < len(self.jobs) and self.jobs[self.arrived].arrived <= self.now:
            self.rule.arrive(self.jobs[self.arrived], self.now)
            self.arrived += 1

    def _join(self) -> None:
        while found := self.rule.next(self.engine, self.now):
            self.engine.running.append(Running(found[0], found[1], self.now))
            self.steps = 0
            if self.engine.load(self.now):
                self.rule.moved(self.engine)

    def _step(self) -> None:
        seconds, begun, ready = self.engine.step()
        self.now += seconds
        self.steps += 1
        for one in begun:
            self.totals[self.by(one.job)] += PROMPT_WEIGHT * one.job.prompt
            self.history.first_tokens[self.by(one.job)].append((one.job.arrived, self.now - one.job.arrived))
        for one in ready:
            self.totals[self.by(one.job)] += OUTPUT_WEIGHT
            self.rule.stepped(one)
        self.history.tokens += len(ready)
        for one in [one for one in ready if not one.left]:
            self.engine.running.remove(one)
            self.rule.ended(one)
            self.history.answered += 1
            self.history.seconds = self.now

    def _wait(self) -> bool:
        """Lets time pass to the next thing that happens; returns whether there is one."""
        moments = [self.jobs[self.arrived].arrived] if self.arrived < len(self.jobs) else []
        if self.engine.running:
            moments.append(self.now + 0.01)
        self.now = max(self.now, min(moments, default=self.now))
        return bool(moments)

    def _tick(self) -> None:
        for name, series in self.history.received.items():
            while len(series) * TICK <= self.now:
                series.append(self.totals[name])
