"""The sync and the asyncio client against a server: what is sent, what comes back, what is retried, what is cancelled."""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import grpc
import pytest

import loraplex
from loraplex import AdapterEventKind, AsyncClient, Client, FinishReason, Message, Retry, Tier, TokenLogprob
from loraplex.errors import BY_STATUS
from loraplex.v1 import generation_pb2
from tests.clients.fake import ANSWER, Failure, FakeServer

TEXT = "".join(ANSWER)
QUICK = Retry(attempts=3, first_delay=0.01, longest_delay=0.02)
UNAVAILABLE = grpc.StatusCode.UNAVAILABLE


def test_everything_exported_is_listed_in_order() -> None:
    assert sorted(loraplex.__all__) == loraplex.__all__
    assert all(hasattr(loraplex, name) for name in loraplex.__all__)


def test_every_option_reaches_its_field(client: Client, server: FakeServer) -> None:
    client.generate(
        messages=[Message("system", "s"), ("user", "u"), {"role": "assistant", "content": "a"}],
        adapter="pirate", temperature=0.5, top_k=3, top_p=0.9, min_p=0.1, seed=-7, repetition_penalty=1.5,
        frequency_penalty=0.5, presence_penalty=-0.5, logit_bias={3: 1.5}, max_output_tokens=9, min_output_tokens=2,
        stop=["x", "y"], stop_token_ids=[4], ignore_eos=True, include_stop=True, choice=["a", "b"], top_logprobs=2,
        prompt_logprobs=True, request_id="r",
    )  # fmt: skip
    turns = [("system", "s"), ("user", "u"), ("assistant", "a")]
    assert server.requests == [
        generation_pb2.GenerateRequest(
            adapter_id="pirate",
            chat=generation_pb2.Chat(
                messages=[generation_pb2.ChatMessage(role=role, content=content) for role, content in turns]
            ),
            sampling=generation_pb2.SamplingParams(
                temperature=0.5, top_k=3, top_p=0.9, min_p=0.1, seed=-7, repetition_penalty=1.5,
                frequency_penalty=0.5, presence_penalty=-0.5, logit_bias={3: 1.5},
            ),
            stopping=generation_pb2.StoppingParams(
                max_output_tokens=9, min_output_tokens=2, stop=["x", "y"], stop_token_ids=[4], ignore_eos=True,
                include_stop=True,
            ),
            constraint=generation_pb2.Constraint(choice=generation_pb2.Choice(options=["a", "b"])),
            output=generation_pb2.OutputOptions(top_logprobs=2, prompt_logprobs=True),
            request_id="r",
        )
    ]  # fmt: skip


def test_what_is_left_out_is_not_sent(client: Client, server: FakeServer) -> None:
    client.generate("hi")
    client.generate(token_ids=[1, 2])
    client.generate(messages="hi", stop="x")
    assert server.requests[0] == generation_pb2.GenerateRequest(text="hi")
    assert list(server.requests[1].token_ids.ids) == [1, 2]
    assert server.requests[2].chat.messages[0].role == "user"
    assert list(server.requests[2].stopping.stop) == ["x"]


def test_an_answer_carries_everything_the_server_said(client: Client) -> None:
    answer = client.generate("hi", adapter="pirate", request_id="mine")
    assert (answer.text, answer.token_ids, answer.finish_reason) == (TEXT, (0, 1, 2, 3), FinishReason.EOS)
    assert (answer.adapter_id, answer.adapter_digest, answer.request_id) == ("pirate", "d" * 64, "mine")
    assert (answer.usage.prompt_tokens, answer.usage.output_tokens) == (5, 5)
    assert (answer.receipt.queue, answer.receipt.time_to_first_token) == (0.002, 1.5)
    assert answer.receipt.engine_id == "engine-0"


def test_a_stream_joined_is_the_unary_answer(client: Client) -> None:
    stream = client.stream("hi")
    with pytest.raises(RuntimeError, match="not been read"):
        _ = stream.completion
    assert [delta.text for delta in stream] == list(ANSWER)
    assert stream.completion.finish_reason == FinishReason.EOS
    assert client.stream("hi").read() == client.generate("hi")
    assert list(stream) == []


