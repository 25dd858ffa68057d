"""The public GenerationService: proto <-> dataclass, deadline, cancel, one path for unary and streamed answers."""

from __future__ import annotations

import asyncio
import secrets
import time
import uuid
from collections.abc import Callable
from typing import Any

import grpc
from opentelemetry.trace import Span, SpanKind

from loraplex.engine.v1 import engine_pb2
from loraplex.v1 import generation_pb2, generation_pb2_grpc
from router import metrics
from router.errors import Draining, NoEngine
from router.fleet import Engine
from router.inbox import Cancel, Submit
from router.messages import Completion, Delta
from router.outbox import Outbox, Pulse, Whole, completed
from router.registry_view import RegistryView
from router.request import Request, Sink
from router.validation import MAX_NAME_LENGTH, check_adapter_id, check_generation, check_name, check_prompt
from router.wire import completion_message, delta_message, generation_from, prompt_from, served_bases
from servicekit.errors import Cancelled, DeadlineExceeded, Internal, InvalidField, ServiceError, code_of
from servicekit.status import from_rpc_error
from servicekit.tracing import context_from_metadata, end_span, start_span

SERVER_VERSION = "0.1.0"
DEFAULT_TENANT = "default"
TENANT_KEY = "x-loraplex-tenant"

Context = grpc.aio.ServicerContext[Any, Any]


class _Call:
    """One RPC for an answer. However it ends, `ended` hears of it."""

    __slots__ = ("_ended", "arrived_at", "completion", "context", "request", "span")

    def __init__(self, context: Context, ended: Callable[[_Call, BaseException | None], None]) -> None:
        parent = context_from_metadata(tuple(context.invocation_metadata() or ()))
        self.context = context
        self.arrived_at = time.monotonic()
        self.span = start_span("loraplex.receive", parent=parent, kind=SpanKind.SERVER)
        self.request: Request | None = None
        self.completion: Completion | None = None
        self._ended = ended

    def __enter__(self) -> _Call:
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        self._ended(self, error)


class GenerationServicer(generation_pb2_grpc.GenerationServiceServicer):
    """Hands requests to the loop by `post`; knows engines only to describe the bases and to tokenise.

    Args:
        default_base: digest of the base that answers requests without an adapter; empty while none is known.
    """

    def __init__(
        self,
        view: RegistryView,
        engines: Callable[[], list[Engine]],
        default_base: Callable[[], str],
        post: Callable[[Submit | Cancel], None],
        unread_bytes: int,
    ) -> None:
        self._view = view
        self._engines = engines
        self._default_base = default_base
        self._post = post
        self._unread_bytes = unread_bytes
        self._pulse = Pulse()
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
        with self._begin(context) as call:
            sink = Whole()
            self._submit(call, message, sink)
            # Ten thousand may wait. What waits is the request's bytes; the message takes seven times as much.
            del message
            call.completion = completed(await sink.end)
            delta = sink.take()
            return generation_pb2.GenerateResponse(
                text=delta.text,
                token_ids=delta.token_ids,
                logprobs=delta.logprobs,
                prompt_logprobs=delta.prompt_logprobs,
                completion=completion_message(call.completion),
            )

    # Writes by itself instead of yielding: a generator around every message would cost as much as our part of it.
    async def StreamGenerate(  # type: ignore[override]
        self, message: generation_pb2.GenerateRequest, context: Context
    ) -> None:
        with self._begin(context) as call:
            outbox = Outbox(self._pulse, self._unread_bytes)
            self._submit(call, message, outbox)
            del message
            while isinstance(event := await outbox.next(), Delta):
                await context.write(generation_pb2.StreamGenerateResponse(delta=delta_message(event)))
            call.completion = event
            await context.write(generation_pb2.StreamGenerateResponse(completion=completion_message(event)))

    async def Tokenize(
        self, message: generation_pb2.TokenizeRequest, context: Context
    ) -> generation_pb2.TokenizeResponse:
        check_adapter_id(message.adapter_id)
        check_prompt(prompt_from(message), may_be_empty=True)
        adapter = self._view.resolve(message.adapter_id)
        request = engine_pb2.TokenizeRequest(request=message, chat_template=adapter.chat_template)
        try:
            answer = await self._engine_of(adapter.base_digest).stub.Tokenize(request, timeout=context.time_remaining())
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error) from None
        return answer.response

    async def GetModelInfo(
        self, message: generation_pb2.GetModelInfoRequest, context: Context
    ) -> generation_pb2.GetModelInfoResponse:
        response = generation_pb2.GetModelInfoResponse()
        default = self._engine_of("")
        response.CopyFrom(default.model)
        response.engine_ids[:] = sorted({e.engine_id for e in self._engines() if e.base_digest == default.base_digest})
        response.bases.extend(served_bases((engine.engine_id, engine.model) for engine in [default, *self._engines()]))
        response.server_version = SERVER_VERSION
        return response

    def _engine_of(self, base: str) -> Engine:
        """An engine of a base, or of the default one; rather one that is not about to end."""
        digest = base or self._default_base()
        engines = [engine for engine in self._engines() if engine.base_digest == digest]
        if not engines:
            raise NoEngine()
        return min(engines, key=lambda engine: engine.is_draining)

    def _begin(self, context: Context) -> _Call:
        self._open_calls += 1
        self._idle.clear()
        return _Call(context, self._ended)

    def _submit(self, call: _Call, message: generation_pb2.GenerateRequest, sink: Sink) -> None:
        """Checks a request and hands it to the loop. Raises ServiceError."""
        if self._draining:
            raise Draining()
        span = call.span
        generation = generation_from(message)
        check_generation(generation)
        tenant = tenant_of(call.context)
        request_id = generation.request_id or uuid.uuid4().hex
        _describe(span, message, tenant, request_id)
        adapter = self._view.resolve(generation.adapter_id)
        span.set_attribute("loraplex.adapter_digest", adapter.digest)
        span.set_attribute("loraplex.adapter_tier", adapter.tier_name)
        if message.sampling.temperature > 0 and not message.sampling.HasField("seed"):
            # So that another engine that goes on with the answer draws the same random numbers.
            message.sampling.seed = secrets.randbits(63)
        call.request = Request(
            request_id=request_id,
            tenant=tenant,
            adapter=adapter,
            estimated_prompt_tokens=generation.prompt.estimated_tokens(),
            wire=message.SerializeToString(),
            sink=sink,
            span=span,
            arrived_at=call.arrived_at,
            most_output_tokens=generation.stopping.max_output_tokens,
            deadline=_deadline_of(call.context),
        )
        self._post(Submit(call.request))

    def _ended(self, call: _Call, error: BaseException | None) -> None:
        status = "OK"
        if call.completion is None:
            if isinstance(error, asyncio.CancelledError):
                error = _TOO_LATE if call.context.time_remaining() == 0 else _GONE
            elif not isinstance(error, ServiceError):
                error = _FAILED
            status = code_of(error).name
            if call.request:
                self._post(Cancel(call.request, error))
        else:
            error = None
            _describe_answer(call.span, call.completion)
        metrics.REQUESTS.labels(status).inc()
        end_span(call.span, error)
        self._open_calls -= 1
        if not self._open_calls:
            self._idle.set()


_GONE = Cancelled("the client is gone", "CLIENT_GONE")
_TOO_LATE = DeadlineExceeded("the client's deadline has passed", "DEADLINE_EXCEEDED")
_FAILED = Internal("internal error, see the server's log", "INTERNAL")


def _deadline_of(context: Context) -> float | None:
    left = context.time_remaining()
    return None if left is None else time.monotonic() + left


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
