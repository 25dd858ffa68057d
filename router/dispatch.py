"""The router's one loop: pick -> place -> send -> charge.

It alone changes queues, charges, places and requests. Everyone else posts messages to it: handlers submit and cancel,
the fleet tells of engines and their frames, the cache link of adapters that moved. There is one for every base: engines
with different bases have nothing to share out.

An engine that is lost, or ends, takes no request with it. Those without a token go back to the head of their flows, with
nothing charged. The others keep what they have been charged and go first, to engines that go on with their answers: they
had their turn, and their clients are reading.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import Any

from router import metrics
from router.accounts import Where
from router.admission import Limits, Newcomer, Reject, ServiceRate, admit
from router.cache_link import Moved
from router.errors import AnswerLost, Draining, EngineBrokeContract, EngineLost, NoEngine, QueueFull
from router.fleet import Engine, EngineDown, EngineUp, Frame
from router.flows import Flows, Ticket
from router.ledger import Begun, Elsewhere
from router.messages import Completion, Failed, Finished, Output, Started
from router.placement import Demand, choose, is_open, next_home
from router.request import Request, State
from router.seats import Seats
from servicekit.errors import Code, RemoteError, ServiceError
from servicekit.tracing import context_of, end_span, start_span, traceparent_of

# How long requests wait for an engine to come back when none is connected.
GRACE = 2.0
# The reason with which an engine that is about to end refuses what it is sent.
ENGINE_DRAINING = "ENGINE_DRAINING"


@dataclass(frozen=True, slots=True)
class Submit:
    """A request has arrived."""

    request: Request


@dataclass(frozen=True, slots=True)
class Cancel:
    """A request's client is gone; of no effect when the request has ended."""

    request: Request
    error: ServiceError


@dataclass(frozen=True, slots=True)
class GraceOver:
    """Time is up for the engines that were lost as number `loss`."""

    loss: int


@dataclass(frozen=True, slots=True)
class Stop:
    """All requests end now."""


