"""Who is next, and who has received how much. PURE.

The law:

1. There are two levels of flows: tenants, and below each tenant its adapters, by digest ("" is the base). A tenant with
   a thousand adapters competes with other tenants as one.
2. A request costs prompt_weight · (prompt tokens that were computed) + output_weight · (output tokens) + load_weight ·
   (MiB of its adapter that were moved for it). Its adapter's flow and its tenant are each charged cost / weight. Until
   the true counts are known it is charged for its estimated prompt, and for as long an answer as its flow's latest were
   (or what it has, if that is more). Charges are whole micro-tokens; a request's are computed from its totals, so an
   account's charge is at any time what its requests have paid plus what it was lifted by: nothing drifts.
3. Next is the backlogged tenant with the least charge, and of its backlogged adapters the one with the least charge;
   within an adapter, requests keep the order of their arrival. Only adapters that could be served now take part. One
   that is on the device of an engine with room (warm) goes before one that is not (cold) while its charge is no more
   than Q above; beyond, the cold one is sent to an engine all the same, to wait there: one request for each adapter.
   The last places of an engine are kept for tenants that have nothing on engines; one takes them that is no more than Q
   above the least of all. So who asks now and then does not wait for the end of somebody's answer.
4. Whoever becomes backlogged is lifted to the least charge among the backlogged; when nobody is, to the charge of the
   one served last. Never is it lifted to less than the highest charge at which anyone was ever picked. So idle time
   earns nothing, whether the others were busy or not. Who could not be served for a while keeps its turn, and is
   lifted to Q below that charge (as is who is queued again because its engine was lost): a load that took a minute does
   not earn a minute of the engines.
5. When a request waits on an engine for its adapter, which could be loaded at once, and others have got Q ahead of its
   flow since, then the device is full of adapters in use. The one of them (or of those about to be) whose tenant, then
   flow, has received most gets no new sequences there until the request can go on. So no adapter waits for ever for
   its place on a device. If others get Q further ahead after it could have left, it is let go: that did not help.
6. Work that was done stays charged, whether the request was cancelled or answered.

The bound. Let f and g be two flows of one level that are backlogged and could be served all through an interval, and W
the work done for a flow in it, divided by its weight. Then

    |W_f - W_g| <= U_f + U_g + 2 Q,  U_f = R_f + X_f,      and without Q if neither waited for its adapter,

where R_f is the most work that can remain to be done for what f has on engines, and X_f the most that f can be charged in
advance, both divided by its weight. If engines hold at most M tokens of prompts and answers at a time, each of the two is
at most max(prompt_weight, output_weight) · M / weight, and the loads. (With nothing charged in advance, U is that of VTC,
arXiv 2401.00588. What is charged in advance widens what can be proven, and halves what is seen.)

Proof. Let T_f be all work done for f, l_f what it was lifted by, x_f what it has been charged in advance, r_f what
remains to be done on engines: charge_f = T_f + l_f + x_f, 0 <= x_f <= X_f, 0 <= r_f <= R_f. Let D(t) = (T_f + l_f) -
(T_g + l_g) while both are backlogged. Claim: D(t) <= R_f + X_g + Q. Let e be the last time up to t when f was picked or lifted.
After e, T_f grows by r_f(e) <= R_f at most, l_f not at all, and T_g + l_g never falls. So it is enough that
T_f + l_f <= T_g + l_g + X_g + Q at e, or that g reaches that later:
  - f was picked, and g was backlogged and open: by 3, charge_f <= charge_g + Q. As x_f >= 0 and x_g <= X_g, it holds.
  - f was picked, and g was not backlogged or not open: g has been lifted since to no less than the highest pick, less
    Q if it was not open (4), so charge_g >= charge_f(e) - Q then, and the same follows.
  - f was lifted to the least of the backlogged: that is no more than charge_g, or g was lifted later by the same rule.
  - f was lifted to the highest pick, of some h: at that pick h stood to g as f does in the first two cases. To the one
    served last: then nobody was backlogged, and g has been lifted since to no less than f's charge or f's pick.
The same holds with f and g exchanged. W_f - W_g in the interval is D at its end less D at its beginning, and so at most
R_f + X_g + Q + R_g + X_f + Q. Q enters only where one of the two was cold. QED. bench/fairness/traces.py tries it.

Cost: picking takes O(log n) for n backlogged adapters, times the few distinct sets of engines that adapters are on;
charging takes O(1).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from router.accounts import Account, Level, Question, Where
from router.book import Book
from router.ledger import Ledger
from router.loads import Loads
from router.tickets import MICRO, NOTHING, Flow, Tariff, Tenant, Ticket, Work

__all__ = ["MICRO", "Flows", "Tariff", "Ticket", "Work"]


class Flows(Book):
    """All queues and all charges of one router: the book, and how it is picked from and charged.

    Args:
        window: Q of the law, in weighted tokens.
        tenant_weights: of tenants that do not have weight 1.
        is_loadable: whether an adapter's bytes are where a device can load them from at once.
    """

    def __init__(
        self,
        tariff: Tariff,
        window: float = 0.0,
        tenant_weights: Mapping[str, float] | None = None,
        is_loadable: Callable[[str], bool] = lambda digest: True,
    ) -> None:
        micro_window = round(window * MICRO)
        super().__init__(Loads(micro_window, is_loadable), micro_window, tenant_weights or {})
        self._tariff = tariff
        # What is served here is noted in it, when charges are shared with other routers.
        self.ledger: Ledger | None = None
        self._running: dict[int, Ticket] = {}
        self._tickets = 0

    def enqueue(
        self,
        tenant: str,
        digest: str,
        weight: float,
        where: Where,
        prompt_tokens: int = 0,
        most_output: int | None = None,
    ) -> Ticket:
        """Appends a request to its flow. Ids that share a digest share the flow; the weight given last is in force."""
        flow = self._flow(tenant, digest, where)
        if flow.queue:
            flow.tenant.waiting_weight += weight - flow.weight
        flow.set_weight(weight)
        self._tickets += 1
        ticket = Ticket(self._tickets, flow, prompt_tokens, most_output)
        self._append(ticket)
        return ticket

    def requeue(self, ticket: Ticket) -> None:
        """Puts a request that was picked back at the head of its flow, with nothing charged for it."""
        ticket.expected_output = 0
        self._settle(ticket, NOTHING)
        self._leave_engine(ticket)
        # Its turn had come already: it is not one that becomes backlogged.
        self._append(ticket, self._window + 1)
        ticket.flow.queue.move_to_end(ticket.number, last=False)

    def pick(self, is_open: Question, is_warm: Question | None = None) -> Ticket | None:
        """Takes the next request out of its queue; None when there is none in a flow for which `is_open` holds.

        Args:
            is_open: whether a request for an adapter that is on these engines could be dispatched now.
            is_warm: whether it could, to an engine that has the adapter; left out, wherever it is open.
        """
        is_warm = is_warm or is_open
        flow = self._next(self.level, is_open, is_warm)
        if flow is not None and (changed := self._loads.make_room(flow, self._running.values(), self._where)):
            self._refresh(changed)
            flow = self._next(self.level, is_open, is_warm)
        return self._take(flow) if flow else None

    def pick_newcomer(self, is_open: Question, is_warm: Question | None = None) -> Ticket | None:
        """The same among tenants that have nothing on engines, for the places that are kept for them; None unless the next of
        them is no more than Q above all that are open."""
        flow = self._next(self._newcomers, is_open, is_warm or is_open)
        least = self.level.least(is_open)
        if flow is None or least is None or flow.tenant.charge > least.charge + self._window:
            return None
        return self._take(flow)

    def charge(self, ticket: Ticket, prompt_tokens: int, output_tokens: int, load_bytes: int = 0) -> None:
        """Makes what is charged for a request the cost of this work, whatever was charged for it before."""
        self._settle(ticket, Work(prompt_tokens, output_tokens, load_bytes))

    def loading(self, ticket: Ticket, engine_id: str) -> None:
        """A request that was picked waits on an engine for its adapter. Until it is there, its adapter is not picked for
        engines that do not have it."""
        self._refresh(self._loads.begin(ticket, engine_id))

    def loaded(self, ticket: Ticket) -> None:
        """A request waits for its adapter no more; of no effect when it did not."""
        self._refresh(self._loads.end(ticket))

    def settle(self, ticket: Ticket) -> None:
        """No more work will be done for a request: what it has paid is what that cost."""
        if ticket.expected_output:
            ticket.expected_output = 0
            self._settle(ticket, ticket.work)

    def end(self, ticket: Ticket) -> None:
        """Forgets a request, queued or picked. What was charged for it stays charged. Call once."""
        if ticket.number in ticket.flow.queue:
            self._remove(ticket)
        else:
            self.settle(ticket)
            if ticket.work.output_tokens:
                ticket.flow.learn(ticket.work.output_tokens)
            self._leave_engine(ticket)
        self._sweep()

    def moved(self, digest: str, where: Where) -> None:
        """An adapter is on these engines now. One that has no flow is not remembered: its next request says where it is."""
        if digest not in self._by_digest:
            return
        self._where[digest] = where
        for ticket in self._loads.at(digest, where):
            self.loaded(ticket)
        self._refresh([digest])

    def newest(self, tenant: str) -> Ticket | None:
        """The request of a tenant that would be served last; None when none of its requests waits."""
        found = self._tenants.get(tenant)
        flows = [flow for flow in found.flows.values() if flow.queue] if found else []
        if not flows:
            return None
        # By digest where claims are equal, so that every run decides alike.
        last = max(flows, key=lambda flow: (self.claim(flow), flow.digest))
        return next(reversed(last.queue.values()))

    def claim(self, account: Account) -> float:
        """What an account has received, and would have received with all it waits for, in weighted tokens."""
        return (account.charge + self._tariff.output * account.queued_tokens / account.weight) / MICRO

    def tokens_ahead(self, flow: Flow) -> float:
        """How far a flow is above what newcomers among its tenant's are lifted to, in tokens of output for a weight of 1."""
        return max(0, flow.charge - flow.tenant.level.level()) / self._tariff.output

    def _next(self, level: Level[Tenant], is_open: Question, is_warm: Question) -> Flow | None:
        tenant = level.next(is_open, is_warm, self._window)
        return tenant.level.next(is_open, is_warm, self._window) if tenant else None

    def _take(self, flow: Flow) -> Ticket:
        """Takes the first request of a flow to an engine."""
        tenant = flow.tenant
        self.level.served(tenant)
        tenant.level.served(flow)
        ticket = next(iter(flow.queue.values()))
        ticket.is_first = not tenant.running
        self._start(flow)
        self._running[ticket.number] = ticket
        self._remove(ticket)
        ticket.open_account()
        self._settle(ticket, Work(ticket.prompt_tokens))
        return ticket

    def _settle(self, ticket: Ticket, work: Work) -> None:
        cost = self._tariff.cost(work)
        if self.ledger:
            self.ledger.note((ticket.tenant, ticket.digest), cost - ticket.cost)
        ticket.work, ticket.cost = work, cost
        in_advance = max(0, ticket.expected_output - work.output_tokens)
        change, tenant_change = ticket.pay(ticket.cost + self._tariff.output * in_advance)
        flow, tenant = ticket.flow, ticket.flow.tenant
        flow.charge += change
        tenant.charge += tenant_change
        if change < 0 or tenant_change < 0:
            self._fell(flow)

    def _leave_engine(self, ticket: Ticket) -> None:
        del self._running[ticket.number]
        self._stop(ticket.flow)
        self.loaded(ticket)
