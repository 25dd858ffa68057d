"""python -m bench.fairness.traces: random traces against the bound that router/flows.py states.

A trace is a few tenants with a few adapters each, of random weights, whose requests come in bursts, are estimated wrongly,
are cancelled, lose their engine, wait for adapters that load late or never; on engines of a few places. At every step the
work done for each two flows of a level is compared. The worst difference is told as a share of the bound.
"""

from __future__ import annotations

import argparse
import itertools
import random
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial

from router.accounts import Where
from router.flows import MICRO, Flows, Tariff, Ticket
from router.tickets import MIB, Flow, Tenant, Work

WEIGHTS = (0.25, 0.5, 1.0, 1.0, 2.0, 4.0)
NEVER = 10**9

Name = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Worst:
    """The largest difference seen between two flows: its share of the bound, in weighted tokens, and the trace's seed."""

    share: float = 0.0
    gap: float = 0.0
    bound: float = 0.0
    seed: int = 0

    def __lt__(self, other: Worst) -> bool:
        return self.share < other.share


@dataclass(eq=False, slots=True)
class _Request:
    """One request on an engine; what it really needs."""

    ticket: Ticket
    engine: str
    work: Work
    ends_after: int
    begun: bool = False
    done: int = 0


@dataclass
class _Pairs:
    """The range in which (work of f) - (work of g) has been since both could be served."""

    ranges: dict[tuple[Name, Name], tuple[int, int]] = field(default_factory=dict)

    def compare(self, names: Iterable[Name], work: Mapping[Name, int]) -> Iterator[tuple[Name, Name, int]]:
        """Takes a moment in, at which only `names` could be served; yields the width of each two's range."""
        ranges = {}
        for pair in itertools.combinations(sorted(names), 2):
            difference = work.get(pair[0], 0) - work.get(pair[1], 0)
            low, high = self.ranges.get(pair, (difference, difference))
            ranges[pair] = low, high = min(low, difference), max(high, difference)
            yield *pair, high - low
        self.ranges = ranges


class _Watched(Flows):
    """Tells of every pick just before it is made."""

    picking: Callable[[], None]

    def _take(self, flow: Flow) -> Ticket:
        self.picking()
        return super()._take(flow)


