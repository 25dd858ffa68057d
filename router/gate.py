"""Who is let into the queue and who is begun, by how fast requests were seen to be served. PURE. Rules: admission.py."""

from __future__ import annotations

from router.admission import Admit, Limits, Newcomer, Reject, admit, too_late
from router.flows import Flows, Ticket
from router.rate import Pace, ServiceRate
from router.request import Request
from router.tickets import Flow, Tenant


class Gate:
    """Of one loop. To be told of every turn and of every answer."""

    def __init__(self, limits: Limits, flows: Flows) -> None:
        self._limits = limits
        self._flows = flows
        self._rate = ServiceRate()
        self._pace = Pace()

    def decide(self, request: Request, now: float) -> Admit | Reject:
        """Whether a request that came now might wait; changes nothing."""
        return admit(self._limits, self._flows, self._newcomer(request, now), self._rate.per_second(now))

    def turn(self, request: Request, ticket: Ticket, now: float) -> Reject | None:
        """A request's turn has come. It is refused when its answer would come too late and others wait for the place: how long
        the answer will be is a guess, and without others nothing is lost by it. Not when its turn had come before."""
        tenant = ticket.flow.tenant
        tenant.rate.note(now, ticket.waiting_tokens, is_busy=tenant.queued > 0)
        self._rate.note(now, ticket.waiting_tokens, is_busy=self._flows.queued > 0)
        return too_late(self._newcomer(request, now)) if self._flows.queued and not request.engine else None

    def answered(self, request: Request, now: float) -> None:
        """A request has its whole answer. One that began on another engine says nothing of the pace."""
        if request.output_tokens and not request.migrations:
            self._pace.note(now - request.dispatched_at, request.output_tokens)

    def _newcomer(self, request: Request, now: float) -> Newcomer:
        """Its answer may be as long as its flow's latest, and come at the present pace."""
        tenant = self._flows.account(request.tenant)
        flow = self._flows.account(request.tenant, request.adapter.digest)
        tokens = flow.expected_output if isinstance(flow, Flow) else 0
        if request.most_output_tokens is not None:
            tokens = min(tokens, request.most_output_tokens)
        return Newcomer(
            request.tenant,
            request.adapter.digest,
            request.estimated_prompt_tokens,
            None if request.deadline is None else request.deadline - now,
            self._pace.seconds(tokens),
            tenant.rate.per_second(now) if isinstance(tenant, Tenant) else None,
        )
