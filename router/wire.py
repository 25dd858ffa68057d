"""Protobuf <-> the router's dataclasses. Used by the servicers and the stubs, by nothing between them."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable

from google.protobuf import duration_pb2

from loraplex.engine.v1 import engine_pb2
from loraplex.v1 import adapter_pb2, generation_pb2
from router.messages import Completion, Credit, Delta, Failed, Finished, FinishReason, Output, Sequence, Started, Wire
from router.registry_view import Adapter, Event, Kind, Tier, best_tier
from router.validation import Generation, Prompt, Sampling, Stopping

_EVENT_KINDS = {
    adapter_pb2.AdapterEvent.KIND_SNAPSHOT: Kind.SNAPSHOT,
    adapter_pb2.AdapterEvent.KIND_SNAPSHOT_END: Kind.SNAPSHOT_END,
    adapter_pb2.AdapterEvent.KIND_REGISTERED: Kind.REGISTERED,
    adapter_pb2.AdapterEvent.KIND_UPDATED: Kind.CHANGED,
    adapter_pb2.AdapterEvent.KIND_RESIDENCY: Kind.CHANGED,
    adapter_pb2.AdapterEvent.KIND_DELETED: Kind.DELETED,
}


def prompt_from(message: generation_pb2.GenerateRequest | generation_pb2.TokenizeRequest) -> Prompt:
    kind = message.WhichOneof("prompt")
    if kind == "text":
        return Prompt(text=message.text)
    if kind == "chat":
        return Prompt(chat=tuple((turn.role, turn.content) for turn in message.chat.messages))
    if kind == "token_ids" and isinstance(message, generation_pb2.GenerateRequest):
        return Prompt(token_ids=tuple(message.token_ids.ids))
    return Prompt()


def generation_from(message: generation_pb2.GenerateRequest) -> Generation:
    sampling, stopping = message.sampling, message.stopping

    def optional(name: str) -> float | None:
        return getattr(sampling, name) if sampling.HasField(name) else None  # type: ignore[arg-type]

    top_k = sampling.top_k if sampling.HasField("top_k") else None
    most = stopping.max_output_tokens if stopping.HasField("max_output_tokens") else None
    return Generation(
        prompt=prompt_from(message),
        adapter_id=message.adapter_id,
        request_id=message.request_id,
        sampling=Sampling(
            temperature=optional("temperature"),
            top_k=top_k,
            top_p=optional("top_p"),
            min_p=optional("min_p"),
            repetition_penalty=optional("repetition_penalty"),
            frequency_penalty=optional("frequency_penalty"),
            presence_penalty=optional("presence_penalty"),
            logit_bias=dict(sampling.logit_bias),
        ),
        stopping=Stopping(most, stopping.min_output_tokens, tuple(stopping.stop), tuple(stopping.stop_token_ids)),
        top_logprobs=message.output.top_logprobs,
        constrained=message.HasField("constraint"),
        size_bytes=message.ByteSize(),
    )


def delta_message(delta: Delta) -> generation_pb2.Delta:
    return generation_pb2.Delta(
        text=delta.text,
        token_ids=delta.token_ids,
        logprobs=delta.logprobs,
        prompt_logprobs=delta.prompt_logprobs,
    )


def completion_message(completion: Completion) -> generation_pb2.Completion:
    receipt = completion.receipt
    return generation_pb2.Completion(
        finish_reason=generation_pb2.FinishReason.ValueType(completion.finish_reason),
        stop_match=completion.stop_match,
        usage=generation_pb2.Usage(
            prompt_tokens=completion.prompt_tokens,
            cached_prompt_tokens=completion.cached_prompt_tokens,
            output_tokens=completion.output_tokens,
        ),
        receipt=generation_pb2.Receipt(
            queue=_duration(receipt.queue),
            adapter_wait=_duration(receipt.adapter_wait),
            time_to_first_token=_duration(receipt.time_to_first_token),
            total=_duration(receipt.total),
            engine_id=receipt.engine_id,
            adapter_tier=receipt.adapter_tier,
            charge=receipt.charge,
            preemptions=receipt.preemptions,
            migrations=receipt.migrations,
        ),
        adapter_id=completion.adapter_id,
        adapter_digest=completion.adapter_digest,
        request_id=completion.request_id,
    )


def submit_message(sequence: Sequence) -> engine_pb2.DispatchRequest:
    continuation = None
    if sequence.answered:
        continuation = engine_pb2.Continuation(token_ids=sequence.answered, prompt_tokens=sequence.prompt_tokens)
    return engine_pb2.DispatchRequest(
        submit=engine_pb2.SubmitSequence(
            sequence_id=sequence.sequence_id,
            request=generation_pb2.GenerateRequest.FromString(sequence.request),
            adapter_digest=sequence.adapter_digest,
            chat_template=sequence.chat_template,
            traceparent=sequence.traceparent,
            continuation=continuation,
            urgent=sequence.urgent,
        )
    )


def cancel_message(sequence_id: int) -> engine_pb2.DispatchRequest:
    return engine_pb2.DispatchRequest(cancel=engine_pb2.CancelSequence(sequence_id=sequence_id))


def credit_from(frame: engine_pb2.StepFrame) -> Credit:
    return Credit(frame.load.places if frame.load.HasField("places") else None, frame.draining)


def output_from(message: engine_pb2.SequenceOutput) -> Output:
    """Raises ValueError for a finish reason the contract does not know."""
    started: Started | None = None
    if message.HasField("started"):
        begun = message.started
        started = Started(begun.prompt_tokens, begun.cached_prompt_tokens, begun.adapter_wait.ToNanoseconds() / 1e9)
    end: Finished | Failed | None = None
    kind = message.WhichOneof("end")
    if kind == "finished":
        done = message.finished
        end = Finished(FinishReason(done.finish_reason), done.stop_match, done.output_tokens, done.preemptions)
    elif kind == "failed":
        failed = message.failed
        end = Failed(failed.code, failed.reason, failed.message, dict(failed.metadata))
    # By position: this runs for every token.
    return Output(
        message.sequence_id, message.text, message.token_ids, message.logprobs, message.prompt_logprobs, started, end
    )


def adapter_from(message: adapter_pb2.Adapter) -> Adapter:
    residency = message.residency
    return Adapter(
        adapter_id=message.adapter_id,
        digest=message.digest,
        # The registry promises more than 0; a flow without any weight could never be charged.
        weight=message.weight if 0 < message.weight < math.inf else 1.0,
        chat_template=message.chat_template,
        base_digest=message.base_digest,
        draining=message.state == adapter_pb2.Adapter.STATE_DRAINING,
        tier=best_tier(Tier(place.tier) for place in residency if place.tier),
        engines=frozenset(place.engine_id for place in residency if place.tier == adapter_pb2.TIER_DEVICE),
        created=message.create_time.ToNanoseconds(),
        size_bytes=message.size_bytes,
    )


def event_from(message: adapter_pb2.AdapterEvent) -> Event | None:
    """None for a kind this version does not know."""
    kind = _EVENT_KINDS.get(message.kind)
    if kind is None:
        return None
    return Event(kind, adapter_from(message.adapter) if message.HasField("adapter") else None)


def _duration(seconds: float) -> duration_pb2.Duration:
    duration = duration_pb2.Duration()
    duration.FromNanoseconds(round(seconds * 1e9))
    return duration


def served_bases(engines: Iterable[tuple[str, Wire]]) -> list[generation_pb2.ServedBase]:
    """The bases of engines, each an id with its GetModelInfoResponse, in the order of their first ones."""
    bases: dict[str, generation_pb2.ServedBase] = {}
    ids: defaultdict[str, set[str]] = defaultdict(set)
    for engine_id, model in engines:
        ids[model.base_digest].add(engine_id)
        bases.setdefault(
            model.base_digest,
            generation_pb2.ServedBase(base_model=model.base_model, base_digest=model.base_digest),
        )
    for digest, base in bases.items():
        base.engine_ids.extend(sorted(ids[digest]))
    return list(bases.values())
