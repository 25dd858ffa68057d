"""Messages of the wire -> what calls return."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC
from enum import Enum
from typing import Any, TypeVar

from google.protobuf.duration_pb2 import Duration

from loraplex.types import (
    Adapter,
    AdapterEvent,
    AdapterEventKind,
    AdapterState,
    Completion,
    Delta,
    Failure,
    FinishReason,
    Generation,
    Lease,
    ModelInfo,
    Receipt,
    Residency,
    ServedBase,
    Tier,
    Tokenization,
    TokenLogprob,
    Usage,
)
from loraplex.v1 import adapter_pb2, generation_pb2

E = TypeVar("E", bound=Enum)


def generation(response: generation_pb2.GenerateResponse) -> Generation:
    return Generation(
        text=response.text,
        token_ids=tuple(response.token_ids),
        logprobs=_logprobs(response.logprobs),
        prompt_logprobs=_logprobs(response.prompt_logprobs),
        **_ending(response.completion),
    )


def joined(deltas: Iterable[Delta], completion: Completion) -> Generation:
    """The whole answer of a stream."""
    pieces = list(deltas)
    return Generation(
        text="".join(piece.text for piece in pieces),
        token_ids=tuple(token for piece in pieces for token in piece.token_ids),
        logprobs=tuple(entry for piece in pieces for entry in piece.logprobs),
        prompt_logprobs=tuple(entry for piece in pieces for entry in piece.prompt_logprobs),
        **vars(completion),
    )


def stream_event(response: generation_pb2.StreamGenerateResponse) -> Delta | Completion | None:
    """None for an event this version of the client does not know."""
    kind = response.WhichOneof("event")
    if kind == "delta":
        delta = response.delta
        return Delta(delta.text, tuple(delta.token_ids), _logprobs(delta.logprobs), _logprobs(delta.prompt_logprobs))
    return Completion(**_ending(response.completion)) if kind == "completion" else None


def tokenization(response: generation_pb2.TokenizeResponse) -> Tokenization:
    return Tokenization(tuple(response.token_ids), tuple(response.tokens))


def model_info(response: generation_pb2.GetModelInfoResponse) -> ModelInfo:
    return ModelInfo(
        base_model=response.base_model,
        base_digest=response.base_digest,
        architecture=response.architecture,
        context_length=response.context_length,
        vocab_size=response.vocab_size,
        dtype=response.dtype,
        device=response.device,
        max_adapter_rank=response.max_adapter_rank,
        has_chat_template=response.has_chat_template,
        engine_ids=tuple(response.engine_ids),
        server_version=response.server_version,
        bases=tuple(ServedBase(base.base_model, base.base_digest, tuple(base.engine_ids)) for base in response.bases),
    )


def adapter(message: adapter_pb2.Adapter) -> Adapter:
    return Adapter(
        adapter_id=message.adapter_id,
        source_uri=message.source_uri,
        digest=message.digest,
        base_model=message.base_model,
        method=message.method,
        rank=message.rank,
        size_bytes=message.size_bytes,
        pinned=message.pinned,
        weight=message.weight,
        create_time=message.create_time.ToDatetime(tzinfo=UTC),
        state=_enum(AdapterState, message.state),
        residency=tuple(
            Residency(place.node_id, place.engine_id, _enum(Tier, place.tier)) for place in message.residency
        ),
        chat_template=message.chat_template,
        target_modules=tuple(message.target_modules),
        source_revision=message.source_revision,
        last_use_time=message.last_use_time.ToDatetime(tzinfo=UTC) if message.HasField("last_use_time") else None,
        leases=tuple(Lease(lease.node_id, lease.engine_id) for lease in message.leases),
        failure=_failure(message.failure) if message.HasField("failure") else None,
        base_digest=message.base_digest,
        base_name=message.base_name,
    )


def _failure(message: adapter_pb2.Failure) -> Failure:
    return Failure(message.reason, message.message, message.retry_time.ToDatetime(tzinfo=UTC))


def adapter_event(message: adapter_pb2.AdapterEvent) -> AdapterEvent:
    changed = adapter(message.adapter) if message.HasField("adapter") else None
    return AdapterEvent(_enum(AdapterEventKind, message.kind), changed)


def _ending(message: generation_pb2.Completion) -> dict[str, Any]:
    usage, receipt = message.usage, message.receipt
    return {
        "finish_reason": _enum(FinishReason, message.finish_reason),
        "stop_match": message.stop_match,
        "usage": Usage(usage.prompt_tokens, usage.cached_prompt_tokens, usage.output_tokens),
        "receipt": Receipt(
            queue=_seconds(receipt.queue),
            adapter_wait=_seconds(receipt.adapter_wait),
            time_to_first_token=_seconds(receipt.time_to_first_token),
            total=_seconds(receipt.total),
            engine_id=receipt.engine_id,
            adapter_tier=receipt.adapter_tier,
            charge=receipt.charge,
            preemptions=receipt.preemptions,
            migrations=receipt.migrations,
        ),
        "adapter_id": message.adapter_id,
        "adapter_digest": message.adapter_digest,
        "request_id": message.request_id,
    }


def _logprobs(messages: Iterable[generation_pb2.TokenLogprob]) -> tuple[TokenLogprob, ...]:
    return tuple(
        TokenLogprob(entry.token_id, entry.logprob, tuple((top.token_id, top.logprob) for top in entry.top))
        for entry in messages
    )


def _enum(kind: type[E], value: int) -> E | None:
    """None for a value that a newer server may know."""
    return kind(value) if any(member.value == value for member in kind) else None


def _seconds(duration: Duration) -> float:
    return duration.seconds + duration.nanos / 1e9
