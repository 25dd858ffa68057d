"""All requests of a loop that have not ended. What happens to one changes its queue, its place and its charge together.

An engine that is lost, or ends, takes no request with it. Those without a token go back to the head of their flows, with
nothing charged. The others keep what they have been charged and go first, to engines that go on with their answers: they
had their turn, and their clients are reading.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator

from router import metrics
from router.accounts import Where
from router.flows import Flows, Ticket
from router.messages import Completion, Failed, Finished, Output, Started
from router.request import Request, State
from router.seats import Seating, Seats
from servicekit.errors import ServiceError

# The reason with which an engine that is about to end refuses what it is sent.
ENGINE_DRAINING = "ENGINE_DRAINING"


class OpenRequests:
    """See the module. Changed by the loop alone.

    Args:
        flows: empty.
        prefetch: called with digest, engine id, traceparent and tenant; asks for an adapter to be brought to an engine.
    """

    def __init__(self, flows: Flows, seating: Seating, prefetch: Callable[[str, str, str, str], None]) -> None:
        self._flows = flows
        self._seating = seating
        self._prefetch = prefetch
        self._queued: OrderedDict[int, Request] = OrderedDict()
        # Those whose engine was lost while it answered, the first dispatched first.
        self._moving: list[Request] = []
        # Those that have had tokens since they were charged last: charges matter when someone is picked or queued.
        self._owing: set[Request] = set()
        self._sequence_ids = itertools.count(1)

    def __iter__(self) -> Iterator[Request]:
        yield from self._queued.values()
        yield from self._moving
        for seats in self._seating:
            yield from seats.requests.values()

    @property
    def queue(self) -> Collection[Request]:
        """Those that wait, in the order of their arrival; those that were queued again come first."""
        return self._queued.values()

    @property
    def moving(self) -> list[Request]:
        """Those that are to be gone on with, in the order they should be."""
        return list(self._moving)

    def queued(self, ticket: Ticket) -> Request:
        """The one whose place in the queue this is."""
        return self._queued[ticket.number]

    def enqueue(self, request: Request) -> None:
        """Appends a request to its flow, and has its adapter brought up."""
        adapter = request.adapter
        where = self._seating.where(adapter.digest)
        request.become(State.QUEUED)
        request.ticket = self._flows.enqueue(
            request.tenant,
            adapter.digest,
            adapter.weight,
            where,
            request.estimated_prompt_tokens,
            request.most_output_tokens,
        )
        self._queued[request.ticket.number] = request
        request.begin_stage("queue")
        request.causes_load = self._seating.expect(adapter.digest) == 1 and where == frozenset()
        self._look_ahead(request, where)

    def take(self, ticket: Ticket) -> Request:
        """The request of a ticket that was picked: it waits no more."""
        return self._queued.pop(ticket.number)

    def send(self, request: Request, seats: Seats, where: Where, now: float) -> None:
        """Gives a place to a request that was taken, or was moving, and sends it there."""
        engine = seats.engine
        if request.state is State.MOVING:
            self._moving.remove(request)
        request.become(State.DISPATCHED)
        is_first = not request.engine
        if request.engine not in ("", engine.address):
            request.migrations += 1
            metrics.MIGRATIONS.inc()
        request.engine = engine.address
        if is_first or not request.has_answered:
            request.dispatched_at = now
        request.sequence_id = next(self._sequence_ids)
        self._charge(request)
        if seats.take(request, where, now) and request.ticket:
            self._flows.loading(request.ticket, seats.engine_id)
        request.begin_stage("dispatch")
        # Where nobody else is known, nobody else's steps are to be given up for it.
        urgent = self._flows.is_shared and request.ticket is not None and request.ticket.is_first
        engine.submit(request.sequence(urgent=urgent))

    def settle(self) -> None:
        """Brings all charges up to date."""
        for request in list(self._owing):
            self._charge(request)

    def hear(self, request: Request, output: Output, seats: Seats, now: float) -> None:
        """A step of its engine did something for a request."""
        if output.started:
            self._started(request, output.started, seats)
        if output.token_ids or output.text:
            request.add(output.token_ids, now)
            self._owing.add(request)
        piece = request.piece(output)
        if piece and (error := request.sink.put(piece)):
            self.cancel(request, error)
        elif output.end:
            self._ended(request, output.end, seats, now)

    def cancel(self, request: Request, error: ServiceError) -> None:
        """Ends a request, wherever it is; of no effect when it has ended."""
        if request.state is State.DISPATCHED:
            seats = self._seating.release(request)
            if seats:
                seats.engine.cancel(request.sequence_id)
        if request.state is not State.ENDED:
            self.end(request, error)

    def move(self, requests: Collection[Request]) -> None:
        """Takes back what an engine had, in the order of dispatch."""
        for request in requests:
            if request.has_answered:
                request.become(State.MOVING)
                self._moving.append(request)
                if request.ticket:
                    self._flows.loaded(request.ticket)
        # Each goes to the head of its flow, so the one dispatched first goes last.
        for request in reversed(list(requests)):
            if not request.has_answered:
                self._queue_again(request)

    def end(self, request: Request, end: Completion | ServiceError) -> None:
        """Ends a request that has no place on an engine."""
        if request.state is State.MOVING:
            self._moving.remove(request)
        if request in self._owing:
            self._charge(request)
        request.become(State.ENDED)
        if request.ticket:
            self._queued.pop(request.ticket.number, None)
            self._flows.end(request.ticket)
            self._seating.expect_no_more(request.adapter.digest)
        request.end_stage(end if isinstance(end, ServiceError) else None)
        request.sink.close(end)

    def forgive(self, request: Request) -> None:
        """Charges nothing for what was done for a request."""
        self._owing.discard(request)
        if request.ticket:
            self._flows.charge(request.ticket, 0, 0)

    def _charge(self, request: Request) -> None:
        self._owing.discard(request)
        if request.ticket:
            self._flows.charge(request.ticket, *request.work)

    def _started(self, request: Request, started: Started, seats: Seats) -> None:
        seats.begin(request)
        request.begin(started)
        if request.ticket:
            self._flows.loaded(request.ticket)
        self._owing.add(request)

    def _ended(self, request: Request, end: Finished | Failed, seats: Seats, now: float) -> None:
        seats.leave(request)
        if isinstance(end, Failed) and end.reason == ENGINE_DRAINING:
            # It was on its way when the engine said that it is about to end.
            self.move([request])
            return
        if isinstance(end, Finished):
            request.output_tokens = end.output_tokens
        if isinstance(end, Failed) and request.started is None:
            # Refused before any work was done on it.
            self.forgive(request)
        else:
            self._charge(request)
        self.end(request, request.outcome(end, seats.engine_id, now))

    def _queue_again(self, request: Request) -> None:
        if request.ticket is None:
            return
        request.become(State.QUEUED)
        request.started = None
        request.prompt_logprobs = 0
        self._owing.discard(request)
        self._flows.requeue(request.ticket)
        self._queued[request.ticket.number] = request
        self._queued.move_to_end(request.ticket.number, last=False)
        request.begin_stage("queue")
        self._look_ahead(request, self._seating.where(request.adapter.digest))

    def _look_ahead(self, request: Request, where: Where) -> None:
        """Has the adapter brought to the next engine it should be on: the queue is the cache's look-ahead."""
        digest = request.adapter.digest
        if where is None:
            return
        home = self._seating.next_home(digest, where)
        if home is not None or not self._seating:
            self._prefetch(digest, home.engine_id if home else "", request.traceparent, request.tenant)
