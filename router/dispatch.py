"""The router's one loop: pick -> place -> send -> charge.

It alone changes queues, charges, places and requests. Everyone else posts messages to it: handlers submit and cancel,
the fleet tells of engines and their frames, the cache link of adapters that moved.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from router import metrics
from router.accounts import Question, Where
from router.admission import Limits, Reject, ServiceRate, admit
from router.cache_link import Moved
from router.errors import AnswerLost, Draining, EngineBrokeContract, NoEngine, QueueFull
from router.fleet import Engine, EngineDown, EngineUp, Frame
from router.flows import Flows, Tariff
from router.messages import Completion, Failed, Finished, Output, Sequence
from router.placement import Places, choose
from router.request import Request, State
from servicekit.errors import Code, RemoteError, ServiceError
from servicekit.tracing import context_of, end_span, start_span, traceparent_of

# How long requests wait for an engine to come back when none is connected.
GRACE = 2.0


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


Message = Submit | Cancel | GraceOver | Stop | EngineUp | EngineDown | Frame | Moved


@dataclass(slots=True, eq=False)
class _Seats(Places):
    """An engine's places and who sits there, by number of the sequence."""

    engine: Engine = field(kw_only=True)
    requests: dict[int, Request] = field(default_factory=dict)


class Dispatcher:
    """The loop. `where` tells which engines have a digest; `prefetch(digest, engine_id, traceparent)` asks for one."""

    def __init__(
        self,
        tariff: Tariff,
        limits: Limits,
        where: Callable[[str], Where],
        prefetch: Callable[[str, str, str], None],
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._flows = Flows(tariff)
        self._limits = limits
        self._where = where
        self._prefetch = prefetch
        self._now = now
        self._rate = ServiceRate()
        self._seats: dict[Engine, _Seats] = {}
        self._queued: dict[int, Request] = {}
        self._sequence_ids = itertools.count(1)
        # None while an engine is connected, or was until GRACE seconds ago.
        self._grace: asyncio.TimerHandle | None = None
        self._refusing = True
        self._losses = 0
        self._inbox: deque[Message] = deque()
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
        }

    @property
    def queued(self) -> int:
        """Requests that wait."""
        return self._flows.queued

    def post(self, message: Message) -> None:
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

    def _fill(self) -> None:
        """Gives free places to those who are next."""
        seats = self._seats.values()
        while ticket := self._flows.pick(*self._questions(keep=self._flows.is_shared)) or (
            self._flows.pick_newcomer(*self._questions(keep=False)) if self._flows.is_shared else None
        ):
            request = self._queued.pop(ticket.number)
            chosen = choose(ticket.where, seats)
            if chosen is None:
                raise RuntimeError("a flow was picked that no engine can take")
            self._send(request, chosen)
        metrics.QUEUED.set(self._flows.queued)
        metrics.RUNNING.set(sum(engine.taken for engine in seats))

    def _questions(self, keep: bool) -> tuple[Question, Question]:
        """Whether a request for an adapter could be dispatched, and to an engine that has it."""
        seats = self._seats.values()

        def is_open(where: Where) -> bool:
            return any(engine.can_take(where, engine.kept if keep else 0) for engine in seats)

        def is_warm(where: Where) -> bool:
            return any(engine.has(where) and engine.can_take(where, engine.kept if keep else 0) for engine in seats)

        return is_open, is_warm

    def _send(self, request: Request, seats: _Seats) -> None:
        now = self._now()
        engine = seats.engine
        request.become(State.DISPATCHED)
        if request.engine not in ("", engine.address):
            request.migrations += 1
            metrics.MIGRATIONS.inc()
        request.engine = engine.address
        request.dispatched_at = now
        request.sequence_id = next(self._sequence_ids)
        self._rate.note(now)
        self._charge(request)
        seats.requests[request.sequence_id] = request
        seats.taken += 1
        if not seats.has(self._where(request.adapter.digest)):
            seats.loading.add(request.sequence_id)
            if request.ticket:
                self._flows.loading(request.ticket, engine.engine_id)
        self._next_stage(request, "dispatch")
        engine.submit(
            Sequence(
                sequence_id=request.sequence_id,
                request=request.wire,
                adapter_digest=request.adapter.digest,
                chat_template=request.adapter.chat_template,
                traceparent=traceparent_of(request.stage_span) if request.stage_span else "",
            )
        )

    def _charge(self, request: Request) -> None:
        if request.ticket:
            self._flows.charge(request.ticket, *request.charged_tokens)

    def _submit(self, message: Submit) -> None:
        request = message.request
        if self._refusing:
            self._end(request, NoEngine())
            return
        now = self._now()
        decision = admit(
            self._limits, self._flows.queued, self._flows.queued_by(request.tenant), self._rate.per_second(now)
        )
        if isinstance(decision, Reject):
            text = f"{decision.limit} requests are waiting already"
            self._end(request, QueueFull(text, decision.reason, decision.limit, decision.retry_after))
            return
        adapter = request.adapter
        where = self._where(adapter.digest)
        request.become(State.QUEUED)
        request.ticket = self._flows.enqueue(request.tenant, adapter.digest, adapter.weight, where)
        self._queued[request.ticket.number] = request
        self._next_stage(request, "queue")
        if not any(seats.has(where) for seats in self._seats.values()):
            # The queue is the cache's look-ahead.
            likely = min(self._seats.values(), key=lambda seats: seats.taken, default=None)
            traceparent = traceparent_of(request.stage_span) if request.stage_span else ""
            self._prefetch(adapter.digest, likely.engine_id if likely else "", traceparent)

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
        for output in message.outputs:
            # Outputs of a sequence that was cancelled may still be on their way.
            request = seats.requests.get(output.sequence_id)
            if request:
                self._output(request, output, seats)

    def _output(self, request: Request, output: Output, seats: _Seats) -> None:
        if output.started:
            request.started = output.started
            seats.loading.discard(request.sequence_id)
            if request.ticket:
                self._flows.loaded(request.ticket)
        if output.text or output.token_ids:
            if request.first_token_at is None:
                request.first_token_at = self._now()
            request.output_tokens += len(output.token_ids)
            metrics.OUTPUT_TOKENS.inc(len(output.token_ids))
        delta = request.delta(output)
        if delta:
            request.sink.put(delta)
        if isinstance(output.end, Finished):
            request.output_tokens = output.end.output_tokens
        if output.started or output.token_ids or output.end:
            self._charge(request)
        if output.end:
            self._release(request)
            self._end(request, self._outcome(request, output.end, seats.engine_id))

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
        self._seats[engine] = _Seats(engine.engine_id, engine.max_sequences, engine=engine)
        self._refusing = False
        if self._grace:
            self._grace.cancel()
            self._grace = None
        metrics.ENGINES.set(len(self._seats))

    def _engine_down(self, message: EngineDown) -> None:
        seats = self._seats.pop(message.engine)
        metrics.ENGINES.set(len(self._seats))
        # Each goes to the head of its flow, so the one dispatched first goes last.
        for request in reversed(seats.requests.values()):
            if request.has_answered:
                text = f"engine {seats.engine_id} was lost while it answered"
                self._end(request, AnswerLost(text, "ENGINE_LOST", engine_id=seats.engine_id))
            else:
                self._queue_again(request)
        if not self._seats:
            self._losses += 1
            message_later = GraceOver(self._losses)
            self._grace = asyncio.get_running_loop().call_later(GRACE, self.post, message_later)

    def _queue_again(self, request: Request) -> None:
        if request.ticket is None:
            return
        request.become(State.QUEUED)
        request.started = None
        request.prompt_logprobs = 0
        self._flows.requeue(request.ticket)
        self._queued[request.ticket.number] = request
        self._next_stage(request, "queue")

    def _grace_over(self, message: GraceOver) -> None:
        if self._seats or message.loss != self._losses:
            return
        self._refusing = True
        for request in list(self._queued.values()):
            self._end(request, NoEngine())

    def _moved(self, message: Moved) -> None:
        for digest in message.digests:
            where = self._where(digest)
            self._flows.moved(digest, where)
            for seats in self._seats.values():
                if seats.has(where):
                    seats.loading -= {n for n in seats.loading if seats.requests[n].adapter.digest == digest}

    def _stop(self, _: Stop) -> None:
        for request in [
            *self._queued.values(),
            *(r for seats in self._seats.values() for r in seats.requests.values()),
        ]:
            answered = request.has_answered
            error = AnswerLost("this router stopped while it was answered", "DRAINING") if answered else Draining()
            self._cancel(Cancel(request, error))

    def _release(self, request: Request) -> _Seats | None:
        """Frees the place of a dispatched request; returns the engine it was on."""
        for seats in self._seats.values():
            if seats.requests.pop(request.sequence_id, None):
                seats.taken -= 1
                seats.loading.discard(request.sequence_id)
                return seats
        return None

    def _end(self, request: Request, end: Completion | ServiceError) -> None:
        request.become(State.ENDED)
        if request.ticket:
            self._queued.pop(request.ticket.number, None)
            self._flows.end(request.ticket)
        if request.stage_span:
            end_span(request.stage_span, end if isinstance(end, ServiceError) else None)
        request.sink.close(end)

    def _next_stage(self, request: Request, name: str) -> None:
        if request.stage_span:
            end_span(request.stage_span)
        request.stage_span = start_span(name, parent=context_of(request.span))
