"""Answers over the wire: streams, cancellation, deadlines, limits, errors of engines."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_status import rpc_status
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from loraplex.engine.v1 import engine_pb2
from loraplex.v1 import adapter_pb2, generation_pb2
from servicekit import tracing
from tests.router.fakes import FakeEngine, Running, adapter, request, running, until


def details(error: grpc.aio.AioRpcError) -> tuple[error_details_pb2.ErrorInfo, float | None]:
    """ErrorInfo and the retry delay of an error."""
    status = rpc_status.from_call(error)  # type: ignore[arg-type]
    assert status, error
    info, retry, delay = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo(), None
    for detail in status.details:
        detail.Unpack(info)
        if detail.Unpack(retry):
            delay = retry.retry_delay.ToNanoseconds() / 1e9
    assert info.domain == "loraplex"
    return info, delay


async def failure(call: Any) -> tuple[grpc.StatusCode, error_details_pb2.ErrorInfo, float | None]:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value.code(), *details(caught.value)


async def collect(stream: Any) -> list[generation_pb2.StreamGenerateResponse]:
    """What is left of a stream. With read(), so that a stream may have been begun with read()."""
    events = []
    while isinstance(event := await stream.read(), generation_pb2.StreamGenerateResponse):
        events.append(event)
    return events


async def test_a_stream_joined_is_the_unary_answer() -> None:
    async with running(adapter("a", engines=("engine-0",))) as r:
        asked = request("Hé", "a", tokens=23)
        asked.request_id = "my-request"
        unary = await r.generation.Generate(asked, timeout=5)
        events = await collect(r.generation.StreamGenerate(asked, timeout=5))
    assert [event.WhichOneof("event") for event in events[:-1]] == ["delta"] * (len(events) - 1)
    assert "".join(event.delta.text for event in events) == unary.text and "🦜" in unary.text
    assert [token for event in events for token in event.delta.token_ids] == list(unary.token_ids) == list(range(23))
    streamed = events[-1].completion
    assert streamed.usage == unary.completion.usage and streamed.finish_reason == unary.completion.finish_reason
    assert (streamed.adapter_id, streamed.adapter_digest, streamed.request_id) == ("a", "digest-a", "my-request")


async def test_the_receipt_tells_what_happened() -> None:
    async with running(adapter("a")) as r:
        began = time.monotonic()
        completion = (await r.generation.Generate(request("Hello", "a", tokens=4), timeout=5)).completion
        elapsed = time.monotonic() - began
        base = (await r.generation.Generate(request(), timeout=5)).completion
    receipt = completion.receipt
    queue, first, total = (d.ToNanoseconds() / 1e9 for d in (receipt.queue, receipt.time_to_first_token, receipt.total))
    assert 0 < queue < first < total < elapsed
    assert receipt.adapter_wait.ToMilliseconds() == 7
    assert (receipt.engine_id, receipt.adapter_tier, receipt.migrations) == ("engine-0", "disk", 0)
    # Charged for what the engine counted, not for what the router had guessed
    assert receipt.charge == 5 + 2 * 4
    assert base.receipt.adapter_tier == base.adapter_digest == ""
    assert base.request_id


async def test_a_client_that_leaves_takes_its_sequence_with_it() -> None:
    async with running() as r:
        # Given one that streams, one that waits for its unary answer, and one in the queue
        stream = r.generation.StreamGenerate(request(tokens=10**6))
        await stream.read()
        unary = r.generation.Generate(request(tokens=10**6))
        await until(lambda: len(r.engine.running) == 2)
        # When they leave
        stream.cancel()
        unary.cancel()
        # Then the engine hears of both at once
        await until(lambda: len(r.engine.cancelled) == 2, seconds=1)
        assert sorted(r.engine.cancelled) == [1, 2]
        await until(lambda: r.router.generation._idle.is_set(), seconds=1)


async def test_a_request_that_leaves_the_queue_is_never_dispatched() -> None:
    async with running(engines=[FakeEngine(max_sequences=1)]) as r:
        first = r.generation.StreamGenerate(request(tokens=10**6))
        await first.read()
        # When a deadline passes in the queue, and a client leaves it
        code = (await asyncio.gather(r.generation.Generate(request("late"), timeout=0.1), return_exceptions=True))[0]
        assert isinstance(code, grpc.aio.AioRpcError) and code.code() == grpc.StatusCode.DEADLINE_EXCEEDED
        gone = r.generation.StreamGenerate(request("gone"))
        await until(lambda: r.router.dispatcher.queued == 1)
        gone.cancel()
        await until(lambda: r.router.dispatcher.queued == 0, seconds=1)
        # Then the place goes to the next that is still there
        first.cancel()
        assert (await r.generation.Generate(request("there"), timeout=5)).token_ids
        assert [one.request.text for one in r.engine.submitted] == ["Hello", "there"]


@pytest.mark.parametrize("per_tenant, reason, limit", [(2, "TENANT_QUEUE_FULL", "2"), (5, "QUEUE_FULL", "3")])
async def test_a_full_queue_refuses_with_a_retry_delay(per_tenant: int, reason: str, limit: str) -> None:
    engines = [FakeEngine(max_sequences=1)]
    async with running(engines=engines, max_queued_requests=3, max_queued_per_tenant=per_tenant) as r:
        running_one = r.generation.StreamGenerate(request(tokens=10**6))
        await running_one.read()

        def ask(tenant: str) -> Any:
            return r.generation.Generate(request(), metadata=(("x-loraplex-tenant", tenant),), timeout=30)

        waiting = [ask("a"), ask("a"), ask("b")]
        await until(lambda: r.router.dispatcher.queued == 3)
        code, info, delay = await failure(ask("a"))
        assert code == grpc.StatusCode.RESOURCE_EXHAUSTED
        assert (info.reason, dict(info.metadata)) == (reason, {"limit": limit})
        assert delay and 0.1 <= delay <= 30
        # And those that wait are answered
        running_one.cancel()
        assert [len(answer.token_ids) for answer in await asyncio.gather(*waiting)] == [5, 5, 5]


async def test_a_client_that_does_not_read_slows_nobody_and_can_still_leave() -> None:
    async with running(engines=[FakeEngine(word="w" * 4096)]) as r:
        # Given a client that reads one message of an endless answer and no more
        stuck = r.generation.StreamGenerate(request("stuck", tokens=10**6))
        await stuck.read()
        await asyncio.sleep(0.3)
        # Then others are as quick as ever
        began = time.monotonic()
        assert len((await r.generation.Generate(request(tokens=20), timeout=5)).token_ids) == 20
        assert time.monotonic() - began < 2
        # And what it has not read is one message, whole
        produced = r.engine.running[1][1]
        second, seen = await stuck.read(), 1
        while isinstance(second, generation_pb2.StreamGenerateResponse) and seen < produced:
            assert list(second.delta.token_ids) == list(range(seen, seen + len(second.delta.token_ids)))
            assert len(second.delta.text) == 4096 * len(second.delta.token_ids)
            seen += len(second.delta.token_ids)
            second = await stuck.read()
        # And when it is stuck again and leaves, the engine hears of it
        await asyncio.sleep(0.3)
        stuck.cancel()
        await until(lambda: r.engine.cancelled == [1], seconds=1)


@pytest.mark.parametrize(
    "code, expected, reason",
    [
        (3, grpc.StatusCode.INVALID_ARGUMENT, "PROMPT_TOO_LONG"),
        (14, grpc.StatusCode.UNAVAILABLE, "PROMPT_TOO_LONG"),
        (0, grpc.StatusCode.INTERNAL, "ENGINE_BROKE_CONTRACT"),
        (77, grpc.StatusCode.INTERNAL, "ENGINE_BROKE_CONTRACT"),
    ],
)
async def test_what_the_engine_refuses_arrives_as_it_said(code: int, expected: grpc.StatusCode, reason: str) -> None:
    async with running() as r:
        r.engine.fails["bad"] = engine_pb2.SequenceFailed(
            code=code, reason="PROMPT_TOO_LONG", message="too long", metadata={"field": "prompt", "limit": "8"}
        )
        got, info, _ = await failure(r.generation.Generate(request("bad"), timeout=5))
        assert (got, info.reason) == (expected, reason)
        if code in (3, 14):
            assert dict(info.metadata) == {"field": "prompt", "limit": "8"}
        assert (await r.generation.Generate(request(), timeout=5)).token_ids


async def test_wrong_requests_are_refused_before_anything_is_queued() -> None:
    async with running() as r:
        cases: list[tuple[generation_pb2.GenerateRequest, tuple[tuple[str, str], ...], str, str]] = [
            (request(""), (), "INVALID_FIELD", "text"),
            (request("x" * 128, adapter_id="nobody"), (), "ADAPTER_NOT_FOUND", ""),
            (request(), (("x-loraplex-tenant", ""),), "INVALID_FIELD", "x-loraplex-tenant"),
            (request(), (("x-loraplex-tenant", "t" * 129),), "INVALID_FIELD", "x-loraplex-tenant"),
        ]
        for message, metadata, reason, field in cases:
            _, info, _ = await failure(r.generation.Generate(message, metadata=metadata, timeout=5))
            assert (info.reason, info.metadata.get("field", "")) == (reason, field)
            with pytest.raises(grpc.aio.AioRpcError):
                await collect(r.generation.StreamGenerate(message, metadata=metadata, timeout=5))
        assert not r.engine.submitted


async def test_an_adapter_whose_load_hangs_takes_nothing_from_others() -> None:
    cold, warm = adapter("cold"), adapter("warm", engines=("engine-0",))
    async with running(cold, warm, engines=[FakeEngine(max_sequences=4)]) as r:
        r.engine.starts = lambda submission: submission.adapter_digest != "digest-cold"
        # Given more requests for an adapter that is not there than the engine has places
        waiting = [r.generation.Generate(request("c", "cold"), timeout=20) for _ in range(6)]
        await until(lambda: len(r.engine.submitted) == 1)
        # Then one of them waits on the engine, and others have all the places
        streams: Any = [r.generation.StreamGenerate(request("w", "warm", tokens=10**6)) for _ in range(4)]
        for stream in streams:
            await stream.read()
        assert len(r.engine.running) == 5
        for stream in streams:
            stream.cancel()
        assert [one.adapter_digest for one in r.engine.submitted].count("digest-cold") == 1
        # And the cache was asked for it, once at a time
        assert {(one.digest, one.engine_id) for one in r.cache.prefetches} == {("digest-cold", "engine-0")}
        # When the cache tells that it has arrived, the rest follow at once
        r.cache.tell(adapter_pb2.AdapterEvent.KIND_RESIDENCY, adapter("cold", engines=("engine-0",)))
        await until(lambda: len(r.engine.running) >= 4, seconds=1)
        r.engine.starts = lambda submission: True
        assert len(await asyncio.gather(*waiting)) == 6


async def test_tenants_share_evenly_however_much_one_of_them_asks() -> None:
    async with running(engines=[FakeEngine(max_sequences=2)]) as r:
        r.engine.stepping.clear()

        def ask(tenant: str) -> Any:
            return r.generation.Generate(request(tenant), metadata=(("x-loraplex-tenant", tenant),), timeout=30)

        calls = [ask("greedy") for _ in range(60)]
        await until(lambda: r.router.dispatcher.queued == 58)
        calls += [ask("modest") for _ in range(10)]
        await until(lambda: r.router.dispatcher.queued == 68)
        r.engine.stepping.set()
        await asyncio.gather(*calls)
        order = [one.request.text for one in r.engine.submitted][2:22]
        assert 9 <= order.count("modest") <= 10


async def test_many_clients_at_once_are_all_answered_within_the_engines_places() -> None:
    there = [adapter(f"a{n}", engines=("engine-0",)) for n in range(20)]
    async with running(*there, engines=[FakeEngine(max_sequences=16)]) as r:
        most = 0

        async def watch() -> None:
            nonlocal most
            while True:
                most = max(most, len(r.engine.running))
                await asyncio.sleep(0.001)

        watcher = asyncio.create_task(watch())
        asked = [request("x", f"a{n % 20}", tokens=1 + n % 7) for n in range(400)]
        answers = await asyncio.gather(*[r.generation.Generate(one, timeout=30) for one in asked])
        watcher.cancel()
        assert [len(answer.token_ids) for answer in answers] == [1 + n % 7 for n in range(400)]
        assert most <= 16 and not r.engine.running
        assert r.router.dispatcher.queued == 0


async def test_a_burst_is_queued_or_refused_with_a_reason() -> None:
    # Given more requests at once than gRPC by itself would hold for a server
    async with running(engines=[FakeEngine(max_sequences=64)], max_queued_requests=500) as r:
        calls = [r.generation.Generate(request(tokens=1), timeout=30) for _ in range(2000)]
        results = await asyncio.gather(*calls, return_exceptions=True)
    answered = [one for one in results if isinstance(one, generation_pb2.GenerateResponse)]
    refused = [details(one)[0].reason for one in results if isinstance(one, grpc.aio.AioRpcError)]
    assert len(answered) >= 500 and len(answered) + len(refused) == 2000
    assert set(refused) <= {"QUEUE_FULL"}


async def test_spans_lie_below_the_callers_and_say_what_was_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(tracing, "tracer", lambda: provider.get_tracer("test"))
    caller = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    async with running(adapter("a")) as r:
        await r.generation.Generate(request("x", "a"), metadata=(("traceparent", caller),), timeout=5)
        await until(lambda: len(exporter.get_finished_spans()) == 3)
        r.engine.fails["bad"] = engine_pb2.SequenceFailed(code=3, reason="BAD", message="bad")
        await failure(r.generation.Generate(request("bad"), timeout=5))
        await until(lambda: len(exporter.get_finished_spans()) == 6)
    spans = {span.name: span for span in exporter.get_finished_spans()[:3]}
    receive, queue, dispatch = spans["loraplex.receive"], spans["queue"], spans["dispatch"]
    assert receive.parent and f"{receive.parent.span_id:016x}" == "b7ad6b7169203331"
    assert queue.parent and dispatch.parent and receive.context and dispatch.context
    assert queue.parent.span_id == dispatch.parent.span_id == receive.context.span_id
    assert f"{dispatch.context.span_id:016x}" in r.engine.submitted[0].traceparent
    assert queue.context and f"{queue.context.span_id:016x}" in r.cache.prefetches[0].traceparent
    attributes = dict(receive.attributes or {})
    assert attributes["gen_ai.operation.name"] == "text_completion"
    assert attributes["gen_ai.usage.output_tokens"] == attributes["gen_ai.request.max_tokens"] == 5
    assert (attributes["loraplex.adapter_id"], attributes["loraplex.adapter_tier"]) == ("a", "disk")
    assert all(not span.status.is_ok for span in exporter.get_finished_spans()[-2:])


async def test_tokenize_and_model_info_come_from_the_engine() -> None:
    async with running(adapter("a", chat_template="T:")) as r:
        answer = await r.generation.Tokenize(generation_pb2.TokenizeRequest(text="hi", adapter_id="a"), timeout=5)
        assert "".join(answer.tokens) == "T:hi"
        info = await r.generation.GetModelInfo(generation_pb2.GetModelInfoRequest(), timeout=5)
        assert (info.base_model, list(info.engine_ids), info.server_version) == ("fake", ["engine-0"], "0.1.0")
        code, found, _ = await failure(r.generation.Tokenize(generation_pb2.TokenizeRequest(), timeout=5))
        assert (code, found.metadata["field"]) == (grpc.StatusCode.INVALID_ARGUMENT, "prompt")


async def serving(r: Running) -> bool:
    stub: Any = health_pb2_grpc.HealthStub(r.channel)
    answer = await stub.Check(health_pb2.HealthCheckRequest(service="loraplex.v1.GenerationService"))
    return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


async def until_serving(r: Running, expected: bool) -> None:
    async with asyncio.timeout(5):
        while await serving(r) != expected:  # noqa: ASYNC110 - health is asked, as a launcher does
            await asyncio.sleep(0.01)


async def test_health_follows_the_engines() -> None:
    async with running() as r:
        await until_serving(r, True)
        await r.engine.stop()
        await until_serving(r, False)
        await r.engine.start()
        await until_serving(r, True)


async def test_drain_answers_what_runs_and_what_waits_and_refuses_what_is_new() -> None:
    async with running(engines=[FakeEngine(max_sequences=1)]) as r:
        asked = [r.generation.StreamGenerate(request(tokens=60), timeout=20) for _ in range(2)]
        await until(lambda: len(r.engine.running) == 1 and r.router.dispatcher.queued == 1)
        r.stop.set()
        await until_serving(r, False)
        code, info, _ = await failure(r.generation.Generate(request(), timeout=5))
        assert (code, info.reason) == (grpc.StatusCode.UNAVAILABLE, "DRAINING")
        for stream in asked:
            events = await collect(stream)
            assert events[-1].completion.usage.output_tokens == 60
        await asyncio.wait_for(r.task, 5)


async def test_what_outlasts_the_drain_is_told_so() -> None:
    async with running(engines=[FakeEngine(max_sequences=1)], drain_seconds=0.2) as r:
        begun = asyncio.create_task(collect(r.generation.StreamGenerate(request(tokens=10**6), timeout=20)))
        await until(lambda: r.engine.running)
        queued = r.generation.Generate(request(), timeout=20)
        await until(lambda: r.router.dispatcher.queued == 1)
        r.stop.set()
        code, info, _ = await failure(begun)
        assert (code, info.reason) == (grpc.StatusCode.ABORTED, "DRAINING")
        code, info, _ = await failure(queued)
        assert (code, info.reason) == (grpc.StatusCode.UNAVAILABLE, "DRAINING")
        await asyncio.wait_for(r.task, 5)