async def test_log_probabilities_of_the_prompt_come_in_pieces_or_at_once(server: FakeServer, client: Client) -> None:
    expected = (TokenLogprob(7, -0.5, ((8, -0.25),)), TokenLogprob(9, -2.0, ()))
    assert client.generate("hi").prompt_logprobs == ()
    assert client.generate("hi", prompt_logprobs=True).prompt_logprobs == expected
    assert client.stream("hi", prompt_logprobs=True).read().prompt_logprobs == expected
    pieces = [delta.prompt_logprobs for delta in client.stream("hi", prompt_logprobs=True)]
    assert pieces == [expected[:1], expected[1:], *[()] * len(ANSWER)]
    async with AsyncClient(server.address) as other:
        assert (await other.generate("hi", prompt_logprobs=True)).prompt_logprobs == expected
        stream = other.stream("hi", prompt_logprobs=True)
        assert [delta.prompt_logprobs async for delta in stream] == pieces


async def test_the_asyncio_client_answers_the_same(server: FakeServer, client: Client) -> None:
    async with AsyncClient(server.address) as other:
        stream = other.stream("hi")
        assert [delta.text async for delta in stream] == list(ANSWER)
        assert stream.completion.finish_reason == FinishReason.EOS
        assert await other.generate("hi") == client.generate("hi") == await other.stream("hi").read()
        assert await other.tokenize("x") == client.tokenize("x")
        assert await other.model_info() == client.model_info()
        assert [a async for a in other.adapters.list()] == list(client.adapters.list())
        assert (await other.adapters.get("pirate")).tier == Tier.DEVICE
        assert (await other.adapters.register("new", "file:///x", pinned=True)).pinned
        assert (await other.adapters.update("new", weight=2)).weight == 2
        assert (await other.adapters.preload("new", "host")).adapter_id == "new"
        await other.adapters.delete("new", force=True)
        with pytest.raises(loraplex.NotFound):
            await other.adapters.get("new")
        async with other.adapters.watch() as events:
            first = await anext(aiter(events))
            assert first.kind == AdapterEventKind.SNAPSHOT


def test_adapters_are_read_whole(client: Client) -> None:
    assert [a.adapter_id for a in client.adapters.list()] == ["pirate", "shout"]
    adapter = client.adapters.get("pirate")
    assert adapter.create_time == datetime.fromtimestamp(1_700_000_000, UTC)
    assert adapter.tier == Tier.DEVICE
    assert adapter.state == loraplex.AdapterState.ACTIVE
    assert [place.tier for place in adapter.residency] == [Tier.HOST, Tier.DEVICE]


def test_a_path_becomes_a_file_uri(client: Client, tmp_path: Path) -> None:
    assert client.adapters.register("x", tmp_path / "a").source_uri == f"file://{tmp_path}/a"
    assert client.adapters.register("x", "hf://o/n").source_uri == "hf://o/n"


def test_watching_starts_with_a_snapshot_and_leaving_cancels(client: Client, server: FakeServer) -> None:
    with client.adapters.watch() as events:
        kinds = [next(events).kind for _ in range(3)]
    assert kinds == [AdapterEventKind.SNAPSHOT, AdapterEventKind.SNAPSHOT, AdapterEventKind.SNAPSHOT_END]
    assert server.cancelled.wait(30)


def test_tenant_token_and_metadata_are_sent(server: FakeServer) -> None:
    with Client(server.address, tenant="acme", token="secret") as client:
        client.generate("hi", metadata={"Traceparent": "00-x"})
        client.model_info(metadata={"x-loraplex-tenant": "other"})
    assert server.metadata[0]["x-loraplex-tenant"] == "acme"
    assert server.metadata[0]["authorization"] == "Bearer secret"
    assert server.metadata[0]["traceparent"] == "00-x"
    assert server.metadata[1]["x-loraplex-tenant"] == "other"


