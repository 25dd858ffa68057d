"""Spans over a real OTLP endpoint. The SDK is set up once per process, so each case is a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
import time

from tests.otlp_collector import Collector

TRACE_ID = "0af7651916cd43dd8448eb211c80319c"
CALLER = "b7ad6b7169203331"
PRELUDE = """
import sys
from servicekit.errors import Exhausted
from servicekit.tracing import *
from servicekit.tracing import SpanKind
setup_tracing("router", "router-1")
"""


def run(code: str, **environ: str) -> subprocess.CompletedProcess[str]:
    clean = {key: value for key, value in os.environ.items() if not key.startswith("OTEL_")}
    return subprocess.run(
        [sys.executable, "-c", PRELUDE + code],
        env={**clean, **environ},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )


def test_spans_of_two_services_share_a_trace_through_traceparent(otlp_collector: Collector) -> None:
    # Given a caller's context in metadata, and a message that carries ours on
    run(
        f"""
metadata = [("user-agent", "x"), ("traceparent", "00-{TRACE_ID}-{CALLER}-01"), ("data-bin", b"1")]
receive = start_span("receive", parent=context_from_metadata(metadata), kind=SpanKind.SERVER, attributes={{"n": 3}})
queue = start_span("queue", parent=context_of(receive))
carried = traceparent_of(queue)
other = start_span("decode", parent=context_from(carried), attributes={{"ids": ["a", "b"]}})
for span in (other, queue, receive):
    end_span(span)
shutdown_tracing()
""",
        OTEL_EXPORTER_OTLP_ENDPOINT=otlp_collector.endpoint,
    )
    # Then parent and child are linked, whatever was current where they were started
    spans = {span.name: span for span in otlp_collector.spans(TRACE_ID)}
    assert spans.keys() == {"receive", "queue", "decode"}
    assert spans["receive"].parent_id == CALLER
    assert spans["queue"].parent_id == spans["receive"].span_id
    assert spans["decode"].parent_id == spans["queue"].span_id
    assert spans["receive"].attributes == {"n": 3}
    assert spans["decode"].attributes == {"ids": ("a", "b")}
    assert spans["receive"].service == "loraplex-router"
    assert spans["receive"].resource["service.instance.id"] == "router-1"
    assert not any(span.failed for span in spans.values())


def test_without_a_caller_each_request_has_a_trace_of_its_own(otlp_collector: Collector) -> None:
    run(
        """
for traceparent in ("", "nonsense", "00-0-0-00"):
    end_span(start_span("receive", parent=context_from(traceparent)))
end_span(start_span("receive", parent=context_from_metadata(None)))
shutdown_tracing()
""",
        OTEL_EXPORTER_OTLP_ENDPOINT=otlp_collector.endpoint,
    )
    assert len({span.trace_id for span in otlp_collector.spans()}) == 4
    assert {span.parent_id for span in otlp_collector.spans()} == {""}


def test_an_error_is_in_its_span(otlp_collector: Collector) -> None:
    run(
        """
end_span(start_span("known"), Exhausted("queue is full", "QUEUE_FULL"))
end_span(start_span("unforeseen"), ValueError("secret"))
shutdown_tracing()
""",
        OTEL_EXPORTER_OTLP_ENDPOINT=otlp_collector.endpoint,
    )
    known, unforeseen = otlp_collector.spans()
    assert (known.failed, known.message) == (True, "queue is full")
    assert known.attributes == {"rpc.grpc.status_code": 8, "error.type": "QUEUE_FULL"}
    assert (unforeseen.failed, unforeseen.message, unforeseen.attributes) == (True, "", {"error.type": "ValueError"})


def test_times_can_be_given(otlp_collector: Collector) -> None:
    run(
        'end_span(start_span("prefill", start_time_ns=1_700_000_000_000_000_000))\nshutdown_tracing()',
        OTEL_EXPORTER_OTLP_TRACES_ENDPOINT=otlp_collector.endpoint,
    )
    assert otlp_collector.spans()[0].start == 1_700_000_000_000_000_000


def test_shutdown_sends_what_is_buffered(otlp_collector: Collector) -> None:
    # Given a batch that would leave in a minute
    run(
        'for n in range(600): end_span(start_span("decode"))\nshutdown_tracing()',
        OTEL_EXPORTER_OTLP_ENDPOINT=otlp_collector.endpoint,
        OTEL_BSP_SCHEDULE_DELAY="60000",
    )
    assert len(otlp_collector.spans()) == 600


NO_OP = """
span = start_span("receive", attributes={"a": 1})
assert not span.is_recording()
assert traceparent_of(span) == ""
end_span(span, ValueError("x"))
shutdown_tracing()
assert not any(name.startswith(("opentelemetry.sdk", "opentelemetry.exporter")) for name in sys.modules)
"""


def test_without_an_endpoint_nothing_is_recorded_or_loaded() -> None:
    run(NO_OP)


def test_a_disabled_sdk_records_nothing(otlp_collector: Collector) -> None:
    run(NO_OP, OTEL_EXPORTER_OTLP_ENDPOINT=otlp_collector.endpoint, OTEL_SDK_DISABLED="true")
    assert otlp_collector.spans() == []


def test_a_caller_that_did_not_sample_is_not_recorded(otlp_collector: Collector) -> None:
    run(
        f"""
span = start_span("receive", parent=context_from("00-{TRACE_ID}-{CALLER}-00"))
assert traceparent_of(span).startswith("00-{TRACE_ID}-") and traceparent_of(span).endswith("-00")
end_span(span)
shutdown_tracing()
""",
        OTEL_EXPORTER_OTLP_ENDPOINT=otlp_collector.endpoint,
    )
    assert otlp_collector.spans() == []


def test_an_endpoint_that_is_gone_does_not_hold_the_process_up() -> None:
    began = time.monotonic()
    run(
        'end_span(start_span("receive"))\nshutdown_tracing()',
        OTEL_EXPORTER_OTLP_ENDPOINT="http://127.0.0.1:1",
        OTEL_EXPORTER_OTLP_TIMEOUT="1",
    )
    assert time.monotonic() - began < 8
