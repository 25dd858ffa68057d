"""One request on its way through the router, and what it says of itself at the end."""

from __future__ import annotations

from array import array
from collections.abc import Sequence as Row
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Protocol

from opentelemetry.trace import Span

from router.errors import AnswerLost, EngineBrokeContract, IllegalTransition
from router.flows import MICRO, Ticket
from router.messages import Completion, Delta, Failed, Finished, Output, Piece, Receipt, Sequence, Started
from router.registry_view import Adapter
from servicekit.errors import Code, RemoteError, ServiceError
from servicekit.tracing import context_of, end_span, start_span, traceparent_of


class State(Enum):
    """Where a request is."""

    NEW = "new"
    QUEUED = "queued"
    DISPATCHED = "dispatched"
    MOVING = "moving"
    ENDED = "ended"


_NO_TOKENS = array("i")

# When its engine is lost, a dispatched request is queued again before its first token, and moves after it.
_NEXT = {
    State.NEW: {State.QUEUED, State.ENDED},
    State.QUEUED: {State.DISPATCHED, State.ENDED},
    State.DISPATCHED: {State.QUEUED, State.MOVING, State.ENDED},
    State.MOVING: {State.DISPATCHED, State.ENDED},
    State.ENDED: set[State](),
}


class Sink(Protocol):
    """Where an answer goes. `put` may return an error, with which the request should end."""

    def put(self, piece: Piece) -> ServiceError | None: ...

    def close(self, end: Completion | ServiceError) -> None: ...


@dataclass(slots=True, eq=False)
class Request:
    """A request and all that happens to it; after it was submitted, only the loop changes it. Times in seconds."""

    request_id: str
    tenant: str
    adapter: Adapter
    estimated_prompt_tokens: int
    wire: bytes
    sink: Sink
    span: Span
    arrived_at: float
    # Of its answer, None when that is open; and when its client will have gone, None when it waits for ever.
    most_output_tokens: int | None = None
    deadline: float | None = None

    state: State = field(default=State.NEW, init=False)
    ticket: Ticket | None = field(default=None, init=False)
    sequence_id: int = field(default=0, init=False)
    # Digest of the base it is answered by, and address of the engine it is on.
    base: str = field(default="", init=False)
    engine: str = field(default="", init=False)
    dispatched_at: float = field(default=0.0, init=False)
    first_token_at: float | None = field(default=None, init=False)
    started: Started | None = field(default=None, init=False)
    # All tokens of the answer, for an engine that is to go on with it; one array for all that have none yet.
    answered: array[int] = field(default_factory=lambda: _NO_TOKENS, init=False)
    # Those, and the end-of-sequence token where there is one.
    output_tokens: int = field(default=0, init=False)
    # Of the prompt, by the engine it is on now; and those that went to the client, whichever engine they came from.
    prompt_logprobs: int = field(default=0, init=False)
    prompt_logprobs_told: int = field(default=0, init=False)
    # Its adapter is brought to a device for its sake.
    causes_load: bool = field(default=False, init=False)
    migrations: int = field(default=0, init=False)
    stage_span: Span | None = field(default=None, init=False)

    def become(self, state: State) -> None:
        if state not in _NEXT[self.state]:
            raise IllegalTransition(self.state.value, state.value)
        self.state = state

    @property
    def has_answered(self) -> bool:
        return self.first_token_at is not None

    def begin(self, started: Started) -> None:
        """Notes what an engine says at first. One that goes on with an answer says nothing new but how long it waited."""
        if self.started is not None:
            started = replace(self.started, adapter_wait=self.started.adapter_wait + started.adapter_wait)
        self.started = started

    def add(self, token_ids: Row[int], now: float) -> None:
        """Notes tokens of the answer, or text where that comes without any."""
        if self.first_token_at is None:
            self.first_token_at = now
            self.answered = array("i")
        self.answered.extend(token_ids)
        self.output_tokens += len(token_ids)

    def begin_stage(self, name: str) -> None:
        """Begins a stage of its way, as a span; the one before it is over."""
        self.end_stage()
        self.stage_span = start_span(name, parent=context_of(self.span))

    def end_stage(self, error: ServiceError | None = None) -> None:
        if self.stage_span:
            end_span(self.stage_span, error)

    @property
    def traceparent(self) -> str:
        """The W3C trace context of its present stage; empty when that is not recorded anywhere."""
        return traceparent_of(self.stage_span) if self.stage_span else ""

    def sequence(self, *, urgent: bool) -> Sequence:
        """What an engine gets to answer it, or to go on with the answer."""
        return Sequence(
            sequence_id=self.sequence_id,
            request=self.wire,
            adapter_digest=self.adapter.digest,
            chat_template=self.adapter.chat_template,
            traceparent=self.traceparent,
            answered=self.answered,
            prompt_tokens=self.started.prompt_tokens if self.started else 0,
            urgent=urgent,
        )

    @property
    def work(self) -> tuple[int, int, int]:
        """Prompt tokens, output tokens and bytes loaded, to be charged for it, as far as is known."""
        if self.started is None:
            return self.estimated_prompt_tokens, self.output_tokens, 0
        computed = self.started.prompt_tokens - self.started.cached_prompt_tokens
        return computed, self.output_tokens, self.adapter.size_bytes if self.causes_load else 0

    def piece(self, output: Output) -> Piece | None:
        """What an output has for the client; None if nothing. What another engine said of the prompt is left out."""
        entries = output.prompt_logprobs
        if not entries:
            return output if output.text or output.token_ids else None
        fresh = entries[max(0, self.prompt_logprobs_told - self.prompt_logprobs) :]
        self.prompt_logprobs += len(entries)
        self.prompt_logprobs_told += len(fresh)
        return Delta(output.text, output.token_ids, output.logprobs, fresh)

    def outcome(self, end: Finished | Failed, engine_id: str, now: float) -> Completion | ServiceError:
        """What its client is told when an engine has ended it."""
        if isinstance(end, Finished):
            if self.started is None:
                return EngineBrokeContract(engine_id, "finished a sequence that it had not started")
            return self._completion(end, self.started, engine_id, now)
        if end.code not in Code.__members__.values():
            return EngineBrokeContract(engine_id, f"ended a sequence with status code {end.code}")
        if end.code == Code.UNAVAILABLE and self.has_answered:
            return AnswerLost(f"{end.message} (while it answered)", end.reason, engine_id=engine_id)
        return RemoteError(end.code, end.message, end.reason, end.metadata)

    def _completion(self, finished: Finished, started: Started, engine_id: str, now: float) -> Completion:
        return Completion(
            finish_reason=finished.finish_reason,
            stop_match=finished.stop_match,
            prompt_tokens=started.prompt_tokens,
            cached_prompt_tokens=started.cached_prompt_tokens,
            output_tokens=finished.output_tokens,
            receipt=Receipt(
                queue=self.dispatched_at - self.arrived_at,
                adapter_wait=started.adapter_wait,
                time_to_first_token=(now if self.first_token_at is None else self.first_token_at) - self.arrived_at,
                total=now - self.arrived_at,
                engine_id=engine_id,
                adapter_tier=self.adapter.tier_name,
                charge=self.ticket.charged / MICRO if self.ticket else 0.0,
                preemptions=finished.preemptions,
                migrations=self.migrations,
            ),
            adapter_id=self.adapter.adapter_id,
            adapter_digest=self.adapter.digest,
            request_id=self.request_id,
        )