@pytest.mark.parametrize(
    "options, error, named",
    [
        ({}, TypeError, "exactly one"),
        ({"messages": "a", "token_ids": [1]}, TypeError, "exactly one"),
        ({"messages": "a", "temprature": 1}, TypeError, "temprature"),
        ({"messages": "a", "max_output_tokens": 2**40}, ValueError, "max_output_tokens"),
        ({"messages": "a", "temperature": "hot"}, TypeError, "temperature"),
        ({"messages": "a", "stop": [1]}, TypeError, "stop"),
        ({"messages": "a", "logit_bias": {2**40: 1.0}}, ValueError, "logit_bias"),
        ({"messages": "a", "regex": "x", "json_object": True}, TypeError, "only one"),
        ({"messages": [{"role": "user"}]}, ValueError, r"messages\[0\]"),
        ({"messages": "\udcff"}, ValueError, r"messages\[0\].content"),
        ({"token_ids": ["x"]}, TypeError, "token_ids"),
    ],
)
def test_what_cannot_be_sent_is_refused_by_name(
    client: Client, server: FakeServer, options: dict[str, Any], error: type[Exception], named: str
) -> None:
    with pytest.raises(error, match=named):
        client.generate(**options)
    assert not server.requests


def test_nan_is_for_the_server_to_refuse(client: Client, server: FakeServer) -> None:
    client.generate("x", temperature=math.nan)
    assert math.isnan(server.requests[0].sampling.temperature)


@pytest.mark.parametrize("status", [code for code in grpc.StatusCode if code is not grpc.StatusCode.OK])
def test_every_status_has_its_class(server: FakeServer, status: grpc.StatusCode) -> None:
    failure = Failure(status, "it is so", "SOME_REASON", {"field": "top_p", "limit": "1"}, retry_delay=0.25)
    with Client(server.address, retry=Retry(attempts=1)) as client:
        calls: list[Callable[[], object]] = [lambda: client.generate("x"), lambda: list(client.stream("x"))]
        for call in calls:
            server.failures = [failure]
            with pytest.raises(loraplex.LoraplexError) as caught:
                call()
            error = caught.value
            assert type(error) is BY_STATUS[status] and error.status is status
            assert (error.message, error.reason, error.field) == ("it is so", "SOME_REASON", "top_p")
            assert (error.metadata["limit"], error.retry_delay) == ("1", 0.25)
            assert str(error) == f"{status.name}: it is so [SOME_REASON]"


async def test_every_status_has_its_class_in_asyncio(server: FakeServer) -> None:
    async with AsyncClient(server.address, retry=Retry(attempts=1)) as client:
        for status, kind in BY_STATUS.items():
            server.failures = [Failure(status, "no", "R"), Failure(status, "no", "R", after_deltas=1)]
            with pytest.raises(kind):
                await client.generate("x")
            with pytest.raises(kind):
                await client.stream("x").read()


def test_a_status_of_the_transport_has_no_reason() -> None:
    with Client("127.0.0.1:1", retry=Retry(attempts=1)) as client, pytest.raises(loraplex.Unavailable) as caught:
        client.model_info()
    assert caught.value.reason == "" and caught.value.retry_delay is None


def test_a_call_that_is_not_answered_is_made_again(server: FakeServer) -> None:
    with Client(server.address, retry=QUICK) as client:
        calls: list[Callable[[], str]] = [lambda: client.generate("x").text, lambda: client.stream("x").read().text]
        for call in calls:
            server.requests.clear()
            server.failures = [Failure(UNAVAILABLE, reason="NO_ENGINE")] * 2
            assert call() == TEXT
            assert len(server.requests) == 3


async def test_a_call_that_is_not_answered_is_made_again_in_asyncio(server: FakeServer) -> None:
    async with AsyncClient(server.address, retry=QUICK) as client:
        server.failures = [Failure(UNAVAILABLE)] * 2
        assert (await client.generate("x")).text == TEXT
        server.failures = [Failure(UNAVAILABLE)] * 2
        assert (await client.stream("x").read()).text == TEXT
        server.failures = [Failure(UNAVAILABLE, after_deltas=1)]
        with pytest.raises(loraplex.Unavailable):
            await client.stream("x").read()
        assert len(server.requests) == 7


