"""Protobuf to dataclass and back. Nothing beyond `service` and `cache_link` sees a message of the contract."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import Any

from google.protobuf.duration_pb2 import Duration

from engine.answer import FinishReason, Stopping
from engine.errors import PromptDiffers
from engine.logprobs import TokenLogprob
from engine.messages import Failed, Finished, Frame, Load, Output, Request, Started
from engine.model import Base
from engine.sampler import Sampling
from engine.stopping import StopStrings
from engine.tokenizer import ChatMessage, Tokenizer
from loraplex.engine.v1 import engine_pb2 as wire
from loraplex.v1 import generation_pb2 as public
from servicekit.errors import InvalidField, NotImplementedYet, code_of
from servicekit.tracing import context_from

_FINISH_REASONS = {
    FinishReason.LENGTH: public.FINISH_REASON_LENGTH,
    FinishReason.EOS: public.FINISH_REASON_EOS,
    FinishReason.STOP: public.FINISH_REASON_STOP,
}


def tokens_of(tokenizer: Tokenizer, message: Any, chat_template: str) -> list[int]:
    """Token ids of a GenerateRequest's or TokenizeRequest's prompt; raises InvalidField. Slow: not for an event loop."""
    kind = message.WhichOneof("prompt")
    if kind == "text":
        return tokenizer.encode_text(message.text)
    if kind == "token_ids":
        return list(message.token_ids.ids)
    if kind == "chat":
        turns = [ChatMessage(turn.role, turn.content) for turn in message.chat.messages]
        return tokenizer.encode_chat(turns, chat_template)
    raise InvalidField("prompt", "must be set", "EMPTY_PROMPT")


def read_request(submit: wire.SubmitSequence, prompt: Sequence[int], base: Base, received: float) -> Request:
    """A submitted sequence, checked against the base; `prompt` is its tokens. Raises ServiceError."""
    request = submit.request
    if request.HasField("constraint"):
        raise NotImplementedYet("constraint")
    _check_ids("token_ids", prompt, base.vocab_size)
    answered = tuple(submit.continuation.token_ids)
    _check_ids("continuation.token_ids", answered, base.vocab_size)
    if answered and len(prompt) != submit.continuation.prompt_tokens:
        raise PromptDiffers(len(prompt), submit.continuation.prompt_tokens)
    limit = _output_limit(len(prompt), request.stopping, base.context_length)
    return Request(
        sequence_id=submit.sequence_id,
        adapter=submit.adapter_digest,
        prompt=tuple(prompt),
        sampling=_sampling(request.sampling, request.output.top_logprobs, base.vocab_size),
        stopping=_stopping(request.stopping, limit, base),
        received=received,
        trace=context_from(submit.traceparent),
        # All of them come before the first token: whoever has one has them.
        prompt_logprobs=request.output.prompt_logprobs and not answered,
        answered=answered,
        urgent=submit.urgent,
    )


def _output_limit(prompt_tokens: int, stopping: public.StoppingParams, context_length: int) -> int:
    """Most tokens the answer may have; raises InvalidField when prompt and answer do not fit the context."""
    if not prompt_tokens:
        raise InvalidField("prompt", "has no tokens", "EMPTY_PROMPT")
    room = context_length - prompt_tokens
    if room < 1:
        raise InvalidField(
            "prompt",
            f"has {prompt_tokens} tokens; prompt and answer together may have {context_length}",
            "CONTEXT_EXCEEDED",
            limit=context_length,
            prompt_tokens=prompt_tokens,
        )
    wanted = stopping.max_output_tokens if stopping.HasField("max_output_tokens") else room
    if wanted > room:
        raise InvalidField(
            "stopping.max_output_tokens",
            f"is {wanted}; after a prompt of {prompt_tokens} tokens the context of {context_length} has room for {room}",
            "CONTEXT_EXCEEDED",
            limit=room,
            context_length=context_length,
            prompt_tokens=prompt_tokens,
        )
    if stopping.min_output_tokens > wanted:
        raise InvalidField(
            "stopping.min_output_tokens", f"is more than the {wanted} tokens there is room for", limit=wanted
        )
    return wanted


def _sampling(params: public.SamplingParams, top_logprobs: int, vocab_size: int) -> Sampling:
    _check_ids("sampling.logit_bias", list(params.logit_bias), vocab_size)
    # Every scalar has the same name and meaning in Sampling, whose default stands for "not set".
    given = {field.name: value for field, value in params.ListFields() if field.name != "logit_bias"}
    given.setdefault("seed", secrets.randbits(63))
    return Sampling(**given, logit_bias=dict(params.logit_bias), top_logprobs=top_logprobs)


def _stopping(params: public.StoppingParams, limit: int, base: Base) -> Stopping:
    _check_ids("stopping.stop_token_ids", params.stop_token_ids, base.vocab_size)
    return Stopping(
        max_output_tokens=limit,
        min_output_tokens=params.min_output_tokens,
        strings=StopStrings(params.stop),
        stop_token_ids=frozenset(params.stop_token_ids),
        eos_ids=frozenset() if params.ignore_eos else base.tokenizer.eos_ids,
        include_stop=params.include_stop,
    )


def _check_ids(field: str, ids: Sequence[int], vocab_size: int) -> None:
    wrong = next((number for number in ids if not 0 <= number < vocab_size), None)
    if wrong is not None:
        raise InvalidField(
            field, f"token id {wrong} is not in the vocabulary of {vocab_size}", token_id=wrong, limit=vocab_size
        )


def write_ready(base: Base, engine_id: str, max_sequences: int, max_rank: int) -> wire.DispatchResponse:
    """The first message of a Dispatch stream."""
    model = public.GetModelInfoResponse(
        base_model=base.name,
        base_digest=base.digest,
        architecture=base.architecture,
        context_length=base.context_length,
        vocab_size=base.vocab_size,
        dtype=base.dtype,
        device=base.device,
        max_adapter_rank=max_rank,
        has_chat_template=base.tokenizer.has_chat_template,
    )
    return wire.DispatchResponse(ready=wire.EngineReady(engine_id=engine_id, model=model, max_sequences=max_sequences))


def write_frame(frame: Frame, places: int, draining: bool) -> wire.DispatchResponse:
    """The outputs of a step, and what the engine is ready to take."""
    return wire.DispatchResponse(
        frame=wire.StepFrame(
            step=frame.step,
            outputs=map(_output, frame.outputs),
            load=_load(frame.load, places),
            draining=draining,
        )
    )


def _output(output: Output) -> wire.SequenceOutput:
    return wire.SequenceOutput(
        sequence_id=output.sequence_id,
        text=output.text,
        token_ids=output.token_ids,
        logprobs=map(_logprob, output.logprobs),
        prompt_logprobs=map(_logprob, output.prompt_logprobs),
        started=_started(output.started) if output.started else None,
        finished=_finished(output.end) if isinstance(output.end, Finished) else None,
        failed=_failed(output.end) if isinstance(output.end, Failed) else None,
    )


def _logprob(logprob: TokenLogprob) -> public.TokenLogprob:
    top = [public.TopLogprob(token_id=token, logprob=value) for token, value in logprob.top]
    return public.TokenLogprob(token_id=logprob.token, logprob=logprob.logprob, top=top)


def _started(started: Started) -> wire.SequenceStarted:
    wait = Duration()
    wait.FromNanoseconds(round(started.adapter_wait * 1e9))
    return wire.SequenceStarted(
        prompt_tokens=started.prompt_tokens, cached_prompt_tokens=started.cached_prompt_tokens, adapter_wait=wait
    )


def _finished(finished: Finished) -> wire.SequenceFinished:
    return wire.SequenceFinished(
        finish_reason=_FINISH_REASONS[finished.reason],
        stop_match=finished.stop_match,
        output_tokens=finished.output_tokens,
        preemptions=finished.preemptions,
    )


def _failed(failed: Failed) -> wire.SequenceFailed:
    error = failed.error
    return wire.SequenceFailed(
        code=int(code_of(error)), reason=error.reason, message=error.message, metadata=error.metadata
    )


def _load(load: Load, places: int) -> wire.EngineLoad:
    return wire.EngineLoad(
        running_count=load.running,
        waiting_count=load.waiting,
        loading_count=load.loading,
        free_block_count=load.free_blocks,
        total_block_count=load.total_blocks,
        places=places,
    )
