"""The router's one loop: pick -> place -> send -> charge.

It alone changes queues, charges, places and requests. Everyone else posts messages to it: handlers submit and cancel,
the fleet tells of engines and their frames, the cache link of adapters that moved. There is one for every base: engines
with different bases have nothing to share out.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Collection
from typing import Any

from router import metrics
from router.accounts import Where
from router.admission import Limits, Reject
from router.cache_link import Moved
from router.errors import AnswerLost, Draining, EngineLost, NoEngine, QueueFull
from router.fleet import EngineDown, EngineUp, Frame
from router.flows import Flows, Ticket
from router.gate import Gate
from router.inbox import Cancel, GraceOver, LoopMessage, Stop, Submit
from router.ledger import Begun, Elsewhere
from router.messages import Finished
from router.open_requests import OpenRequests
from router.request import Request
from router.seats import Seating

# How long requests wait for an engine to come back when none is connected.
GRACE = 2.0


class Dispatcher:
    """The loop.

    Args:
        flows: empty.
        where: tells which engines have a digest.
        prefetch: called with digest, engine id, traceparent and tenant; asks for an adapter to be brought to an engine.
    """

    def __init__(
        self,
        flows: Flows,
        limits: Limits,
        where: Callable[[str], Where],
        prefetch: Callable[[str, str, str, str], None],
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._flows = flows
        self._now = now
        self.gate = Gate(limits, flows)
        self._seating = Seating(where)
        self._requests = OpenRequests(flows, self._seating, prefetch)
        # None while an engine is connected, or was until GRACE seconds ago.
        self._grace: asyncio.TimerHandle | None = None
        self._refusing = True
        self._losses = 0
        self._inbox: deque[LoopMessage] = deque()
        self._posted = asyncio.Event()
        self._handlers: dict[type, Callable[[Any], None]] = {
            Submit: self._submit,
            Cancel: self._cancel,
            Frame: self._frame,
            EngineUp: self._engine_up,
            EngineDown: self._engine_down,
            GraceOver: self._grace_over,
            Moved: self._moved,
            Stop: self._stop,
            Elsewhere: self._elsewhere,
            Begun: self._begun,
        }

    @property
    def queued(self) -> int:
        """Requests that wait."""
        return self._flows.queued

    @property
    def queue(self) -> Collection[Request]:
        """The requests that wait, in order."""
        return self._requests.queue

    @property
    def running(self) -> int:
        """Requests that are on an engine."""
        return sum(len(seats.requests) for seats in self._seating)

    def post(self, message: LoopMessage) -> None:
        """Hands the loop a message. To be called on its event loop's thread."""
        self._inbox.append(message)
        self._posted.set()

    async def run(self) -> None:
        while True:
            await self._posted.wait()
            self._posted.clear()
            self.turn()

    def turn(self) -> None:
        """Takes in all that was posted, then gives free places to those who are next. Waits for nothing."""
        while self._inbox:
            message = self._inbox.popleft()
            self._handlers[type(message)](message)
        self._fill()

    def _fill(self) -> None:
        """Gives free places to those who are next."""
        if self._seating.has_room:
            now = self._now()
            self._continue(now)
            if self._flows.queued:
                self._requests.settle()
                self._pick(now)

    def _continue(self, now: float) -> None:
        """Sends those on whose engine was lost."""
        for request in self._requests.moving:
            where = self._seating.where(request.adapter.digest)
            # Others may wait for the same adapter there: this one has had its turn.
            chosen = self._seating.choose(request.adapter.digest, where, now) or self._seating.any_with_room()
            if chosen is None:
                return
            self._requests.send(request, chosen, where, now)

    def _pick(self, now: float) -> None:
        def can_go(where: Where) -> bool:
            return self._seating.is_open(where, now)

        def is_warm(where: Where) -> bool:
            return where != frozenset() and can_go(where)

        self._seating.keep(for_newcomers=self._flows.is_shared)
        while ticket := self._flows.pick(can_go, is_warm):
            self._place(ticket, now)
        self._seating.keep(for_newcomers=False)
        while self._flows.is_shared and (ticket := self._flows.pick_newcomer(can_go, is_warm)):
            self._place(ticket, now)

    def _place(self, ticket: Ticket, now: float) -> None:
        """Sends a request that was picked to an engine."""
        request = self._requests.take(ticket)
        chosen = self._seating.choose(ticket.digest, ticket.where, now)
        if chosen is None:
            raise RuntimeError("a flow was picked that no engine can take")
        if refusal := self.gate.turn(request, ticket, now):
            # Nothing was done for it yet.
            self._requests.forgive(request)
            self._refuse(request, refusal)
            return
        self._requests.send(request, chosen, ticket.where, now)

    def _submit(self, message: Submit) -> None:
        request = message.request
        if self._refusing:
            self._requests.end(request, NoEngine())
            return
        self._requests.settle()
        decision = self.gate.decide(request, self._now())
        if isinstance(decision, Reject):
            self._refuse(request, decision)
            return
        if decision.instead_of and decision.refusal:
            self._refuse(self._requests.queued(decision.instead_of), decision.refusal)
        self._requests.enqueue(request)

    def _refuse(self, request: Request, why: Reject) -> None:
        self._requests.end(request, QueueFull(why.message, why.reason, why.limit, why.retry_after))

    def _cancel(self, message: Cancel) -> None:
        self._requests.cancel(message.request, message.error)

    def _frame(self, message: Frame) -> None:
        seats = self._seating.of(message.engine)
        if seats is None:
            return
        begins_to_drain = seats.is_draining != message.credit.is_draining
        seats.credit(message.credit)
        if begins_to_drain:
            self._relocate()
        now = self._now()
        tokens = 0
        for output in message.outputs:
            # Outputs of a sequence that was cancelled may still be on their way.
            request = seats.requests.get(output.sequence_id)
            if request:
                tokens += len(output.token_ids)
                self._requests.hear(request, output, seats, now)
                if isinstance(output.end, Finished):
                    self.gate.answered(request, now)
        metrics.OUTPUT_TOKENS.inc(tokens)

    def _engine_up(self, message: EngineUp) -> None:
        self._seating.add(message.engine)
        self._refusing = False
        if self._grace:
            self._grace.cancel()
            self._grace = None
        self._relocate()

    def _engine_down(self, message: EngineDown) -> None:
        seats = self._seating.remove(message.engine)
        self._relocate()
        self._requests.move(seats.requests.values())
        if not self._seating:
            self._losses += 1
            message_later = GraceOver(self._losses)
            self._grace = asyncio.get_running_loop().call_later(GRACE, self.post, message_later)

    def _grace_over(self, message: GraceOver) -> None:
        if self._seating or message.loss != self._losses:
            return
        self._refusing = True
        for request in list(self._requests.queue):
            self._requests.end(request, NoEngine())
        for request in self._requests.moving:
            self._requests.forgive(request)
            self._requests.end(request, EngineLost(request.engine, request.output_tokens))

    def _relocate(self) -> None:
        """Tells the flows where adapters are, now that engines have come, gone, or are about to."""
        for digest in self._flows.digests():
            self._flows.moved(digest, self._seating.where(digest))

    def _moved(self, message: Moved) -> None:
        for digest in message.digests:
            where = self._seating.where(digest)
            self._flows.moved(digest, where)
            for seats in self._seating:
                if seats.has(where):
                    seats.loading.pop(digest, None)

    def _elsewhere(self, message: Elsewhere) -> None:
        self._flows.served_elsewhere(message.served)

    def _begun(self, message: Begun) -> None:
        self._flows.begin(message.leads)

    def _stop(self, _: Stop) -> None:
        for request in list(self._requests):
            answered = request.has_answered
            error = AnswerLost("this router stopped while it was answered", "DRAINING") if answered else Draining()
            self._requests.cancel(request, error)
