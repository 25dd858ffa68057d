"""Who is known, who waits, and where each could be served. PURE. The law is in flows.py; lifting, its rule 4, is here."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from router.accounts import Account, Level, Where
from router.ledger import Name
from router.loads import Loads
from router.tickets import MICRO, Flow, Tenant, Ticket

# Idle flows are looked through for forgettable ones when there are this many, then whenever their number has doubled.
_FIRST_SWEEP = 1024


class Book:
    """The accounts of tenants and flows, opened with a first request and closed when nobody would miss them.

    Args:
        loads: says where an adapter may be picked for.
        window: Q of the law, in micro-tokens.
        tenant_weights: of tenants that do not have weight 1.

    Attributes:
        level: tenants that could be served.
    """

    def __init__(self, loads: Loads, window: int, tenant_weights: Mapping[str, float]) -> None:
        self._loads = loads
        self._window = window
        self._tenant_weights = dict(tenant_weights)
        self._leads: dict[Name, tuple[int, int]] = {}
        self.level: Level[Tenant] = Level()
        # Those of them that have nothing on engines.
        self._newcomers: Level[Tenant] = Level()
        self._tenants: dict[str, Tenant] = {}
        self._backlogged: dict[str, Tenant] = {}
        self._by_digest: dict[str, set[Flow]] = {}
        self._where: dict[str, Where] = {}
        self._flow_count = 0
        self._sweep_at = _FIRST_SWEEP
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

    def digests(self) -> list[str]:
        """Adapters of all flows that are remembered."""
        return list(self._by_digest)

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

    def _start(self, flow: Flow) -> None:
        """A request of a flow goes to an engine."""
        tenant = flow.tenant
        if not tenant.running:
            for where in tenant.level.wheres:
                self._newcomers.leave(tenant, where)
        flow.running += 1
        tenant.running += 1

    def _stop(self, flow: Flow) -> None:
        """It is on an engine no more."""
        tenant = flow.tenant
        flow.running -= 1
        tenant.running -= 1
        if not tenant.running:
            for where in tenant.level.wheres:
                self._newcomers.enter(tenant, where)

    def _fell(self, flow: Flow) -> None:
        """The charge of a flow, or of its tenant, is less than it was."""
        flow.tenant.level.fell(flow)
        self.level.fell(flow.tenant)
        self._newcomers.fell(flow.tenant)

    def _refresh(self, digests: Iterable[str]) -> None:
        """Brings the flows of adapters to where they belong in their levels."""
        for digest in digests:
            # One that was held back may have been forgotten since.
            flows = self._by_digest.get(digest, ())
            servable = self._servable(digest) if flows else False
            for flow in flows:
                self._list(flow, servable if flow.queue else False)

    def _servable(self, digest: str) -> Where | bool:
        return self._loads.servable(digest, self._where[digest])

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

    def _sweep(self) -> None:
        """Forgets idle accounts that would be lifted to their charge anyway: names come from outside, without end."""
        if self._flow_count < self._sweep_at:
            return
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