Message = Submit | Cancel | Stop | EngineUp | EngineDown | Frame | Moved


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
        self._limits = limits
        self._view = where
        self._prefetch = prefetch
        self._now = now
        self._rate = ServiceRate()
        self._seats: dict[Engine, Seats] = {}
        self._queued: dict[int, Request] = {}
        # Requests whose engine was lost while it answered, the first dispatched first.
        self._moving: list[Request] = []
        # Requests that have had tokens since they were charged last: charges matter when someone is picked or queued.
        self._owing: set[Request] = set()
        self._demand = Demand()
        self._sequence_ids = itertools.count(1)
        # None while an engine is connected, or was until GRACE seconds ago.
        self._grace: asyncio.TimerHandle | None = None
        self._refusing = True
        self._losses = 0
        self._inbox: deque[Message | GraceOver | Elsewhere | Begun] = deque()
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
    def waiting(self) -> Collection[Request]:
        """The requests that wait."""
        return self._queued.values()

    @property
    def running(self) -> int:
        """Requests that are on an engine."""
        return sum(len(seats.requests) for seats in self._seats.values())

    def post(self, message: Message | GraceOver | Elsewhere | Begun) -> None:
        """Hands the loop a message. To be called on its event loop's thread."""
        self._inbox.append(message)
        self._posted.set()

    async def run(self) -> None:
        while True:
            await self._posted.wait()
            self._posted.clear()
            while self._inbox:
                message = self._inbox.popleft()
                self._handlers[type(message)](message)
            self._fill()

    def _where(self, digest: str) -> Where:
        """Engines of this loop that have an adapter and take new sequences; None, which is all of them, for the base."""
        where = self._view(digest)
        return where and where & {seats.engine_id for seats in self._seats.values() if not seats.is_draining}

    def _fill(self) -> None:
        """Gives free places to those who are next."""
        seats = list(self._seats.values())
        now = self._now()
        if any(engine.has_room for engine in seats):
            self._continue(seats, now)
            if self._flows.queued:
                self._settle()
                self._pick(seats, now)

    def _continue(self, seats: list[Seats], now: float) -> None:
        """Sends those on whose engine was lost."""
        for request in list(self._moving):
            digest = request.adapter.digest
            where = self._where(digest)
            # Others may wait for the same adapter there: this one has had its turn.
            chosen = choose(digest, where, seats, now, self._demand.homes(digest)) or min(
                (engine for engine in seats if engine.has_room), key=lambda engine: engine.load, default=None
            )
            if chosen is None:
                return
            self._moving.remove(request)
            self._send(request, chosen, where)

    def _pick(self, seats: list[Seats], now: float) -> None:
        def can_go(where: Where) -> bool:
            return is_open(where, seats, now)

        def is_warm(where: Where) -> bool:
            return where != frozenset() and can_go(where)

        for engine in seats:
            engine.keep(for_newcomers=self._flows.is_shared)
        while ticket := self._flows.pick(can_go, is_warm):
            self._place(ticket, seats, now)
        for engine in seats:
            engine.keep(for_newcomers=False)
        while self._flows.is_shared and (ticket := self._flows.pick_newcomer(can_go, is_warm)):
            self._place(ticket, seats, now)

    def _place(self, ticket: Ticket, seats: list[Seats], now: float) -> None:
        """Sends a request that was picked to an engine."""
        request = self._queued.pop(ticket.number)
        where = ticket.where
        chosen = choose(ticket.digest, where, seats, now, self._demand.homes(ticket.digest))
        if chosen is None:
            raise RuntimeError("a flow was picked that no engine can take")
        self._rate.note(now, ticket.waiting_tokens, is_busy=self._flows.queued > 0)
        self._send(request, chosen, where)

    def _send(self, request: Request, seats: Seats, where: Where) -> None:
        now = self._now()
        engine = seats.engine
        is_first = not request.engine
        request.become(State.DISPATCHED)
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
        self._next_stage(request, "dispatch")
        traceparent = traceparent_of(request.stage_span) if request.stage_span else ""
        # Where nobody else is known, nobody else's steps are to be given up for it.
        urgent = self._flows.is_shared and request.ticket is not None and request.ticket.is_first
        engine.submit(request.sequence(request.sequence_id, traceparent, urgent=urgent))

    def _charge(self, request: Request) -> None:
        self._owing.discard(request)
        if request.ticket:
            self._flows.charge(request.ticket, *request.work)

    def _settle(self) -> None:
        """Brings all charges up to date."""
        for request in list(self._owing):
            self._charge(request)

    def _submit(self, message: Submit) -> None:
        request = message.request
        if self._refusing:
            self._end(request, NoEngine())
            return
        self._settle()
        adapter = request.adapter
        now = self._now()
        left = None if request.deadline is None else request.deadline - now
        newcomer = Newcomer(request.tenant, adapter.digest, request.estimated_prompt_tokens, left)
        decision = admit(self._limits, self._flows, newcomer, self._rate.per_second(now))
        if isinstance(decision, Reject):
            self._refuse(request, decision)
            return
        if decision.instead_of and decision.refusal:
            self._refuse(self._queued[decision.instead_of.number], decision.refusal)
        where = self._where(adapter.digest)
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
        self._next_stage(request, "queue")
        self._demand.add(adapter.digest, self._seats.values())
        request.causes_load = where == frozenset() and self._demand.count(adapter.digest) == 1
        self._look_ahead(request, where)

    def _refuse(self, request: Request, why: Reject) -> None:
        self._end(request, QueueFull(why.message, why.reason, why.limit, why.retry_after))

    def _look_ahead(self, request: Request, where: Where) -> None:
        """Has the adapter brought to the next engine it should be on: the queue is the cache's look-ahead."""
        digest = request.adapter.digest
        if where is None:
            return
        home = next_home(digest, where, list(self._seats.values()), self._demand.homes(digest))
        if home is not None or not self._seats:
            traceparent = traceparent_of(request.stage_span) if request.stage_span else ""
            self._prefetch(digest, home.engine_id if home else "", traceparent, request.tenant)

    def _cancel(self, message: Cancel) -> None:
        request = message.request
        if request.state is State.DISPATCHED:
            seats = self._release(request)
            if seats:
                seats.engine.cancel(request.sequence_id)
        if request.state is not State.ENDED:
            self._end(request, message.error)

    def _frame(self, message: Frame) -> None:
        seats = self._seats.get(message.engine)
        if seats is None:
            return
        if seats.is_draining != message.credit.is_draining:
            seats.credit(message.credit)
            self._relocate()
        seats.credit(message.credit)
        tokens = 0
        for output in message.outputs:
            # Outputs of a sequence that was cancelled may still be on their way.
            request = seats.requests.get(output.sequence_id)
            if request:
                tokens += len(output.token_ids)
                self._output(request, output, seats)
        metrics.OUTPUT_TOKENS.inc(tokens)

    def _output(self, request: Request, output: Output, seats: Seats) -> None:
        if output.started:
            self._started(request, output.started, seats)
        if output.token_ids or output.text:
            request.add(output.token_ids, self._now())
            self._owing.add(request)
        piece = request.piece(output)
        if piece and (error := request.sink.put(piece)):
            self._cancel(Cancel(request, error))
        elif output.end:
            self._ended(request, output.end, seats)

    def _started(self, request: Request, started: Started, seats: Seats) -> None:
        seats.begin(request)
        request.begin(started)
        if request.ticket:
            self._flows.loaded(request.ticket)
        self._owing.add(request)

    def _ended(self, request: Request, end: Finished | Failed, seats: Seats) -> None:
        self._release(request)
        if isinstance(end, Failed) and end.reason == ENGINE_DRAINING:
            # It was on its way when the engine said that it is about to end.
            self._move([request])
            return
        if isinstance(end, Finished):
            request.output_tokens = end.output_tokens
        self._charge(request)
        self._end(request, self._outcome(request, end, seats.engine_id))

    def _outcome(self, request: Request, end: Finished | Failed, engine_id: str) -> Completion | ServiceError:
        if isinstance(end, Finished):
            if request.started is None:
                return EngineBrokeContract(engine_id, "finished a sequence that it had not started")
            return request.completion(end, request.started, engine_id, self._now())
        if request.started is None and request.ticket:
            # Refused before any work was done on it.
            self._flows.charge(request.ticket, 0, 0)
        if end.code not in Code.__members__.values():
            return EngineBrokeContract(engine_id, f"ended a sequence with status code {end.code}")
        if end.code == Code.UNAVAILABLE and request.has_answered:
            return AnswerLost(f"{end.message} (while it answered)", end.reason, engine_id=engine_id)
        return RemoteError(end.code, end.message, end.reason, end.metadata)

    def _engine_up(self, message: EngineUp) -> None:
        engine = message.engine
        self._seats[engine] = Seats(engine.engine_id, engine.max_sequences, engine=engine)
        self._refusing = False
        if self._grace:
            self._grace.cancel()
            self._grace = None
        self._relocate()

    def _engine_down(self, message: EngineDown) -> None:
        seats = self._seats.pop(message.engine)
        self._relocate()
        self._move(list(seats.requests.values()))
        if not self._seats:
            self._losses += 1
            message_later = GraceOver(self._losses)
            self._grace = asyncio.get_running_loop().call_later(GRACE, self.post, message_later)

    def _relocate(self) -> None:
        """Tells the flows where adapters are, now that engines have come, gone, or are about to."""
        for digest in self._flows.digests():
            self._flows.moved(digest, self._where(digest))

    def _move(self, requests: list[Request]) -> None:
        """Takes back what an engine had, in the order of dispatch."""
        for request in requests:
            if request.has_answered:
                request.become(State.MOVING)
                self._moving.append(request)
                if request.ticket:
                    self._flows.loaded(request.ticket)
        # Each goes to the head of its flow, so the one dispatched first goes last.
        for request in reversed(requests):
            if not request.has_answered:
                self._queue_again(request)

    def _queue_again(self, request: Request) -> None:
        if request.ticket is None:
            return
        request.become(State.QUEUED)
        request.started = None
        request.prompt_logprobs = 0
        self._owing.discard(request)
        self._flows.requeue(request.ticket)
        self._queued[request.ticket.number] = request
        self._next_stage(request, "queue")
        self._look_ahead(request, self._where(request.adapter.digest))

    def _grace_over(self, message: GraceOver) -> None:
        if self._seats or message.loss != self._losses:
            return
        self._refusing = True
        for request in list(self._queued.values()):
            self._end(request, NoEngine())
        for request in list(self._moving):
            self._owing.discard(request)
            if request.ticket:
                self._flows.charge(request.ticket, 0, 0)
            self._end(request, EngineLost(request.engine, request.output_tokens))

    def _moved(self, message: Moved) -> None:
        for digest in message.digests:
            where = self._where(digest)
            self._flows.moved(digest, where)
            for seats in self._seats.values():
                if seats.has(where):
                    seats.loading.pop(digest, None)

    def _elsewhere(self, message: Elsewhere) -> None:
        self._flows.served_elsewhere(message.served)

    def _begun(self, message: Begun) -> None:
        self._flows.begin(message.leads)

    def _stop(self, _: Stop) -> None:
        for request in list(self._open()):
            answered = request.has_answered
            error = AnswerLost("this router stopped while it was answered", "DRAINING") if answered else Draining()
            self._cancel(Cancel(request, error))

    def _open(self) -> Iterable[Request]:
        """All requests that have not ended."""
        yield from self._queued.values()
        yield from self._moving
        for seats in self._seats.values():
            yield from seats.requests.values()

    def _release(self, request: Request) -> Seats | None:
        """Frees the place of a dispatched request; returns the engine it was on."""
        for seats in self._seats.values():
            if request.sequence_id in seats.requests:
                seats.leave(request)
                return seats
        return None

    def _end(self, request: Request, end: Completion | ServiceError) -> None:
        if request.state is State.MOVING:
            self._moving.remove(request)
        if request in self._owing:
            self._charge(request)
        request.become(State.ENDED)
        if request.ticket:
            self._queued.pop(request.ticket.number, None)
            self._flows.end(request.ticket)
            self._demand.remove(request.adapter.digest, self._seats.values())
        if request.stage_span:
            end_span(request.stage_span, end if isinstance(end, ServiceError) else None)
        request.sink.close(end)

    def _next_stage(self, request: Request, name: str) -> None:
        if request.stage_span:
            end_span(request.stage_span)
        request.stage_span = start_span(name, parent=context_of(request.span))
