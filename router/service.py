"""The public GenerationService: proto <-> dataclass, deadline, cancel, one path for unary and streamed answers."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any

import grpc
from opentelemetry.trace import Span, SpanKind

from loraplex.engine.v1 import engine_pb2
from loraplex.v1 import generation_pb2, generation_pb2_grpc
from router import metrics
from router.dispatch import Cancel, Submit
from router.errors import Draining, NoEngine
from router.fleet import Engine
from router.messages import Completion, Delta
from router.outbox import Outbox
from router.registry_view import RegistryView
from router.request import Request
from router.validation import MAX_NAME_LENGTH, check_adapter_id, check_generation, check_name, check_prompt
from router.wire import completion_message, delta_message, generation_from, prompt_from
from servicekit.errors import Cancelled, DeadlineExceeded, InvalidField, ServiceError, code_of
from servicekit.status import from_rpc_error
from servicekit.tracing import context_from_metadata, end_span, start_span

SERVER_VERSION = "0.1.0"
DEFAULT_TENANT = "default"
TENANT_KEY = "x-loraplex-tenant"

Context = grpc.aio.ServicerContext[Any, Any]


@dataclass(slots=True)
class _Call:
    """One RPC for an answer, from its first to its last moment."""

    span: Span
    request: Request | None = None
    completion: Completion | None = None
    error: ServiceError | None = None


class GenerationServicer(generation_pb2_grpc.GenerationServiceServicer):
    """Hands requests to the loop by `post`; knows engines only to describe the base and to tokenise."""

    def __init__(
        self, view: RegistryView, engines: Callable[[], list[Engine]], post: Callable[[Submit | Cancel], None]
    ) -> None:
        self._view = view
        self._engines = engines
        self._post = post
        self._open_calls = 0
        self._draining = False
        self._idle = asyncio.Event()
        self._idle.set()

    async def drain(self) -> None:
        """Refuses new requests; returns when the last running one has ended."""
        self._draining = True
        await self._idle.wait()

    async def Generate(
        self, message: generation_pb2.GenerateRequest, context: Context
    ) -> generation_pb2.GenerateResponse:
        response = generation_pb2.GenerateResponse()
        text = []
        async for event in self._answer(message, context):
            if isinstance(event, Delta):
                text.append(event.text)
                response.token_ids.extend(event.token_ids)
                response.logprobs.extend(event.logprobs)
                response.prompt_logprobs.extend(event.prompt_logprobs)
            else:
                response.completion.CopyFrom(completion_message(event))
        response.text = "".join(text)
        return response

    async def StreamGenerate(
        self, message: generation_pb2.GenerateRequest, context: Context
    ) -> AsyncIterator[generation_pb2.StreamGenerateResponse]:
        async for event in self._answer(message, context):
            if isinstance(event, Delta):
                yield generation_pb2.StreamGenerateResponse(delta=delta_message(event))
            else:
                yield generation_pb2.StreamGenerateResponse(completion=completion_message(event))

    async def Tokenize(
        self, message: generation_pb2.TokenizeRequest, context: Context
    ) -> generation_pb2.TokenizeResponse:
        check_adapter_id(message.adapter_id)
        check_prompt(prompt_from(message), may_be_empty=True)
        adapter = self._view.resolve(message.adapter_id)
        request = engine_pb2.TokenizeRequest(request=message, chat_template=adapter.chat_template)
        try:
            answer = await self._any_engine().stub.Tokenize(request, timeout=context.time_remaining())
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error) from None
        return answer.response

    async def GetModelInfo(
        self, message: generation_pb2.GetModelInfoRequest, context: Context
    ) -> generation_pb2.GetModelInfoResponse:
        response = generation_pb2.GetModelInfoResponse()
        response.CopyFrom(self._any_engine().model)
        response.engine_ids[:] = sorted({engine.engine_id for engine in self._engines()})
        response.server_version = SERVER_VERSION
        return response

    def _any_engine(self) -> Engine:
        engines = self._engines()
        if not engines:
            raise NoEngine()
        return engines[0]

    async def _answer(
        self, message: generation_pb2.GenerateRequest, context: Context
    ) -> AsyncIterator[Delta | Completion]:
        """Yields deltas, then the completion. Whatever ends the RPC, `_closed` hears of it."""
        arrived_at = time.monotonic()
        parent = context_from_metadata(tuple(context.invocation_metadata() or ()))
        call = _Call(start_span("loraplex.receive", parent=parent, kind=SpanKind.SERVER))
        self._open_calls += 1
        self._idle.clear()
        context.add_done_callback(lambda _: self._closed(call, context))  # type: ignore[arg-type]
        try:
            outbox = Outbox()
            call.request = self._accept(message, context, outbox, call.span, arrived_at)
            self._post(Submit(call.request))
            async for event in outbox.events():
                if isinstance(event, Completion):
                    call.completion = event
                yield event
        except ServiceError as error:
            call.error = error
            raise

    def _accept(
        self, message: generation_pb2.GenerateRequest, context: Context, outbox: Outbox, span: Span, arrived_at: float
    ) -> Request:
        if self._draining:
            raise Draining()
        generation = generation_from(message)
        check_generation(generation)
        tenant = tenant_of(context)
        request_id = generation.request_id or uuid.uuid4().hex
        _describe(span, message, tenant, request_id)
        adapter = self._view.resolve(generation.adapter_id)
        span.set_attribute("loraplex.adapter_digest", adapter.digest)
        span.set_attribute("loraplex.adapter_tier", adapter.tier_name)
        return Request(
            request_id=request_id,
            tenant=tenant,
            adapter=adapter,
            estimated_prompt_tokens=generation.prompt.estimated_tokens(),
            wire=message,
            sink=outbox,
            span=span,
            arrived_at=arrived_at,
        )

    def _closed(self, call: _Call, context: Context) -> None:
        status = "OK"
        if call.completion is None:
            if call.error is None:
                late = context.time_remaining() == 0
                call.error = _TOO_LATE if late else _GONE
            status = code_of(call.error).name
            if call.request:
                self._post(Cancel(call.request, call.error))
        else:
            _describe_answer(call.span, call.completion)
        metrics.REQUESTS.labels(status).inc()
        end_span(call.span, call.error)
        self._open_calls -= 1
        if not self._open_calls:
            self._idle.set()


_GONE = Cancelled("the client is gone", "CLIENT_GONE")
_TOO_LATE = DeadlineExceeded("the client's deadline has passed", "DEADLINE_EXCEEDED")


def tenant_of(context: Context) -> str:
    """The caller's tenant; raises InvalidField for a malformed one."""
    for key, value in context.invocation_metadata() or ():
        if key == TENANT_KEY:
            tenant = value if isinstance(value, str) else value.decode("latin-1")
            if not tenant:
                limit = f"1 to {MAX_NAME_LENGTH} printable ASCII characters"
                raise InvalidField(TENANT_KEY, "must not be empty", value="", limit=limit)
            check_name(TENANT_KEY, tenant)
            return tenant
    return DEFAULT_TENANT


