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

from collections.abc import Callable, Iterable, Mapping

from router.accounts import Account, Level, Question, Where
from router.ledger import Ledger, Name
from router.tickets import MICRO, NOTHING, Flow, Hold, Tariff, Tenant, Ticket, Work

__all__ = ["MICRO", "Flows", "Tariff", "Ticket", "Work"]

# Idle flows are looked through for forgettable ones when there are this many, then whenever their number has doubled.
_FIRST_SWEEP = 1024


class Flows:
    """All queues and all charges of one router.

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
        self._tariff = tariff
        self._window = round(window * MICRO)
        self._tenant_weights = dict(tenant_weights or {})
        self._is_loadable = is_loadable
        # What is served here is noted in it, when charges are shared with other routers.
        self.ledger: Ledger | None = None
        self._leads: dict[Name, tuple[int, int]] = {}
        self.level: Level[Tenant] = Level()
        # Those of them that have nothing on engines.
        self._newcomers: Level[Tenant] = Level()
        self._tenants: dict[str, Tenant] = {}
        self._backlogged: dict[str, Tenant] = {}
        self._by_digest: dict[str, set[Flow]] = {}
        self._running: dict[int, Ticket] = {}
        # Tickets that were picked and wait for their adapter, with the engine they wait on.
        self._loading: dict[Ticket, str] = {}
        self._hold: Hold | None = None
        # Tickets for which holding an adapter back did not help.
        self._hopeless: set[Ticket] = set()
        self._where: dict[str, Where] = {}
        self._flow_count = 0
        self._sweep_at = _FIRST_SWEEP
        self._tickets = 0
        self.queued = 0
        self.queued_tokens = 0
        # Weights of those with requests that wait, for estimates only: sums of floats may drift by a rounding.
        self.waiting_weight = 0.0

    @property
    def is_shared(self) -> bool:
        """Whether more than one tenant is known, so that places should be kept for those who come."""
        return len(self._tenants) > 1

    def account(self, tenant: str, digest: str | None = None) -> Account | None:
        """The account of a tenant, or of one of its adapters; None when it is not known. To be read only."""
        found = self._tenants.get(tenant)
        return found if found is None or digest is None else found.flows.get(digest)

    def weight_of(self, tenant: str) -> float:
        return self._tenant_weights.get(tenant, 1.0)

    def accounts(self) -> Iterable[Tenant]:
        """All tenants that are known."""
        return self._tenants.values()

    def backlogged(self) -> Iterable[Tenant]:
        """Tenants with requests that wait."""
        return self._backlogged.values()

    def queued_by(self, tenant: str) -> int:
        account = self.account(tenant)
        return account.queued if account else 0

    def queued_for(self, digest: str) -> tuple[int, int]:
        """Requests that wait for an adapter, all tenants together, and their tokens."""
        flows = self._by_digest.get(digest, ())
        return sum(flow.queued for flow in flows), sum(flow.queued_tokens for flow in flows)

    def charge_of(self, tenant: str, digest: str | None = None) -> int:
        """Charge of a tenant, or of one of its adapters, in micro-tokens; 0 when it is not known."""
        account = self.account(tenant, digest)
        return account.charge if account else 0

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
        if flow is not None and self._make_room(flow):
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
        self._loading[ticket] = engine_id
        self._refresh(ticket.digest)

    def loaded(self, ticket: Ticket) -> None:
        """A request waits for its adapter no more; of no effect when it did not."""
        if self._loading.pop(ticket, None) is not None:
            self._hopeless.discard(ticket)
            self._release(ticket)
            self._refresh(ticket.digest)

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
        if self._flow_count >= self._sweep_at:
            self._sweep()

    def moved(self, digest: str, where: Where) -> None:
        """An adapter is on these engines now. One that has no flow is not remembered: its next request says where it is."""
        if digest not in self._by_digest:
            return
        self._where[digest] = where
        for ticket, engine_id in list(self._loading.items()):
            if ticket.digest == digest and (where is None or engine_id in where):
                self.loaded(ticket)
        self._refresh(digest)

    def served_elsewhere(self, served: Mapping[Name, int]) -> None:
        """Charges what other routers have served, in weighted tokens; who is not known here is lifted when it comes."""
        for (tenant_name, digest), tokens in served.items():
            tenant = self._tenants.get(tenant_name)
            if tenant:
                tenant.served_elsewhere(tokens * MICRO)
                if digest in tenant.flows:
                    tenant.flows[digest].served_elsewhere(tokens * MICRO)

    def lead(self, name: Name) -> tuple[int, int]:
        """By how many weighted tokens a flow, and its tenant, is above the level that newcomers are lifted to."""
        tenant = self._tenants.get(name[0])
        flow = tenant.flows.get(name[1]) if tenant else None
        if tenant is None or flow is None:
            return 0, 0
        leads = flow.charge - tenant.level.level(), tenant.charge - self.level.level()
        return max(0, leads[0]) // MICRO, max(0, leads[1]) // MICRO

    def begin(self, leads: Mapping[Name, tuple[int, int]]) -> None:
        """Goes on from where a router was that ended: who was ahead then is ahead when it comes."""
        self._leads = {name: lead for name, lead in leads.items() if any(lead)}

    def digests(self) -> list[str]:
        """Adapters of all flows that are remembered."""
        return list(self._by_digest)

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
        if ticket.is_first:
            for where in tenant.level.wheres:
                self._newcomers.leave(tenant, where)
        flow.running += 1
        tenant.running += 1
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
            tenant.level.fell(flow)
            self.level.fell(tenant)
            self._newcomers.fell(tenant)

    def _make_room(self, picked: Flow) -> bool:
        """Holds an adapter back if a request has waited its bound for room on a device; returns whether anything changed."""
        if self._hold:
            return self._doubt(self._hold, picked)
        for ticket, engine_id in self._loading.items():
            is_behind = _lead(picked, ticket.flow) > self._window
            if is_behind and ticket not in self._hopeless and self._is_loadable(ticket.digest):
                return self._hold_back(ticket, engine_id, picked)
        return False

    def _hold_back(self, ticket: Ticket, engine_id: str, picked: Flow) -> bool:
        in_use = [
            flow
            for flow in (picked, *(other.flow for other in self._running.values()))
            if flow.digest != ticket.digest and engine_id in (self._where[flow.digest] or ())
        ]
        if not in_use:
            return False
        self._hold = Hold(ticket, engine_id, max(in_use, key=lambda flow: (flow.tenant.charge, flow.charge)))
        self._refresh(self._hold.flow.digest)
        return True

    def _doubt(self, hold: Hold, picked: Flow) -> bool:
        """Gives a hold up that has not helped although the adapter could leave."""
        if any(other.digest == hold.flow.digest for other in self._running.values()):
            return False
        lead = _lead(picked, hold.flow)
        if hold.lead is None:
            hold.lead = lead
        if lead <= hold.lead + self._window:
            return False
        self._hopeless.add(hold.ticket)
        self._release(hold.ticket)
        return True

    def _release(self, ticket: Ticket) -> None:
        """Lets an adapter go on that was held back for a request."""
        if self._hold and self._hold.ticket is ticket:
            digest = self._hold.flow.digest
            self._hold = None
            self._refresh(digest)

    def _leave_engine(self, ticket: Ticket) -> None:
        del self._running[ticket.number]
        ticket.flow.running -= 1
        tenant = ticket.flow.tenant
        tenant.running -= 1
        if not tenant.running:
            for where in tenant.level.wheres:
                self._newcomers.enter(tenant, where)
        self.loaded(ticket)

    def _servable(self, digest: str) -> Where | bool:
        """Where an adapter may be picked for; False for nowhere at the moment."""
        where = self._where[digest]
        if where is None:
            return None
        if self._hold and self._hold.flow.digest == digest:
            where -= {self._hold.engine_id}
            return where or False
        if not where and any(ticket.digest == digest for ticket in self._loading):
            return False
        return where

    def _refresh(self, digest: str) -> None:
        """Brings the flows of an adapter to where they belong in their levels."""
        servable = self._servable(digest)
        for flow in self._by_digest.get(digest, ()):
            self._list(flow, servable if flow.queue else False)

    def _list(self, flow: Flow, at: Where | bool) -> None:
        if flow.listed_at == at:
            return
        tenant = flow.tenant
        was_at = flow.listed_at
        if not isinstance(was_at, bool):
            tenant.level.leave(flow, was_at)
            if not tenant.level.is_in(was_at):
                self.level.leave(tenant, was_at)
                if not tenant.running:
                    self._newcomers.leave(tenant, was_at)
        flow.listed_at = at
        if not isinstance(at, bool):
            flow.where = at
            # Where it could not be served before, it keeps its turn, being just below, but no claim to all it missed.
            if not _covers(was_at, at):
                flow.lift(tenant.level.highest_pick - self._window - 1)
            if not tenant.level.covers(at):
                tenant.lift(self.level.highest_pick - self._window - 1)
            if not tenant.level.is_in(at):
                self.level.enter(tenant, at)
                if not tenant.running:
                    self._newcomers.enter(tenant, at)
            tenant.level.enter(flow, at)

    def _flow(self, tenant_name: str, digest: str, where: Where) -> Flow:
        tenant = self._tenants.get(tenant_name)
        if tenant is None:
            tenant = self._tenants[tenant_name] = Tenant(tenant_name)
            tenant.set_weight(self.weight_of(tenant_name))
            ahead = max((lead[1] for name, lead in self._leads.items() if name[0] == tenant_name), default=0)
            if ahead:
                tenant.lift(self.level.level() + ahead * MICRO)
        flow = tenant.flows.get(digest)
        if flow is None:
            flow = tenant.flows[digest] = Flow(tenant, digest)
            if ahead := self._leads.pop((tenant_name, digest), (0, 0))[0]:
                flow.lift(tenant.level.level() + ahead * MICRO)
            self._by_digest.setdefault(digest, set()).add(flow)
            self._where.setdefault(digest, where)
            flow.where = self._where[digest]
            self._flow_count += 1
        return flow

    def _append(self, ticket: Ticket, below: int | None = None) -> None:
        """Puts a request into its flow's queue; a flow that was empty is lifted, to so far below the highest pick if given."""
        flow = ticket.flow
        tenant = flow.tenant
        if not tenant.queued:
            tenant.lift(self.level.level() if below is None else self.level.highest_pick - below)
            self._backlogged[tenant.name] = tenant
            self.waiting_weight += tenant.weight
        if not flow.queue:
            flow.lift(tenant.level.level() if below is None else tenant.level.highest_pick - below)
            tenant.waiting_weight += flow.weight
        flow.queue[ticket.number] = ticket
        self._count(ticket, 1)
        if flow.listed_at is False:
            self._list(flow, self._servable(flow.digest))

    def _remove(self, ticket: Ticket) -> None:
        flow = ticket.flow
        del flow.queue[ticket.number]
        self._count(ticket, -1)
        tenant = flow.tenant
        if not flow.queue:
            self._list(flow, False)
            tenant.waiting_weight -= flow.weight
        if not tenant.queued:
            del self._backlogged[tenant.name]
            self.waiting_weight -= tenant.weight

    def _count(self, ticket: Ticket, sign: int) -> None:
        if sign > 0:
            ticket.waiting_tokens = ticket.tokens
        for account in (ticket.flow, ticket.flow.tenant):
            account.queued += sign
            account.queued_tokens += sign * ticket.waiting_tokens
        self.queued += sign
        self.queued_tokens += sign * ticket.waiting_tokens

    def _sweep(self) -> None:
        """Forgets idle accounts that would be lifted to their charge anyway: names come from outside, without end."""
        level = self.level.level()
        for tenant in list(self._tenants.values()):
            forgotten = not tenant.queued and not tenant.running and tenant.charge <= level
            if forgotten:
                del self._tenants[tenant.name]
            flow_level = tenant.level.level()
            for flow in list(tenant.flows.values()):
                if forgotten or not (flow.queue or flow.running or flow.charge > flow_level):
                    self._forget(flow)
        self._sweep_at = max(_FIRST_SWEEP, 2 * self._flow_count)

    def _forget(self, flow: Flow) -> None:
        del flow.tenant.flows[flow.digest]
        self._flow_count -= 1
        flows = self._by_digest[flow.digest]
        flows.discard(flow)
        if not flows:
            del self._by_digest[flow.digest]
            del self._where[flow.digest]


def _covers(was_at: Where | bool, at: Where) -> bool:
    """Whether who could be served on some engines could be on these."""
    return was_at is None or (not isinstance(was_at, bool) and at is not None and bool(at) and at <= was_at)


def _lead(flow: Flow, other: Flow) -> int:
    """How much more one flow has received than another, where their paths part."""
    if flow.tenant is other.tenant:
        return flow.charge - other.charge
    return flow.tenant.charge - other.tenant.charge