def test_retries_are_bounded(server: FakeServer) -> None:
    server.failures = [Failure(UNAVAILABLE, reason="NO_ENGINE")] * 9
    with Client(server.address, retry=QUICK) as client, pytest.raises(loraplex.Unavailable):
        client.generate("x")
    assert len(server.requests) == 3


def test_nothing_but_unavailable_is_retried(server: FakeServer) -> None:
    with Client(server.address, retry=QUICK) as client:
        for status in BY_STATUS:
            if status is not UNAVAILABLE:
                server.requests.clear()
                server.failures = [Failure(status, reason="R", retry_delay=0.01)]
                with pytest.raises(loraplex.LoraplexError):
                    client.generate("x")
                assert len(server.requests) == 1


def test_a_stream_that_has_said_something_is_not_repeated(server: FakeServer) -> None:
    server.failures = [Failure(UNAVAILABLE, reason="LOST", after_deltas=2)]
    with Client(server.address, retry=QUICK) as client:
        stream = client.stream("x")
        assert [next(stream).text, next(stream).text] == list(ANSWER[:2])
        with pytest.raises(loraplex.Unavailable):
            next(stream)
    assert len(server.requests) == 1


def test_a_deletion_is_repeated_only_when_the_server_says_nothing_was_done(server: FakeServer) -> None:
    with Client(server.address, retry=QUICK) as client:
        server.failures = [Failure(UNAVAILABLE, reason="STORE_UNREACHABLE")]
        client.adapters.delete("pirate")
        assert len(server.requests) == 2
        server.failures = [Failure(UNAVAILABLE)]
        with pytest.raises(loraplex.Unavailable):
            client.adapters.delete("shout")
        assert len(server.requests) == 3


def test_a_pause_longer_than_the_timeout_is_not_begun(server: FakeServer) -> None:
    server.failures = [Failure(UNAVAILABLE, reason="R", retry_delay=30)]
    began = time.monotonic()
    with Client(server.address, timeout=5) as client, pytest.raises(loraplex.Unavailable):
        client.generate("x")
    assert time.monotonic() - began < 2


def test_a_timeout_ends_a_stream(client: Client, server: FakeServer) -> None:
    server.endless = True
    with pytest.raises(loraplex.DeadlineExceeded):
        list(client.stream("x", timeout=0.2))


def test_a_stream_without_completion_is_an_error(client: Client, server: FakeServer) -> None:
    server.headless = True
    with pytest.raises(loraplex.Internal, match="without a completion"):
        list(client.stream("x"))


def test_breaking_out_of_a_loop_cancels(client: Client, server: FakeServer) -> None:
    server.endless = True
    for _ in client.stream("x"):
        break
    assert server.cancelled.wait(30)


def test_leaving_the_block_cancels(client: Client, server: FakeServer) -> None:
    server.endless = True
    with client.stream("x") as stream:
        next(stream)
    assert server.cancelled.wait(30)
    assert list(stream) == []


async def test_breaking_out_of_an_async_loop_cancels(server: FakeServer) -> None:
    server.endless = True
    async with AsyncClient(server.address) as client:
        async for _ in client.stream("x"):
            break
        assert await asyncio.to_thread(server.cancelled.wait, 5)


async def test_leaving_the_async_block_and_cancelling_the_task_cancel(server: FakeServer) -> None:
    server.endless = True
    async with AsyncClient(server.address) as client:
        async with client.stream("x") as stream:
            await anext(aiter(stream))
        assert await asyncio.to_thread(server.cancelled.wait, 5)
        assert [delta async for delta in stream] == []

        server.cancelled.clear()
        reading = asyncio.create_task(client.stream("x").read())
        await asyncio.sleep(0.1)
        reading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reading
        assert await asyncio.to_thread(server.cancelled.wait, 5)


def test_a_client_is_shared_between_threads(client: Client) -> None:
    texts: list[str] = []
    threads = [threading.Thread(target=lambda: texts.append(client.stream("x").read().text)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert texts == [TEXT] * 8