def _describe(span: Span, message: generation_pb2.GenerateRequest, tenant: str, request_id: str) -> None:
    if not span.is_recording():
        return
    sampling, stopping = message.sampling, message.stopping
    attributes: dict[str, Any] = {
        "gen_ai.operation.name": "chat" if message.HasField("chat") else "text_completion",
        "gen_ai.provider.name": "loraplex",
        "gen_ai.request.model": message.adapter_id or "base",
        "loraplex.adapter_id": message.adapter_id,
        "loraplex.tenant": tenant,
        "loraplex.request_id": request_id,
    }
    if stopping.HasField("max_output_tokens"):
        attributes["gen_ai.request.max_tokens"] = stopping.max_output_tokens
    for name in ("temperature", "top_p", "seed"):
        if sampling.HasField(name):
            attributes[f"gen_ai.request.{name}"] = getattr(sampling, name)
    span.set_attributes(attributes)


def _describe_answer(span: Span, completion: Completion) -> None:
    receipt = completion.receipt
    metrics.QUEUE_SECONDS.observe(receipt.queue)
    metrics.FIRST_TOKEN_SECONDS.observe(receipt.time_to_first_token)
    span.set_attributes(
        {
            "gen_ai.response.finish_reasons": [completion.finish_reason.name.lower()],
            "gen_ai.usage.input_tokens": completion.prompt_tokens,
            "gen_ai.usage.output_tokens": completion.output_tokens,
            "loraplex.engine_id": receipt.engine_id,
            "loraplex.charge": receipt.charge,
        }
    )
