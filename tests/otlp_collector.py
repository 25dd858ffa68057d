"""A real OTLP endpoint: `endpoint` is for OTEL_EXPORTER_OTLP_ENDPOINT, `spans()` is what has come."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.proto.trace.v1 import trace_pb2

ERROR = trace_pb2.Status.STATUS_CODE_ERROR


@dataclass(frozen=True)
class ReceivedSpan:
    """A span as it arrived. Ids are lower-case hex; `parent_id` is "" at the root; times are nanoseconds of the epoch."""

    service: str
    name: str
    trace_id: str
    span_id: str
    parent_id: str
    kind: int
    start: int
    end: int
    failed: bool
    message: str
    attributes: dict[str, Any]
    resource: dict[str, Any]


class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    """Receives spans over OTLP (gRPC), on a port of its own unless told otherwise. Safe to read from any thread."""

    def __init__(self, listen: str = "127.0.0.1:0") -> None:
        self._lock = threading.Lock()
        self._spans: list[ReceivedSpan] = []
        self._server = grpc.server(ThreadPoolExecutor(max_workers=2))
        trace_service_pb2_grpc.add_TraceServiceServicer_to_server(self, self._server)  # type: ignore[no-untyped-call]
        self.endpoint = f"http://127.0.0.1:{self._server.add_insecure_port(listen)}"
        self._server.start()

    def Export(
        self, request: trace_service_pb2.ExportTraceServiceRequest, context: grpc.ServicerContext
    ) -> trace_service_pb2.ExportTraceServiceResponse:
        with self._lock:
            self._spans.extend(spans_of(request))
        return trace_service_pb2.ExportTraceServiceResponse()

    def spans(self, trace_id: str = "") -> list[ReceivedSpan]:
        """The spans that came so far, in order of arrival; of one trace only when its id is given."""
        with self._lock:
            return [span for span in self._spans if trace_id in ("", span.trace_id)]

    def wait_for(self, enough: Callable[[list[ReceivedSpan]], bool], seconds: float = 20) -> list[ReceivedSpan]:
        """The spans, once there are enough of them; an AssertionError when they do not come in time."""
        deadline = time.monotonic() + seconds
        while not enough(spans := self.spans()):
            assert time.monotonic() < deadline, f"only {[span.name for span in spans]} after {seconds} s"
            time.sleep(0.02)
        return spans

    def close(self) -> None:
        self._server.stop(None).wait()


def spans_of(request: trace_service_pb2.ExportTraceServiceRequest) -> list[ReceivedSpan]:
    """The spans of one message."""
    return [
        _received(span, _values(group.resource.attributes))
        for group in request.resource_spans
        for scope in group.scope_spans
        for span in scope.spans
    ]


def _received(span: Any, resource: dict[str, Any]) -> ReceivedSpan:
    return ReceivedSpan(
        service=resource.get("service.name", ""),
        name=span.name,
        trace_id=span.trace_id.hex(),
        span_id=span.span_id.hex(),
        parent_id=span.parent_span_id.hex(),
        kind=span.kind,
        start=span.start_time_unix_nano,
        end=span.end_time_unix_nano,
        failed=span.status.code == ERROR,
        message=span.status.message,
        attributes=_values(span.attributes),
        resource=resource,
    )


def _values(attributes: Any) -> dict[str, Any]:
    return {attribute.key: _value(attribute.value) for attribute in attributes}


def _value(value: Any) -> Any:
    kind = value.WhichOneof("value")
    if kind == "array_value":
        return tuple(_value(part) for part in value.array_value.values)
    return getattr(value, kind) if kind else None
