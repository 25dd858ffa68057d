"""Fair queueing: what is charged, who is next, and the bound."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from bench.fairness.traces import Trace
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


def test_where_an_adapter_was_before_it_had_requests_does_not_matter() -> None:
    flows = Flows(TARIFF)
    # Given that it moved while nobody asked for it, and that its engine came later
    flows.moved("a", NOWHERE)
    ticket = flows.enqueue("t", "a", 1.0, ON_DEVICE)
    # Then its request is picked as one whose adapter is there
    assert flows.pick(lambda where: where == ON_DEVICE) is ticket


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


def test_an_answer_is_charged_in_advance_and_settled_on_what_it_was() -> None:
    flows = Flows(TARIFF)
    backlog(flows, "t", "a", 2)
    first, second = flows.pick(anywhere), flows.pick(anywhere)
    assert first and second
    flows.charge(first, 10, 8)
    flows.end(first)
    # Given that the latest answer had 8 tokens
    backlog(flows, "t", "a", 1)
    third = flows.pick(anywhere)
    assert third and third.expected_output == 8
    flows.charge(third, 10, 1)
    assert (third.paid, third.charged) == ((10 + 16) * MICRO, 12 * MICRO)
    flows.charge(third, 10, 9)
    assert third.paid == third.charged == 28 * MICRO
    flows.end(second)
    flows.end(third)
    assert flows.charge_of("t", "a") == (10 + 16 + 10 + 18) * MICRO


def test_a_receipt_says_what_the_flow_was_charged_after_its_weight() -> None:
    flows = Flows(TARIFF)
    flows.enqueue("t", "a", 4.0, None)
    ticket = flows.pick(anywhere)
    assert ticket
    flows.charge(ticket, 10, 5)
    assert ticket.charged == flows.charge_of("t", "a") == 5 * MICRO
    assert flows.charge_of("t") == 20 * MICRO


def test_bytes_that_were_loaded_are_charged() -> None:
    flows = Flows(Tariff.of(1, 2, 0.5))
    (ticket,) = backlog(flows, "t", "a", 1)
    flows.pick(anywhere)
    flows.charge(ticket, 10, 0, 80 * 1024 * 1024)
    assert ticket.charged == 50 * MICRO


def is_warm(where: Where) -> bool:
    return where != NOWHERE


def test_a_warm_flow_goes_first_but_only_within_the_window() -> None:
    flows = Flows(TARIFF, window=100)
    flows.enqueue("cold", "c", 1.0, NOWHERE)
    backlog(flows, "warm", "w", 50)
    order = []
    while (ticket := flows.pick(anywhere, is_warm)) and ticket.tenant == "warm":
        order.append(flows.charge_of("warm") // MICRO)
        flows.charge(ticket, 20, 0)
        flows.end(ticket)
    # Then it was ahead by no more than 100 whenever it was picked, and then the cold one's turn had come
    assert order == [0, 20, 40, 60, 80, 100] and ticket and ticket.tenant == "cold"


def test_one_request_waits_on_an_engine_for_an_adapter_and_the_others_wait_here() -> None:
    flows = Flows(TARIFF)
    for _ in range(3):
        flows.enqueue("t", "cold", 1.0, NOWHERE)
    first = flows.pick(anywhere, is_warm)
    assert first
    flows.loading(first, "engine-0")
    assert flows.pick(anywhere, is_warm) is None
    flows.moved("cold", ON_DEVICE)
    assert flows.pick(anywhere, is_warm) and flows.pick(anywhere, is_warm)


def test_who_could_not_be_served_for_long_does_not_get_it_all_back() -> None:
    flows = Flows(TARIFF, window=50)
    flows.enqueue("hung", "cold", 1.0, NOWHERE)
    backlog(flows, "busy", "warm", 200)
    for _ in range(100):
        ticket = flows.pick(is_warm, is_warm)
        assert ticket
        flows.charge(ticket, 10, 0)
        flows.end(ticket)
    flows.moved("cold", ON_DEVICE)
    assert 1000 - 10 - 50 - 1 <= flows.charge_of("hung") / MICRO < flows.charge_of("busy") / MICRO - 50


@pytest.mark.parametrize("loadable", [True, False])
def test_an_adapter_in_use_makes_room_for_one_that_waits_for_the_device(loadable: bool) -> None:
    flows = Flows(TARIFF, window=100, is_loadable=lambda digest: loadable)
    flows.enqueue("late", "cold", 1.0, NOWHERE)
    waiting = flows.pick(anywhere, is_warm)
    assert waiting
    flows.loading(waiting, "engine-0")
    running = []
    picked = []
    for tenant in ("a", "b"):
        backlog(flows, tenant, tenant, 100)
    # Given a device full of adapters with requests without end
    for _ in range(60):
        ticket = flows.pick(anywhere, is_warm)
        if ticket is None:
            break
        flows.charge(ticket, 20, 0)
        running.append(ticket)
        picked.append(ticket.tenant)
        if len(running) == 4:
            flows.end(running.pop(0))
    # Then one of them is left out for a while once they are Q ahead of who waits; unless nothing could be loaded
    streaks = [len(list(group)) for _, group in itertools.groupby(picked)]
    assert (max(streaks) > 4) is loadable and max(streaks[:5]) == 1
    # But not for ever when that does not help
    assert set(picked[-4:]) == {"a", "b"}


def test_an_adapter_that_was_held_back_may_have_been_forgotten_when_the_load_ends() -> None:
    flows = Flows(TARIFF, window=100)
    flows.enqueue("late", "cold", 1.0, NOWHERE)
    waiting = flows.pick(anywhere, is_warm)
    assert waiting
    flows.loading(waiting, "engine-0")
    flows.enqueue("a", "a", 1.0, ON_DEVICE)
    running = flows.pick(anywhere, is_warm)
    assert running
    flows.charge(running, 200, 0)
    # Given that a is held back, being ahead, and asks for nothing more, while others are served
    backlog(flows, "b", "b", 5)
    for _ in range(3):
        ticket = flows.pick(anywhere, is_warm)
        assert ticket and ticket.tenant == "b"
        flows.charge(ticket, 20, 0)
        flows.end(ticket)
    flows.end(running)
    # When so many have come and gone that idle flows are forgotten
    for number in range(2000):
        flows.end(flows.enqueue("many", f"adapter-{number}", 1.0, ON_DEVICE))
    assert flows.account("a") is None
    flows.loaded(waiting)
    assert flows.enqueue("a", "a", 1.0, ON_DEVICE).where == ON_DEVICE


def test_kept_places_are_for_who_has_nothing_on_engines_and_no_more_than_its_share() -> None:
    flows = Flows(TARIFF)
    backlog(flows, "flood", "a", 20)
    for _ in range(3):
        ticket = flows.pick(anywhere)
        assert ticket
        flows.charge(ticket, 10, 0)
    # When the places for all are taken, only a newcomer is picked
    assert flows.pick_newcomer(anywhere) is None
    backlog(flows, "modest", "b", 2)
    ticket = flows.pick_newcomer(anywhere)
    assert ticket and ticket.tenant == "modest"
    assert flows.pick_newcomer(anywhere) is None
    # And not while it is ahead of those who wait
    flows.charge(ticket, 1000, 0)
    flows.end(ticket)
    assert flows.pick_newcomer(anywhere) is None


def test_what_other_routers_served_counts_as_served() -> None:
    flows = Flows(TARIFF)
    backlog(flows, "t", "a", 10)
    backlog(flows, "u", "a", 10)
    flows.served_elsewhere({("t", "a"): 50, ("unknown", "a"): 99})
    assert [serve(flows)[0] for _ in range(6)] == ["u"] * 5 + ["t"]


def test_a_million_operations_and_every_charge_is_what_was_paid_and_lifted() -> None:
    rng = random.Random(1)
    flows = Flows(Tariff.of(1, 2, 0.5), window=100, tenant_weights={"t0": 0.3, "t1": 7.0})
    names = [(f"t{t}", f"a{a}") for t in range(4) for a in range(3)]
    weights = dict(zip(names, (0.1, 0.7, 1 / 3, 1, 1, 2.5, 1e-3, 1, 9, 1, 1, 1.1), strict=True))
    paid: Counter[object] = Counter()
    running: list[Ticket] = []
    operations = 0

    def close(ticket: Ticket) -> None:
        flows.end(ticket)
        paid[ticket.tenant, ticket.digest] += ticket.paid
        paid[ticket.tenant] += ticket.paid_by_tenant

    while operations < 1_000_000:
        operations += 1
        if flows.queued < 50:
            name = rng.choice(names)
            flows.enqueue(*name, weights[name], ON_DEVICE, rng.randint(1, 999))
        elif len(running) < 20:
            ticket = flows.pick(anywhere)
            assert ticket
            running.append(ticket)
        else:
            ticket = running[rng.randrange(20)]
            flows.charge(ticket, rng.randint(0, 999), ticket.work.output_tokens + 1, rng.randint(0, 10**7))
            if not rng.randrange(10):
                running.remove(ticket)
                close(ticket)
    for ticket in running:
        close(ticket)
    for tenant, digest in names:
        flow, account = flows.account(tenant, digest), flows.account(tenant)
        assert flow and flow.charge == flow.lifted + paid[tenant, digest]
        assert account and account.charge == account.lifted + paid[tenant]


@settings(max_examples=300, deadline=None)
@given(st.integers(min_value=0))
def test_no_two_flows_that_could_be_served_ever_differ_by_more_than_the_bound(seed: int) -> None:
    assert Trace(seed).run(steps=60).share <= 1


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
