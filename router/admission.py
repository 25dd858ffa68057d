"""Whether one more request may wait, and who makes room when not all can. PURE.

A request is refused when its tenant's, its adapter's or the whole queue is full, in requests or in tokens, or when at the
present rate its deadline will have passed before its answer is there: at once, or when its turn has come after all too late.
Where only the whole queue is full, the one who asked for most gives way: the tenant that would have received most, by
weight, if all that waits were served. If that is the newcomer's, the newcomer is refused; otherwise the latest request of
that tenant is, with the same status, and its place is the newcomer's. So a flood fills the queue with itself and turns away
nobody else.

Nobody is refused without being told when to come back: the time it takes, at the present rate and share, to serve a tenth
of what is in the way.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from router.flows import Flows, Ticket
from router.tickets import Flow, Tenant

# Late enough that those rejected together do not all meet a full queue again, early enough that the queue does not run
# empty.
_SHARE_TO_SERVE = 0.1
_SHORTEST_RETRY = 0.1
# Also the answer while nothing is being served at all.
_LONGEST_RETRY = 30.0
# Tokens per second that are as good as none.
_SLOWEST = 1e-6


@dataclass(frozen=True)
class Limits:
    """Most requests, and most tokens of prompts and expected answers, that may wait."""

    queued: int
    queued_per_tenant: int
    queued_per_adapter: int
    tokens: int
    tokens_per_tenant: int
    tokens_per_adapter: int


@dataclass(frozen=True)
class Newcomer:
    """A request that wants to wait.

    Attributes:
        seconds_left: to its deadline, None without one.
        answer_seconds: what its answer may take, once its turn has come.
        per_second: tokens of its tenant that leave the queue per second; None where that is not known.
    """

    tenant: str
    digest: str
    prompt_tokens: int
    seconds_left: float | None = None
    answer_seconds: float = 0.0
    per_second: float | None = None


@dataclass(frozen=True)
class Admit:
    """The request may wait; `instead_of` may not any more."""

    instead_of: Ticket | None = None
    refusal: Reject | None = None


@dataclass(frozen=True)
class Reject:
    """The request may not wait; a retry makes sense after `retry_after` seconds."""

    reason: str
    message: str
    limit: float
    retry_after: float


def admit(limits: Limits, flows: Flows, newcomer: Newcomer, per_second: float | None) -> Admit | Reject:
    """Decides on one more request, with so many tokens per second leaving the queue."""
    refusal = _own_limits(limits, flows, newcomer, per_second) or _deadline(flows, newcomer, per_second)
    if refusal:
        return refusal
    return _make_room(limits, flows, newcomer, per_second)


def _own_limits(limits: Limits, flows: Flows, newcomer: Newcomer, per_second: float | None) -> Reject | None:
    """Refuses when its own tenant or adapter has as much waiting as it may."""
    adapter_queued, adapter_tokens = flows.queued_for(newcomer.digest)
    tenant = flows.account(newcomer.tenant)
    queued, tokens = (tenant.queued, tenant.queued_tokens) if tenant else (0, 0)
    for reason, whose, count, limit, waiting in (
        ("TENANT_QUEUE_FULL", "of this tenant", queued, limits.queued_per_tenant, tokens),
        ("ADAPTER_QUEUE_FULL", "for this adapter", adapter_queued, limits.queued_per_adapter, adapter_tokens),
    ):
        if count >= limit:
            text = f"{limit} requests {whose} are waiting already"
            return Reject(reason, text, limit, _retry(waiting, share_of(flows, newcomer.tenant), per_second))
    for reason, whose, waiting, limit in (
        ("TENANT_TOKENS_FULL", "of this tenant", tokens, limits.tokens_per_tenant),
        ("ADAPTER_TOKENS_FULL", "for this adapter", adapter_tokens, limits.tokens_per_adapter),
    ):
        # One request may always wait, however long it is.
        if waiting and waiting + newcomer.prompt_tokens > limit:
            text = f"{waiting} tokens {whose} are waiting already, {limit} may"
            return Reject(reason, text, limit, _retry(waiting, share_of(flows, newcomer.tenant), per_second))
    return None


def _deadline(flows: Flows, newcomer: Newcomer, per_second: float | None) -> Reject | None:
    """Refuses at once whose answer would come too late; nobody who need not wait, as how long it will be is a guess."""
    wait = expected_wait(flows, newcomer, per_second) if per_second else 0.0
    return too_late(newcomer, wait) if wait else None


def too_late(newcomer: Newcomer, wait: float = 0.0) -> Reject | None:
    """Refuses a request whose turn comes in so many seconds, if its answer will not be there by its deadline."""
    if newcomer.seconds_left is None:
        return None
    late = wait + newcomer.answer_seconds - newcomer.seconds_left
    if late <= 0:
        return None
    text = (
        f"its turn comes in about {wait:.1f} s, its answer takes about {newcomer.answer_seconds:.1f} s, "
        f"and its deadline is in {newcomer.seconds_left:.1f} s"
    )
    return Reject("DEADLINE_UNREACHABLE", text, newcomer.seconds_left, _between(late))


def _make_room(limits: Limits, flows: Flows, newcomer: Newcomer, per_second: float | None) -> Admit | Reject:
    """Admits; where the whole queue is full, in the place of one of the tenant that asks for most."""
    if flows.queued < limits.queued and (
        not flows.queued or flows.queued_tokens + newcomer.prompt_tokens <= limits.tokens
    ):
        return Admit()
    by_requests = flows.queued >= limits.queued
    limit = limits.queued if by_requests else limits.tokens
    what = "requests" if by_requests else "tokens"
    reason = "QUEUE_FULL" if by_requests else "TOKENS_FULL"
    # By name where claims are equal, so that every run decides alike.
    largest = max(flows.backlogged(), key=lambda tenant: (flows.claim(tenant), tenant.name))
    share = share_of(flows, largest.name)
    text = f"{limit} {what} are waiting, which is all that may"
    refusal = Reject(reason, text, limit, _retry(largest.queued_tokens, share, per_second))
    own = flows.account(newcomer.tenant)
    mine = flows.claim(own) if own and own.queued else -math.inf
    ticket = flows.newest(largest.name)
    if ticket is None or mine >= flows.claim(largest):
        return refusal
    if not by_requests and flows.queued_tokens - ticket.waiting_tokens + newcomer.prompt_tokens > limit:
        # One that is far longer than what it would push out is not worth several others.
        return refusal
    return Admit(ticket, refusal)


def share_of(flows: Flows, tenant: str) -> float:
    """What part of the service a tenant gets that has requests waiting."""
    account = flows.account(tenant)
    weight = flows.weight_of(tenant)
    waiting = flows.waiting_weight - (weight if account and account.queued else 0.0)
    return weight / (weight + max(0.0, waiting))


def expected_wait(flows: Flows, newcomer: Newcomer, per_second: float) -> float:
    """Seconds until a request that comes now has its turn. Before it is what waits in its flow and what its flow is ahead by,
    and as much for each weight that waits beside it; but no more than all that waits of its tenant."""
    account, flow = flows.account(newcomer.tenant), flows.account(newcomer.tenant, newcomer.digest)
    if not isinstance(account, Tenant) or not account.queued:
        return 0.0
    weight, waiting, ahead = 1.0, 0, 0.0
    if isinstance(flow, Flow):
        weight, waiting, ahead = flow.weight, flow.queued_tokens, flows.tokens_ahead(flow)
    before = (waiting / weight + ahead) * max(account.waiting_weight, weight)
    return min(account.queued_tokens, before) / _rate_of(flows, newcomer, per_second)


def _rate_of(flows: Flows, newcomer: Newcomer, per_second: float) -> float:
    """Tokens of its tenant that are served per second: as was seen, else its share of all that are."""
    return max(_SLOWEST, newcomer.per_second or share_of(flows, newcomer.tenant) * per_second)


def _retry(tokens: int, share: float, per_second: float | None) -> float:
    if not per_second:
        return _LONGEST_RETRY
    return _between(tokens * _SHARE_TO_SERVE / (share * per_second))


def _between(seconds: float) -> float:
    return min(_LONGEST_RETRY, max(_SHORTEST_RETRY, seconds))