class Trace:
    """One random trace. Weights are powers of two, so that work divided by them stays whole."""

    def __init__(self, seed: int) -> None:
        self.rng = rng = random.Random(seed)
        self.seed = seed
        self.window = rng.choice((0, 0, 200, 2000))
        self.tariff = Tariff.of(1, rng.choice((1, 2, 2, 4)), rng.choice((0, 10)))
        self.engines = {f"engine-{n}": rng.randint(1, 6) for n in range(rng.choice((1, 1, 2)))}
        tenants = [f"t{n}" for n in range(rng.randint(2, 4))]
        self.weights = {name: rng.choice(WEIGHTS) for name in tenants}
        self.flows = _Watched(self.tariff, self.window, self.weights, lambda digest: digest in self.loadable)
        self.adapters = {
            (name, f"{name if rng.random() < 0.8 else 'shared'}-{n}"): rng.choice(WEIGHTS)
            for name in tenants
            for n in range(rng.randint(1, 3))
        }
        self.kept = rng.choice((0, 0, 1)) if min(self.engines.values()) > 1 else 0
        self.longest_prompt, self.longest_output = rng.choice((10, 100, 1000)), rng.choice((2, 10, 40))
        self.load_bytes = rng.choice((0, 0, 3 * MIB))
        self.cancels, self.losses = rng.choice((0.0, 0.0, 0.2)), rng.choice((0.0, 0.0, 0.01))
        digests = sorted({digest for _, digest in self.adapters})
        self.where: dict[str, Where] = {}
        self.arrives: dict[str, int] = {}
        self.loadable: set[str] = set()
        for digest in digests:
            cold = rng.random() < 0.3
            self.where[digest] = (
                frozenset() if cold else frozenset(rng.sample(list(self.engines), rng.randint(1, len(self.engines))))
            )
            self.arrives[digest] = rng.choice((rng.randint(1, 60), NEVER)) if cold else NEVER
            if rng.random() < 0.5:
                self.loadable.add(digest)
        self.rates = {flow: rng.choice((0.0, 0.1, 0.5, 2.0)) for flow in self.adapters}
        self.running: list[_Request] = []
        self.taken = dict.fromkeys(self.engines, 0)
        self.tickets: list[Ticket] = []
        self.work: dict[Name, int] = {}
        self.tenants, self.below = _Pairs(), {name: _Pairs() for name in tenants}
        # Those who could not be picked when another was, as long as they may have a claim from that.
        self.closed: set[Name] = set()

    def run(self, steps: int) -> Worst:
        """Runs it; returns the worst difference."""
        worst = Worst()
        for step in range(steps):
            if step % 20 == 0:
                self.rates = {flow: self.rng.choice((0.0, 0.1, 0.5, 2.0, 2.0)) for flow in self.adapters}
            self._arrive(step)
            self._fill()
            self._engines()
            for f, g, difference in self._compare():
                bound = self._bound(f, g)
                worst = max(worst, Worst(difference / bound, difference / MICRO, bound / MICRO, self.seed))
        self._recount()
        return worst

    def _weight(self, name: Name) -> float:
        return self.weights[name[0]] if len(name) == 1 else self.adapters[name[0], name[1]]

    def _bound(self, f: Name, g: Name) -> float:
        """U_f + U_g + 2 Q: engines hold so many requests, each of which costs, or is thought to cost, at most so much."""
        most = self.tariff.cost(Work(self.longest_prompt, self.longest_output, self.load_bytes))
        remaining = in_advance = sum(self.engines.values()) * most
        return (remaining + in_advance) * (1 / self._weight(f) + 1 / self._weight(g)) + 2 * self.window * MICRO

    def _arrive(self, step: int) -> None:
        rng = self.rng
        for digest, at in self.arrives.items():
            if step == at:
                self.where[digest] = frozenset({rng.choice(list(self.engines))})
                self.flows.moved(digest, self.where[digest])
                # An adapter has come to where it was not: intervals end.
                for flow in self.adapters:
                    if flow[1] == digest:
                        self.closed |= {flow, flow[:1]}
        for (tenant, digest), rate in self.rates.items():
            for _ in range(int(rate) + (rng.random() < rate % 1)):
                if self.flows.queued_by(tenant) < 40:
                    prompt = rng.randint(1, self.longest_prompt)
                    most = rng.choice((None, self.longest_output))
                    weight = self.adapters[tenant, digest]
                    where = self.where[digest]
                    self.tickets.append(self.flows.enqueue(tenant, digest, weight, where, prompt, most))

    def _can_take(self, engine: str, where: Where, kept: int) -> bool:
        loading = sum(one.engine == engine and not one.begun for one in self.running)
        warm = where is None or engine in where
        room = self.taken[engine] + kept < self.engines[engine]
        return room and (warm or loading < max(1, self.engines[engine] // 2))

    def _is_open(self, where: Where, kept: int) -> bool:
        return any(self._can_take(engine, where, kept) for engine in self.engines)

    def _is_warm(self, where: Where, kept: int) -> bool:
        return any(self._can_take(engine, where, kept) for engine in self.engines if where is None or engine in where)

    def _fill(self) -> None:
        """Fills what is not kept, then what is."""
        for kept, pick in ((self.kept, self.flows.pick), (0, self.flows.pick_newcomer)):
            self.flows.picking = partial(self._note_closed, kept)
            while ticket := pick(partial(self._is_open, kept=kept), partial(self._is_warm, kept=kept)):
                where = self.where[ticket.digest] or frozenset()
                open_ = [engine for engine in self.engines if self._can_take(engine, ticket.where, kept)]
                engine = min((one not in where, one) for one in open_)[1]
                if engine not in where:
                    self.flows.loading(ticket, engine)
                self._dispatch(ticket, engine, cold=engine not in where)

    def _dispatch(self, ticket: Ticket, engine: str, *, cold: bool) -> None:
        rng = self.rng
        output = rng.randint(1, self.longest_output)
        prompt = rng.choice((ticket.prompt_tokens, rng.randint(0, self.longest_prompt)))
        load = self.load_bytes if cold else 0
        ends_after = rng.randint(1, output) if rng.random() < self.cancels else output
        self.running.append(_Request(ticket, engine, Work(prompt, output, load), ends_after))
        self.taken[engine] += 1

    def _engines(self) -> None:
        for engine in self.engines:
            lost = self.rng.random() < self.losses
            for one in [one for one in self.running if one.engine == engine]:
                if lost and not one.begun:
                    self._leave(one)
                    self.flows.requeue(one.ticket)
                elif one.begun or engine in (self.where[one.ticket.digest] or ()):
                    self._advance(one)

    def _advance(self, one: _Request) -> None:
        before = self.tariff.cost(one.ticket.work) if one.begun else 0
        if not one.begun:
            one.begun = True
            self.flows.loaded(one.ticket)
        one.done += 1
        work = Work(one.work.prompt_tokens, one.done, one.work.load_bytes)
        cost = self.tariff.cost(work) - before
        self.flows.charge(one.ticket, work.prompt_tokens, work.output_tokens, work.load_bytes)
        tenant, digest = one.ticket.tenant, one.ticket.digest
        for name in ((tenant,), (tenant, digest)):
            self.work[name] = self.work.get(name, 0) + round(cost / self._weight(name))
        if one.done == one.ends_after:
            self._leave(one)
            self.flows.end(one.ticket)

    def _leave(self, one: _Request) -> None:
        self.running.remove(one)
        self.taken[one.engine] -= 1

    def _note_closed(self, kept: int) -> None:
        """Notes who cannot be picked now, when another is."""
        closed: set[Name] = set(self.adapters) | {(tenant,) for tenant in self.below}
        for tenant, digest in self.adapters:
            flow = self.flows.account(tenant, digest)
            if isinstance(flow, Flow) and not isinstance(flow.listed_at, bool) and self._is_open(flow.listed_at, kept):
                closed -= {(tenant, digest), (tenant,)}
        self.closed |= closed

    def _compare(self) -> Iterator[tuple[Name, Name, int]]:
        """By how much the work of each two differs, of those that could be served all the time."""
        waiting: set[Name] = set()
        for name in self.adapters:
            flow = self.flows.account(*name)
            if flow and flow.queued:
                waiting |= {name, name[:1]}
        waiting -= self.closed
        # Who has no claim from before any more is compared with the others again.
        self.closed = {name for name in self.closed if self._lags(name)}
        yield from self.tenants.compare((name for name in waiting if len(name) == 1), self.work)
        for tenant, pairs in self.below.items():
            yield from pairs.compare((name for name in waiting if len(name) == 2 and name[0] == tenant), self.work)

    def _lags(self, name: Name) -> bool:
        account, tenant = self.flows.account(*name), self.flows.account(name[0])
        if account is None or not isinstance(tenant, Tenant):
            return False
        level = self.flows.level if len(name) == 1 else tenant.level
        return account.queued > 0 and account.charge < level.highest_pick - self.window * MICRO - 1

    def _recount(self) -> None:
        """Raises AssertionError unless every charge is what was paid and lifted, and every queue what is in it."""
        for tenant in self.below:
            account = self.flows.account(tenant)
            own = [ticket for ticket in self.tickets if ticket.tenant == tenant]
            assert not account or account.charge == account.lifted + sum(ticket.paid_by_tenant for ticket in own)
        for tenant, digest in self.adapters:
            flow = self.flows.account(tenant, digest)
            own = [ticket for ticket in self.tickets if (ticket.tenant, ticket.digest) == (tenant, digest)]
            assert not flow or flow.charge == flow.lifted + sum(ticket.paid for ticket in own)


def worst_of(seeds: range, steps: int) -> Worst:
    """The worst of some traces."""
    return max((Trace(seed).run(steps) for seed in seeds), default=Worst())


def main() -> None:
    """Prints the worst difference seen; exits with 1 when it is above the bound."""
    parser = argparse.ArgumentParser(prog="python -m bench.fairness.traces")
    parser.add_argument("--traces", type=int, default=100_000)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--processes", type=int, default=1)
    arguments = parser.parse_args()
    began = time.monotonic()
    batches = [range(first, min(first + 500, arguments.traces)) for first in range(0, arguments.traces, 500)]
    worst, above = Worst(), 0
    with ProcessPoolExecutor(arguments.processes) as pool:
        for found in pool.map(partial(worst_of, steps=arguments.steps), batches):
            worst = max(worst, found)
            above += found.share > 1
    print(f"{arguments.traces} traces of {arguments.steps} steps in {time.monotonic() - began:.0f} s")
    print(
        f"worst: {worst.gap:.1f} of {worst.bound:.1f} weighted tokens, {worst.share:.1%} of the bound (seed {worst.seed})"
    )
    sys.exit(above > 0)


if __name__ == "__main__":
    main()
