"""One trace per request across the services, sent by OTLP.

Tracing is on when OTEL_EXPORTER_OTLP_ENDPOINT (or its _TRACES_ form) is set; the other OTEL_* variables mean what
OpenTelemetry says. Without it the API's no-op tracer costs next to nothing. Many requests share one stream between
router and engine, so the trace context travels inside messages as a W3C `traceparent`, not in metadata.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.trace import Span, SpanKind, Status, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from servicekit.errors import ServiceError, code_of

_propagator = TraceContextTextMapPropagator()


def setup_tracing(service: str, instance_id: str) -> None:
    """Sends this process's spans to the OTLP endpoint of the environment, if there is one. Call once, at start."""
    environ = os.environ
    if not (environ.get("OTEL_EXPORTER_OTLP_ENDPOINT") or environ.get("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")):
        return
    if environ.get("OTEL_SDK_DISABLED", "").lower() == "true":
        return
    from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    resource = Resource.create({"service.name": f"loraplex-{service}", "service.instance.id": instance_id})
    provider = TracerProvider(resource=resource)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    trace.set_tracer_provider(provider)


def shutdown_tracing() -> None:
    """Sends what is still buffered. Blocks for as long as the exporter's timeout at most."""
    provider = trace.get_tracer_provider()
    if hasattr(provider, "shutdown"):
        provider.shutdown()


def tracer() -> trace.Tracer:
    """The tracer all services use."""
    return trace.get_tracer("loraplex")


def start_span(
    name: str,
    *,
    parent: Context | None = None,
    kind: SpanKind = SpanKind.INTERNAL,
    attributes: Mapping[str, Any] | None = None,
    start_time_ns: int | None = None,
) -> Span:
    """Starts a span that the caller ends; it does not become the current one."""
    return tracer().start_span(
        name, context=parent, kind=kind, attributes=dict(attributes or {}), start_time=start_time_ns
    )


def context_of(span: Span) -> Context:
    """The context in which children of a span are started."""
    return trace.set_span_in_context(span, Context())


def traceparent_of(span: Span) -> str:
    """The W3C trace context of a span, or "" when it is not recorded anywhere."""
    carrier: dict[str, str] = {}
    _propagator.inject(carrier, context=context_of(span))
    return carrier.get("traceparent", "")


def context_from(traceparent: str) -> Context:
    """The context a `traceparent` names; an empty context when it is empty or malformed."""
    return _propagator.extract({"traceparent": traceparent} if traceparent else {}, context=Context())


def context_from_metadata(metadata: Sequence[tuple[str, str | bytes]] | None) -> Context:
    """The caller's context from gRPC metadata (`traceparent`, `tracestate`)."""
    carrier = {key: value for key, value in metadata or () if isinstance(value, str)}
    return _propagator.extract(carrier, context=Context())


def end_span(span: Span, error: BaseException | None = None) -> None:
    """Ends a span; with an error, marks it failed with the error's status code and reason."""
    if error is not None:
        if isinstance(error, ServiceError):
            span.set_attribute("rpc.grpc.status_code", int(code_of(error)))
            span.set_attribute("error.type", error.reason)
            span.set_status(Status(StatusCode.ERROR, error.message))
        else:
            span.set_attribute("error.type", type(error).__name__)
            span.set_status(Status(StatusCode.ERROR))
    span.end()
