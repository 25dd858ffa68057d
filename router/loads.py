"""Requests that wait on engines for their adapters, and room made for them there. PURE. It is rule 5 of the law in flows.py."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

from router.accounts import Where
from router.tickets import Flow, Ticket


@dataclass(slots=True, eq=False)
class Hold:
    """An adapter that gets no new sequences on an engine, for a request that waits there for its own.

    Attributes:
        flow: the one of its flows that had received most.
        lead: by how much the next to be served was ahead of it when it had no sequence left; None before.
    """

    ticket: Ticket
    engine_id: str
    flow: Flow
    lead: int | None = None


class Loads:
    """Knows which requests wait for their adapter, and holds one adapter at a time back for one of them.

    What changes where an adapter may be picked for returns the digests it changes that of.

    Args:
        window: Q of the law, in micro-tokens.
        is_loadable: whether an adapter's bytes are where a device can load them from at once.
    """

    def __init__(self, window: int, is_loadable: Callable[[str], bool]) -> None:
        self._window = window
        self._is_loadable = is_loadable
        # Requests that wait, with the engine they wait on.
        self._engine_ids: dict[Ticket, str] = {}
        self._hold: Hold | None = None
        # Those for which holding an adapter back did not help.
        self._hopeless: set[Ticket] = set()

    def servable(self, digest: str, where: Where) -> Where | bool:
        """Where an adapter that is on these engines may be picked for; False for nowhere at the moment."""
        if where is None:
            return None
        if self._hold and self._hold.flow.digest == digest:
            return where - {self._hold.engine_id} or False
        if not where and any(ticket.digest == digest for ticket in self._engine_ids):
            return False
        return where

    def begin(self, ticket: Ticket, engine_id: str) -> Collection[str]:
        """A request waits on an engine from now on."""
        self._engine_ids[ticket] = engine_id
        return [ticket.digest]

    def end(self, ticket: Ticket) -> Collection[str]:
        """It waits no more; of no effect when it did not."""
        if self._engine_ids.pop(ticket, None) is None:
            return []
        self._hopeless.discard(ticket)
        return [*self._release(ticket), ticket.digest]

    def at(self, digest: str, where: Where) -> list[Ticket]:
        """Those that wait for an adapter on these engines."""
        return [
            ticket
            for ticket, engine_id in self._engine_ids.items()
            if ticket.digest == digest and (where is None or engine_id in where)
        ]

    def make_room(self, picked: Flow, running: Collection[Ticket], where: Mapping[str, Where]) -> Collection[str]:
        """Holds an adapter back if a request has waited its bound for room on a device, or gives a hold up.

        Args:
            picked: the flow that is next.
            running: tickets that were picked and have not ended.
            where: engines that have each adapter.
        """
        if self._hold:
            return self._doubt(self._hold, picked, running)
        for ticket, engine_id in self._engine_ids.items():
            is_behind = _lead(picked, ticket.flow) > self._window
            if is_behind and ticket not in self._hopeless and self._is_loadable(ticket.digest):
                flows = [picked, *(other.flow for other in running)]
                in_use = [
                    flow for flow in flows if flow.digest != ticket.digest and engine_id in (where[flow.digest] or ())
                ]
                if not in_use:
                    return []
                largest = max(in_use, key=lambda flow: (flow.tenant.charge, flow.charge))
                self._hold = Hold(ticket, engine_id, largest)
                return [largest.digest]
        return []

    def _doubt(self, hold: Hold, picked: Flow, running: Collection[Ticket]) -> Collection[str]:
        """Gives a hold up that has not helped although the adapter could leave."""
        if any(other.digest == hold.flow.digest for other in running):
            return []
        lead = _lead(picked, hold.flow)
        if hold.lead is None:
            hold.lead = lead
        if lead <= hold.lead + self._window:
            return []
        self._hopeless.add(hold.ticket)
        return self._release(hold.ticket)

    def _release(self, ticket: Ticket) -> Collection[str]:
        """Lets an adapter go on that was held back for a request."""
        if self._hold is None or self._hold.ticket is not ticket:
            return []
        digest = self._hold.flow.digest
        self._hold = None
        return [digest]


def _lead(flow: Flow, other: Flow) -> int:
    """How much more one flow has received than another, where their paths part."""
    if flow.tenant is other.tenant:
        return flow.charge - other.charge
    return flow.tenant.charge - other.tenant.charge
