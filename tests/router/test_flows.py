"""Fair queueing: what is charged, who is next, and the bound."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from router.accounts import Where
from router.flows import MICRO, Flows, Tariff, Ticket, Work

TARIFF = Tariff.of(1, 2)
ON_DEVICE = frozenset({"engine-0"})
NOWHERE: frozenset[str] = frozenset()


def anywhere(where: Where) -> bool:
    return True


def serve(flows: Flows, prompt: int = 10, output: int = 0) -> tuple[str, str]:
    ticket = flows.pick(anywhere)
    assert ticket is not None
    flows.charge(ticket, prompt, output)
    flows.end(ticket)
    return ticket.tenant, ticket.digest


def backlog(flows: Flows, tenant: str, digest: str, count: int, weight: float = 1.0) -> list[Ticket]:
    return [flows.enqueue(tenant, digest, weight, ON_DEVICE) for _ in range(count)]


def test_requests_of_one_flow_keep_their_order() -> None:
    flows = Flows(TARIFF)
    tickets = backlog(flows, "t", "a", 5)
    assert [flows.pick(anywhere) for _ in range(6)] == [*tickets, None]


def test_the_flow_that_received_least_is_next() -> None:
    flows = Flows(TARIFF)
    backlog(flows, "t", "a", 4)
    backlog(flows, "t", "b", 4)
    # Given that a's requests cost three and a half times as much as b's
    order = []
    for _ in range(8):
        ticket = flows.pick(anywhere)
        assert ticket
        order.append(ticket.digest)
        flows.charge(ticket, 35 if ticket.digest == "a" else 10, 0)
        flows.end(ticket)
    # Then four of b are served for one of a
    assert order == ["a", "b", "b", "b", "b", "a", "a", "a"]


def test_a_tenant_with_many_adapters_gets_the_share_of_one_tenant() -> None:
    flows = Flows(TARIFF)
    for number in range(100):
        backlog(flows, "many", f"adapter-{number}", 4)
    backlog(flows, "one", "adapter-x", 200)
    served = [serve(flows)[0] for _ in range(200)]
    assert served.count("many") == served.count("one") == 100


def test_weights_one_to_two_give_service_one_to_two() -> None:
    flows = Flows(TARIFF)
    backlog(flows, "t", "light", 300, weight=1.0)
    backlog(flows, "t", "heavy", 300, weight=2.0)
    served = [serve(flows, prompt=7)[1] for _ in range(300)]
    assert abs(served.count("heavy") - 2 * served.count("light")) <= 2


def test_idle_time_earns_nothing_while_others_are_busy() -> None:
    flows = Flows(TARIFF)
    backlog(flows, "busy", "a", 200)
    for _ in range(100):
        serve(flows)
    # When one that was never there before arrives
    backlog(flows, "idle", "a", 100)
    # Then it gets its share from now on, and no more
    assert abs([serve(flows)[0] for _ in range(100)].count("idle") - 50) <= 1


def test_idle_time_earns_nothing_when_all_were_idle() -> None:
    flows = Flows(TARIFF)
    backlog(flows, "early", "a", 100)
    for _ in range(100):
        serve(flows)
    assert flows.queued == 0
    # When both arrive after an idle time of everyone
    backlog(flows, "late", "a", 100)
    backlog(flows, "early", "a", 100)
    assert abs([serve(flows)[0] for _ in range(100)].count("late") - 50) <= 1


def test_a_flow_passed_over_keeps_its_turn_and_a_newcomer_does_not_inherit_it() -> None:
    flows = Flows(TARIFF)
    flows.enqueue("loading", "cold", 1.0, NOWHERE)
    backlog(flows, "busy", "warm", 200)
    # Given service for the others only
    for _ in range(100):
        ticket = flows.pick(lambda where: where != NOWHERE)
        assert ticket and ticket.digest == "warm"
        flows.charge(ticket, 10, 0)
        flows.end(ticket)
    # When a newcomer arrives, it is level with those that are served
    backlog(flows, "new", "warm", 100)
    assert flows.charge_of("new") >= flows.charge_of("busy") - 10 * MICRO
    # And once its adapter is there, the one passed over is first
    flows.moved("cold", ON_DEVICE)
    assert serve(flows)[1] == "cold"


def test_cancelled_while_queued_costs_nothing_and_leaves_the_others_in_order() -> None:
    flows = Flows(TARIFF)
    first, second, third = backlog(flows, "t", "a", 3)
    flows.end(second)
    assert flows.queued == flows.queued_by("t") == 2
    assert [flows.pick(anywhere), flows.pick(anywhere), flows.pick(anywhere)] == [first, third, None]


def test_work_that_was_done_stays_charged_after_a_cancel() -> None:
    flows = Flows(TARIFF)
    (ticket,) = backlog(flows, "t", "a", 1)
    flows.pick(anywhere)
    flows.charge(ticket, 100, 7)
    flows.end(ticket)
    assert flows.charge_of("t") == flows.charge_of("t", "a") == (100 + 2 * 7) * MICRO


def test_requeued_requests_are_first_again_and_free() -> None:
    flows = Flows(TARIFF)
    tickets = backlog(flows, "t", "a", 4)
    picked = [flows.pick(anywhere), flows.pick(anywhere)]
    for ticket in picked:
        assert ticket
        flows.charge(ticket, 50, 0)
    for ticket in reversed(picked):
        assert ticket
        flows.requeue(ticket)
    assert flows.charge_of("t", "a") == 0
    assert [flows.pick(anywhere) for _ in range(4)] == tickets


@given(
    st.floats(min_value=1e-6, max_value=1000),
    st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 10**5)), min_size=1, max_size=30),
)
def test_corrections_do_not_drift(weight: float, totals: list[tuple[int, int]]) -> None:
    flows = Flows(TARIFF)
    flows.enqueue("t", "a", weight, None)
    ticket = flows.pick(anywhere)
    assert ticket
    for prompt, output in totals:
        flows.charge(ticket, prompt, output)
    # Then only the last totals count, to the last micro-token
    numerator, denominator = weight.as_integer_ratio()
    assert flows.charge_of("t", "a") == TARIFF.cost(Work(*totals[-1])) * denominator // numerator
    assert flows.charge_of("t") == TARIFF.cost(Work(*totals[-1]))


def test_names_without_end_do_not_fill_the_memory() -> None:
    flows = Flows(TARIFF)
    for number in range(20_000):
        flows.enqueue(f"tenant-{number}", f"digest-{number}", 1.0, NOWHERE)
        serve(flows)
    assert len(flows._tenants) < 5000 and len(flows.digests()) < 5000


@dataclass
class Client:
    tenant: str
    digest: str
    prompt: int
    output: int
    cancels: bool


@dataclass
class Engine:
    """Places with sequences that each produce one token a step; `flows` is charged as the router does it."""

    flows: Flows
    places: int
    received: dict[str, int] = field(default_factory=dict)
    inside: deque[tuple[Ticket, Client, int]] = field(default_factory=deque)

    def step(self, clients: dict[str, Client]) -> None:
        while len(self.inside) < self.places and (ticket := self.flows.pick(anywhere)):
            client = clients[ticket.tenant]
            self.flows.charge(ticket, client.prompt, 0)
            self._receive(ticket.tenant, client.prompt)
            self.inside.append((ticket, client, 0))
        for _ in range(len(self.inside)):
            ticket, client, done = self.inside.popleft()
            self.flows.charge(ticket, client.prompt, done + 1)
            self._receive(ticket.tenant, 2)
            if done + 1 == client.output or (client.cancels and done == client.output // 2):
                self.flows.end(ticket)
            else:
                self.inside.append((ticket, client, done + 1))

    def _receive(self, tenant: str, weighted_tokens: int) -> None:
        self.received[tenant] = self.received.get(tenant, 0) + weighted_tokens


CLIENTS = st.lists(st.tuples(st.integers(1, 200), st.integers(1, 40), st.booleans()), min_size=2, max_size=6)


@settings(max_examples=60, deadline=None)
@given(CLIENTS, st.integers(1, 12), st.integers(0, 300))
def test_no_backlogged_flow_gets_more_than_twice_u_ahead_of_another(
    loads: list[tuple[int, int, bool]], places: int, start: int
) -> None:
    # Given flows that always have a request waiting, and an engine under way since `start` steps
    flows = Flows(TARIFF)
    clients = {f"t{n}": Client(f"t{n}", "a", *load) for n, load in enumerate(loads)}
    engine = Engine(flows, places)
    u = max(client.prompt for client in clients.values()) + 2 * places * max(c.output for c in clients.values())

    def step() -> None:
        for name in clients:
            while flows.queued_by(name) < places + 1:
                flows.enqueue(name, "a", 1.0, ON_DEVICE)
        engine.step(clients)

    for _ in range(start):
        step()
    before = dict(engine.received)
    # When it goes on for a while
    for _ in range(300):
        step()
        # Then at no time has one flow received more than 2U above another
        got = [engine.received.get(name, 0) - before.get(name, 0) for name in clients]
        assert max(got) - min(got) <= 2 * u


class Model(RuleBasedStateMachine):
    """Flows against a list that is searched from end to end."""

    def __init__(self) -> None:
        super().__init__()
        self.flows = Flows(TARIFF)
        self.queues: dict[tuple[str, str], list[Ticket]] = {}
        self.where: dict[str, frozenset[str]] = dict.fromkeys("abc", NOWHERE)
        self.picked: list[Ticket] = []

    @rule(tenant=st.sampled_from("xy"), digest=st.sampled_from("abc"))
    def enqueue(self, tenant: str, digest: str) -> None:
        ticket = self.flows.enqueue(tenant, digest, 1.0, self.where[digest])
        self.queues.setdefault((tenant, digest), []).append(ticket)

    @rule(only_on_device=st.booleans())
    def pick(self, only_on_device: bool) -> None:
        def is_open(where: Where) -> bool:
            return not only_on_device or where == ON_DEVICE

        open_ = [key for key, queue in self.queues.items() if queue and is_open(self.where[key[1]])]
        tenants = {tenant: self.flows.charge_of(tenant) for tenant, _ in open_}
        flows = {key: self.flows.charge_of(*key) for key in open_}
        ticket = self.flows.pick(is_open)
        if not open_:
            assert ticket is None
            return
        assert ticket
        assert tenants[ticket.tenant] == min(tenants.values())
        own = [charge for key, charge in flows.items() if key[0] == ticket.tenant]
        assert flows[ticket.tenant, ticket.digest] == min(own)
        assert self.queues[ticket.tenant, ticket.digest].pop(0) is ticket
        self.picked.append(ticket)

    @precondition(lambda self: self.picked)
    @rule(data=st.data(), prompt=st.integers(0, 50), output=st.integers(0, 50))
    def charge(self, data: Any, prompt: int, output: int) -> None:
        self.flows.charge(data.draw(st.sampled_from(self.picked)), prompt, output)

    @precondition(lambda self: self.picked)
    @rule(data=st.data(), again=st.booleans())
    def leave(self, data: Any, again: bool) -> None:
        ticket = data.draw(st.sampled_from(self.picked))
        self.picked.remove(ticket)
        if again:
            self.flows.requeue(ticket)
            self.queues[ticket.tenant, ticket.digest].insert(0, ticket)
        else:
            self.flows.end(ticket)

    @rule(data=st.data())
    def cancel(self, data: Any) -> None:
        queued = [ticket for queue in self.queues.values() for ticket in queue]
        if queued:
            ticket = data.draw(st.sampled_from(queued))
            self.queues[ticket.tenant, ticket.digest].remove(ticket)
            self.flows.end(ticket)

    @rule(digest=st.sampled_from("abc"), there=st.booleans())
    def move(self, digest: str, there: bool) -> None:
        self.where[digest] = ON_DEVICE if there else NOWHERE
        self.flows.moved(digest, self.where[digest])

    @invariant()
    def counts_are_those_of_the_list(self) -> None:
        assert self.flows.queued == sum(map(len, self.queues.values()))
        for name in "xy":
            assert self.flows.queued_by(name) == sum(len(q) for (tenant, _), q in self.queues.items() if tenant == name)


TestModel = pytest.mark.filterwarnings("ignore")(Model.TestCase)
TestModel.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
