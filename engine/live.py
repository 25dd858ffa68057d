"""A sequence with everything the loop keeps beside it: its request, its answer so far, its router, its spans."""

from __future__ import annotations

from dataclasses import dataclass, replace

from opentelemetry.trace import Span

from engine.answer import Answer
from engine.detokenizer import Detokenizer
from engine.logprobs import TokenLogprob
from engine.messages import Connection, Failed, Finished, Output, Request, Started
from engine.sampler import History, Sampled, SampleRow
from engine.sequence import Sequence
from engine.tokenizer import Tokenizer
from servicekit.errors import ServiceError
from servicekit.tracing import end_span, start_span


@dataclass(slots=True, eq=False)
class Live:
    """One sequence that has not ended.

    Attributes:
        ready: when its adapter was on the device, monotonic seconds; None while it waits for it.
        has_started: whether its router was told so.
        span: the `prefill` or `decode` span that is open.
        is_decoding: whether it has had a token here.
    """

    sequence: Sequence
    request: Request
    connection: Connection
    answer: Answer
    history: History
    ready: float | None = None
    has_started: bool = False
    span: Span | None = None
    is_decoding: bool = False

    def sample_row(self) -> SampleRow:
        """What the sampler needs for the next token."""
        return SampleRow(self.request.sampling, len(self.sequence.tokens), self.history, self.answer.forbidden())

    def begin_span(self, name: str) -> None:
        """Ends the open span and begins the next one of this sequence."""
        self.end_span()
        self.span = start_span(
            name,
            parent=self.request.trace,
            attributes={
                "loraplex.adapter_digest": self.request.adapter,
                "gen_ai.usage.input_tokens": self.sequence.prompt_length,
            },
        )

    def end_span(self, error: ServiceError | None = None) -> None:
        """Ends the open span, if any."""
        if self.span is not None:
            self.span.set_attribute("gen_ai.usage.output_tokens", self.answer.output_tokens)
            self.span.set_attribute("loraplex.preemptions", self.sequence.preemptions)
            end_span(self.span, error)
            self.span = None

    def accept(self, sampled: Sampled | None, prompt_logprobs: tuple[TokenLogprob, ...] = ()) -> Output:
        """Notes what a step brought: the next token, or log probabilities of the prompt, or both.

        Returns what to tell the router. The sequence has ended when that has an end.
        """
        started = None if self.has_started else self._started()
        self.has_started = True
        sequence = self.sequence
        sequence.unscored = sequence.unscored[len(prompt_logprobs) :]
        told = Output(self.request.sequence_id, prompt_logprobs=prompt_logprobs, started=started)
        if sampled is None:
            return told
        piece = self.answer.push(sampled.token)
        sequence.learn(sampled.token)
        self.history.push(sampled.token)
        end = None
        if piece.reason is not None:
            end = Finished(piece.reason, piece.stop_match, self.answer.output_tokens, sequence.preemptions)
        return replace(
            told,
            text=piece.text,
            token_ids=(sampled.token,) if piece.shows_token else (),
            logprobs=(sampled.logprob,) if sampled.logprob and piece.shows_token else (),
            end=end,
        )

    def failure(self, error: ServiceError) -> Output:
        """What to tell the router when the sequence ends without an answer."""
        return Output(self.request.sequence_id, end=Failed(error))

    def _started(self) -> Started:
        ready = self.request.received if self.ready is None else self.ready
        # One that goes on with an answer may have found part of that, too.
        cached = min(self.sequence.cached_tokens, self.sequence.prompt_length)
        return Started(self.sequence.prompt_length, cached, ready - self.request.received)


def open_live(arrival: int, request: Request, connection: Connection, tokenizer: Tokenizer) -> Live:
    """A sequence that has just come, the `arrival`-th of the engine's life. Raises AnswerOver."""
    prompt = list(request.prompt)
    tokens = [*prompt, *request.answered]
    sequence = Sequence(
        arrival,
        request.adapter,
        tokens,
        len(prompt),
        reuse_prefix=not request.prompt_logprobs,
        is_urgent=request.urgent,
    )
    if request.prompt_logprobs:
        sequence.unscored = range(len(prompt) - 1)
    detokenizer = Detokenizer(tokenizer.decode, tokenizer.special_ids, tokenizer.byte_ids)
    history = History(request.sampling, prompt)
    answer = Answer(request.stopping, detokenizer)
    answer.resume(request.answered)
    for token in request.answered:
        history.push(token)
    return Live(sequence, request, connection, answer, history)
