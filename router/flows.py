"""Who is next, and who has received how much. PURE.

The law:

1. There are two levels of flows: tenants, and below each tenant its adapters, by digest ("" is the base). A tenant with
   a thousand adapters competes with other tenants as one.
2. A request costs prompt_weight · (prompt tokens that were computed) + output_weight · (output tokens). Its adapter's
   flow and its tenant are each charged cost / weight. Charges are integers (micro-tokens); what a division leaves over
   is carried to the next charge, so that no sequence of charges and corrections drifts from their sum.
3. Next is the backlogged tenant with the least charge, and of its backlogged adapters the one with the least charge;
   within an adapter, requests keep the order of their arrival. Only adapters that could be served now take part.
4. Whoever becomes backlogged is lifted to the least charge among the backlogged; when nobody is, to the charge of the
   one served last. Never is it lifted to less than the highest charge at which anyone was ever picked. So idle time
   earns nothing, whether the others were busy or not; and neither does a newcomer inherit the claim of a flow that was
   passed over because its adapter was loading.
5. Work that was done stays charged, whether the request was cancelled or answered.

Hence the bound. Take two flows f, g of one level that stay backlogged and servable in an interval. f is picked only
when its charge is not above g's. After its last pick, f can still be charged for what it has in flight: that prompt, and
the output of at most all places of all engines; call the most this can be U. So charge_f <= charge_g + U at any time,
and the same with f and g exchanged. What they receive in the interval differs by the difference of two such gaps:
|W_f - W_g| <= 2U. tests/router/test_flows.py checks this on a simulated engine.

Cost: picking takes O(log n) for n backlogged adapters, times the few distinct sets of engines that adapters are on;
charging takes O(1).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field

from router.accounts import Account, Level, Where

# Charges are whole numbers of these per weighted token.
MICRO = 1_000_000

# Idle flows are looked through for forgettable ones when there are this many, then whenever their number has doubled.
_FIRST_SWEEP = 1024


@dataclass(frozen=True)
class Tariff:
    """Micro-tokens charged per token."""

    prompt: int
    output: int

    @staticmethod
    def of(prompt_weight: float, output_weight: float) -> Tariff:
        return Tariff(round(prompt_weight * MICRO), round(output_weight * MICRO))

    def cost(self, prompt_tokens: int, output_tokens: int) -> int:
        return self.prompt * prompt_tokens + self.output * output_tokens


class _Tenant(Account):
    __slots__ = ("flows", "level", "name", "queued")

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self.queued = 0
        self.flows: dict[str, _Flow] = {}
        self.level: Level[_Flow] = Level()


class _Flow(Account):
    __slots__ = ("digest", "queue", "tenant", "where")

    def __init__(self, tenant: _Tenant, digest: str) -> None:
        super().__init__()
        self.tenant = tenant
        self.digest = digest
        self.where: Where = None
        self.queue: OrderedDict[int, Ticket] = OrderedDict()


@dataclass(slots=True, eq=False)
class Ticket:
    """One request's place in its flow, and what was charged for it, in micro-tokens before the flow's weight."""

    number: int
    _flow: _Flow = field(repr=False)
    charged: int = 0

    @property
    def tenant(self) -> str:
        return self._flow.tenant.name

    @property
    def digest(self) -> str:
        return self._flow.digest

    @property
    def where(self) -> Where:
        return self._flow.where


class Flows:
    """All queues and all charges of one router."""

    def __init__(self, tariff: Tariff) -> None:
        self._tariff = tariff
        self._tenants: dict[str, _Tenant] = {}
        self._level: Level[_Tenant] = Level()
        self._by_digest: dict[str, set[_Flow]] = {}
        self._flow_count = 0
        self._sweep_at = _FIRST_SWEEP
        self._tickets = 0
        self.queued = 0

    def queued_by(self, tenant: str) -> int:
        found = self._tenants.get(tenant)
        return found.queued if found else 0

    def charge_of(self, tenant: str, digest: str | None = None) -> int:
        """Charge of a tenant, or of one of its adapters, in micro-tokens; 0 when it is not known."""
        account: Account | None = self._tenants.get(tenant)
        if digest is not None and isinstance(account, _Tenant):
            account = account.flows.get(digest)
        return account.charge if account else 0

    def enqueue(self, tenant: str, digest: str, weight: float, where: Where) -> Ticket:
        """Appends a request to its flow. Ids that share a digest share the flow; the weight given last is in force."""
        flow = self._flow(tenant, digest, where)
        flow.set_weight(weight)
        self._tickets += 1
        ticket = Ticket(self._tickets, flow)
        self._append(ticket)
        return ticket

    def requeue(self, ticket: Ticket) -> None:
        """Puts a request that was picked back at the head of its flow, with nothing charged for it."""
        self.charge(ticket, 0, 0)
        flow = ticket._flow
        flow.running -= 1
        flow.tenant.running -= 1
        self._append(ticket)
        flow.queue.move_to_end(ticket.number, last=False)

    def pick(self, is_open: Callable[[Where], bool]) -> Ticket | None:
        """Takes the next request out of its queue; None when there is none in a flow for which `is_open` holds."""
        tenant = self._level.least(is_open)
        flow = tenant.level.least(is_open) if tenant else None
        if tenant is None or flow is None:
            return None
        self._level.served(tenant)
        tenant.level.served(flow)
        ticket = next(iter(flow.queue.values()))
        self._remove(ticket)
        flow.running += 1
        tenant.running += 1
        return ticket

    def charge(self, ticket: Ticket, prompt_tokens: int, output_tokens: int) -> None:
        """Makes what is charged for a request the cost of these tokens, whatever was charged for it before."""
        cost = self._tariff.cost(prompt_tokens, output_tokens)
        difference = cost - ticket.charged
        ticket.charged = cost
        flow = ticket._flow
        flow.add(difference)
        flow.tenant.add(difference)
        if difference < 0:
            flow.tenant.level.fell(flow)
            self._level.fell(flow.tenant)

    def end(self, ticket: Ticket) -> None:
        """Forgets a request, queued or picked. What was charged for it stays charged. Call once."""
        flow = ticket._flow
        if ticket.number in flow.queue:
            self._remove(ticket)
        else:
            flow.running -= 1
            flow.tenant.running -= 1
        if self._flow_count >= self._sweep_at:
            self._sweep()

    def moved(self, digest: str, where: Where) -> None:
        """An adapter is on these engines now."""
        for flow in self._by_digest.get(digest, ()):
            if flow.where == where:
                continue
            if flow.queue:
                self._leave(flow)
            flow.where = where
            if flow.queue:
                self._enter(flow)

    def digests(self) -> list[str]:
        """Adapters of all flows that are remembered."""
        return list(self._by_digest)

    def _flow(self, tenant_name: str, digest: str, where: Where) -> _Flow:
        tenant = self._tenants.get(tenant_name)
        if tenant is None:
            tenant = self._tenants[tenant_name] = _Tenant(tenant_name)
        flow = tenant.flows.get(digest)
        if flow is None:
            flow = tenant.flows[digest] = _Flow(tenant, digest)
            flow.where = where
            self._by_digest.setdefault(digest, set()).add(flow)
            self._flow_count += 1
        return flow

    def _append(self, ticket: Ticket) -> None:
        flow = ticket._flow
        tenant = flow.tenant
        if not tenant.queued:
            tenant.charge = max(tenant.charge, self._level.level())
        if not flow.queue:
            flow.charge = max(flow.charge, tenant.level.level())
            self._enter(flow)
        flow.queue[ticket.number] = ticket
        tenant.queued += 1
        self.queued += 1

    def _remove(self, ticket: Ticket) -> None:
        flow = ticket._flow
        del flow.queue[ticket.number]
        flow.tenant.queued -= 1
        self.queued -= 1
        if not flow.queue:
            self._leave(flow)

    def _enter(self, flow: _Flow) -> None:
        tenant = flow.tenant
        if not tenant.level.is_in(flow.where):
            self._level.enter(tenant, flow.where)
        tenant.level.enter(flow, flow.where)

    def _leave(self, flow: _Flow) -> None:
        tenant = flow.tenant
        tenant.level.leave(flow, flow.where)
        if not tenant.level.is_in(flow.where):
            self._level.leave(tenant, flow.where)

    def _sweep(self) -> None:
        """Forgets idle accounts that would be lifted to their charge anyway: names come from outside, without end."""
        level = self._level.level()
        for tenant in list(self._tenants.values()):
            forgotten = not tenant.queued and not tenant.running and tenant.charge <= level
            if forgotten:
                del self._tenants[tenant.name]
            flow_level = tenant.level.level()
            for flow in list(tenant.flows.values()):
                if forgotten or not (flow.queue or flow.running or flow.charge > flow_level):
                    self._forget(flow)
        self._sweep_at = max(_FIRST_SWEEP, 2 * self._flow_count)

    def _forget(self, flow: _Flow) -> None:
        del flow.tenant.flows[flow.digest]
        self._flow_count -= 1
        flows = self._by_digest[flow.digest]
        flows.discard(flow)
        if not flows:
            del self._by_digest[flow.digest]
