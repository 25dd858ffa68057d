"""One trace per request across router, cache and engine, received over OTLP."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from demo.catalog import load_catalog
from loraplex.v1 import generation_pb2_grpc
from tests.e2e.conftest import ADAPTERS, Stack, wait_until
from tests.e2e.test_streams import chat

TRACE_ID = "0af7651916cd43dd8448eb211c80319c"
CALLER = f"00-{TRACE_ID}-b7ad6b7169203331-01"


def test_a_cold_request_leaves_one_trace_through_all_services(
    make_stack: Callable[..., Stack], otlp_collector: Any
) -> None:
    # Given a stack that sends its spans to our collector, and an adapter that is not on the device
    stack = make_stack(OTEL_EXPORTER_OTLP_ENDPOINT=otlp_collector.endpoint, OTEL_BSP_SCHEDULE_DELAY="200")
    entry = load_catalog().adapters[0]
    stack.register(entry.id, ADAPTERS / entry.id)

    # When a caller with a trace of its own asks for it
    with stack.channel() as channel:
        stub = generation_pb2_grpc.GenerationServiceStub(channel)
        answer = stub.Generate(
            chat(entry.prompt, entry.id, max_output_tokens=6), timeout=60, metadata=(("traceparent", CALLER),)
        )

    # Then all spans are in the caller's trace, each below the one that caused it
    def spans() -> dict[str, Any]:
        return {span.name: span for span in otlp_collector.spans() if span.trace_id == TRACE_ID}

    wanted = {"loraplex.receive", "queue", "dispatch", "adapter.load device", "prefill", "decode"}
    wait_until(lambda: wanted <= spans().keys(), 20, f"the spans {wanted} in {spans().keys()}")
    found = spans()
    assert {found[name].service for name in wanted} == {"loraplex-router", "loraplex-engine"}
    assert any(span.service == "loraplex-cache" for span in found.values()), "the cache takes part"
    receive = found["loraplex.receive"]
    assert receive.parent_id == "b7ad6b7169203331"
    ids = {span.span_id for span in found.values()}
    assert all(span.parent_id in ids for span in found.values() if span is not receive)

    # And the first says what was asked and answered
    attributes = receive.attributes
    assert attributes["gen_ai.operation.name"] == "chat"
    assert attributes["gen_ai.usage.input_tokens"] == answer.completion.usage.prompt_tokens
    assert attributes["gen_ai.usage.output_tokens"] == answer.completion.usage.output_tokens
    assert attributes["loraplex.adapter_id"] == entry.id
    assert attributes["loraplex.adapter_digest"] == answer.completion.adapter_digest
    assert attributes["loraplex.engine_id"] == "engine-0"
