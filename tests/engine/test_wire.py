"""The real service over gRPC: a tiny model, a router and a cache played by the test."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from prometheus_client import REGISTRY

from engine.service import EngineServicer
from loraplex.cache.v1 import residency_pb2 as cache
from loraplex.engine.v1 import engine_pb2 as wire
from loraplex.engine.v1 import engine_pb2_grpc
from loraplex.v1 import generation_pb2 as public
from servicekit.server import Server
from tests.engine.stack import PROMPT, Stack, running_stack
from tests.engine.tiny import Oracle


@pytest.fixture
async def stack(tiny_model: Callable[[str], Path], tmp_path: Path) -> AsyncIterator[Stack]:
    async with running_stack(tiny_model("llama"), tmp_path) as running:
        yield running


async def test_the_first_message_describes_the_engine_and_silence_is_broken_once_a_second(stack: Stack) -> None:
    stream = await stack.stream()
    ready = stream.ready.result()
    assert (ready.engine_id, ready.max_sequences) == ("engine-1", 8)
    assert (ready.model.context_length, ready.model.vocab_size, ready.model.dtype) == (256, 384, "float32")
    assert ready.model.base_digest == stack.base.digest and ready.model.has_chat_template
    await stream.until(lambda: len(stream.frames) >= 1)
    assert stream.frames[0].step == 0 and stream.frames[0].load.total_block_count == stack.base.block_count


async def test_an_adapter_is_loaded_while_others_stream_and_then_answers(stack: Stack) -> None:
    oracle = Oracle(stack.folder, stack.adapters)
    late = stack.adapters[3]
    stream = await stack.stream()
    # Given a long base stream and a sequence that waits for its adapter
    stream.submit(1, stopping=public.StoppingParams(max_output_tokens=200, ignore_eos=True))
    stream.submit(2, digest=late.digest)
    await stack.cache.heard(lambda said: list(said.wanted.digests) == [late.digest])
    await stack.cache.heard(lambda said: list(said.in_use.digests) == [late.digest])
    assert stack.cache.described[0].base_digest == stack.base.digest
    assert len(stack.cache.described[0].modules) == 21
    await stream.until(lambda: 1 in stream.started)
    assert 2 not in stream.started
    # When the cache sends it
    stack.cache.load(late)
    # Then the waiting one answers as PEFT would, and the other never noticed
    ended = await stream.end_of(2)
    assert ended.WhichOneof("end") == "finished"
    assert stream.sequences[2].token_ids == oracle.greedy(PROMPT, 12, late.digest)
    assert stream.started[2].adapter_wait.ToNanoseconds() > 0
    assert (await stream.end_of(1)).finished.output_tokens == 200
    await stack.cache.heard(lambda said: said.loaded.digest == late.digest and said.loaded.device_bytes > 0)


async def test_an_adapter_in_use_stays_until_it_is_forced_out(stack: Stack) -> None:
    adapter = stack.adapters[0]
    stack.cache.load(adapter)
    stream = await stack.stream()
    stream.submit(1, adapter.digest, stopping=public.StoppingParams(max_output_tokens=200, ignore_eos=True))
    await stream.until(lambda: 1 in stream.started)
    stack.cache.order(evict=cache.EvictArtifact(digest=adapter.digest))
    await stack.cache.heard(lambda said: said.WhichOneof("message") == "evicted" and not said.evicted.evicted)
    stack.cache.order(evict=cache.EvictArtifact(digest=adapter.digest, force=True))
    failed = (await stream.end_of(1)).failed
    assert (failed.code, failed.reason) == (10, "ADAPTER_REMOVED")
    await stack.cache.heard(lambda said: said.evicted.evicted)
    assert stack.loop.resident == ()


async def test_an_adapter_that_cannot_be_had_fails_those_who_wait_with_the_caches_reason(stack: Stack) -> None:
    stream = await stack.stream()
    stream.submit(1, digest="nowhere")
    await stack.cache.heard(lambda said: list(said.wanted.digests) == ["nowhere"])
    gone = cache.ArtifactUnavailable(digest="nowhere", code=14, reason="SOURCE_DOWN", message="no")
    stack.cache.order(unavailable=gone)
    failed = (await stream.end_of(1)).failed
    assert (failed.code, failed.reason, failed.metadata["digest"]) == (14, "SOURCE_DOWN", "nowhere")


async def test_a_broken_artifact_is_refused_by_reason(stack: Stack, tmp_path: Path) -> None:
    truncated = tmp_path / "truncated.safetensors"
    truncated.write_bytes(stack.adapters[0].path.read_bytes()[:-5])
    digest = stack.adapters[0].digest
    for path in (str(truncated), "/etc/passwd", str(stack.adapters[1].path)):
        stack.cache.said.clear()
        stack.cache.order(load=cache.LoadArtifact(digest=digest, path=path))
        await stack.cache.heard(lambda said: said.load_failed.reason == "BAD_ARTIFACT")
    assert stack.loop.resident == ()


async def test_the_link_comes_back_and_says_what_is_resident(stack: Stack) -> None:
    stack.cache.load(stack.adapters[0])
    await stack.cache.heard(lambda said: bool(said.loaded.digest))
    stack.cache.orders.put_nowait(None)
    async with stack.cache.changed, asyncio.timeout(10):
        await stack.cache.changed.wait_for(lambda: len(stack.cache.described) == 2)
    assert list(stack.cache.described[1].resident_digests) == [stack.adapters[0].digest]


async def test_a_router_that_goes_away_frees_its_sequences_within_two_steps(stack: Stack) -> None:
    leaver, other = await stack.stream(), await stack.stream()
    endless = public.StoppingParams(max_output_tokens=240, ignore_eos=True)
    for sequence_id in (1, 2, 3):
        leaver.submit(sequence_id, stopping=endless)
    other.submit(1, stopping=endless)
    await other.until(lambda: any(frame.load.running_count == 4 for frame in other.frames))
    leaver.call.cancel()
    await other.until(lambda: other.frames[-1].load.running_count == 1)
    counts = [frame.load.running_count for frame in other.frames if frame.step]
    assert REGISTRY.get_sample_value("loraplex_engine_running_sequences") in (0.0, 1.0)
    # From 4 to 1 at once: no step in between runs some of them
    assert not {2, 3} & set(counts[counts.index(4) :])
    other.cancel(1)
    await other.until(lambda: other.frames[-1].load.running_count == 0)
    assert stack.loop.load.free_blocks == stack.base.block_count


@pytest.mark.parametrize("how", ["cancel", "close"])
async def test_a_cancelled_sequence_says_nothing_more(stack: Stack, how: str) -> None:
    stream = await stack.stream()
    stream.submit(1, stopping=public.StoppingParams(max_output_tokens=240, ignore_eos=True))
    await stream.until(lambda: 1 in stream.started)
    if how == "cancel":
        stream.cancel(1)
        await stream.until(lambda: stream.frames[-1].load.running_count == 0)
    else:
        stream.close()
        await asyncio.wait_for(stream.reading, 10)
    assert 1 not in stream.ended


WRONG: list[tuple[dict[str, Any], str, dict[str, str]]] = [
    ({"token_ids": public.TokenIds()}, "EMPTY_PROMPT", {"field": "prompt"}),
    ({"text": ""}, "EMPTY_PROMPT", {"field": "prompt"}),
    ({"token_ids": public.TokenIds(ids=[5, 384])}, "INVALID_FIELD", {"field": "token_ids", "limit": "384"}),
    ({"token_ids": public.TokenIds(ids=[5, -1])}, "INVALID_FIELD", {"field": "token_ids", "limit": "384"}),
    ({"token_ids": public.TokenIds(ids=[5] * 256)}, "CONTEXT_EXCEEDED", {"field": "prompt", "limit": "256"}),
    (
        {"stopping": public.StoppingParams(max_output_tokens=252)},
        "CONTEXT_EXCEEDED",
        {"field": "stopping.max_output_tokens", "limit": "251"},
    ),
    ({"stopping": public.StoppingParams(stop_token_ids=[999])}, "INVALID_FIELD", {"field": "stopping.stop_token_ids"}),
    ({"sampling": public.SamplingParams(logit_bias={384: 1})}, "INVALID_FIELD", {"field": "sampling.logit_bias"}),
    ({"constraint": public.Constraint(regex="a")}, "NOT_IMPLEMENTED", {"field": "constraint"}),
]


@pytest.mark.parametrize(("given", "reason", "metadata"), WRONG)
async def test_wrong_input_fails_alone_and_names_field_and_limit(
    stack: Stack, given: dict[str, Any], reason: str, metadata: dict[str, str]
) -> None:
    stream = await stack.stream()
    stream.submit(1, **given)
    stream.submit(2)
    failed = (await stream.end_of(1)).failed
    assert failed.reason == reason
    assert metadata.items() <= dict(failed.metadata).items()
    assert (await stream.end_of(2)).WhichOneof("end") == "finished"


async def test_a_chat_uses_the_adapters_template_and_a_broken_template_is_named(stack: Stack) -> None:
    chat = public.Chat(messages=[public.ChatMessage(role="user", content="hi")])
    ask = public.TokenizeRequest(chat=chat)
    base_way = (await stack.stub.Tokenize(wire.TokenizeRequest(request=ask))).response
    assert "".join(base_way.tokens) == "<|user|>hi<|end|><|assistant|>"
    own = wire.TokenizeRequest(request=ask, chat_template="{{ messages[0]['content'] }}!")
    assert "".join((await stack.stub.Tokenize(own)).response.tokens) == "hi!"
    for template in ("{{ nothing.at.all }}", "{% raise %}", "{{ ''.__class__.__mro__ }}", "{{ 1 / 0 }}"):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stack.stub.Tokenize(wire.TokenizeRequest(request=ask, chat_template=template))
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT, template


async def test_logprobs_and_text_come_with_the_tokens(stack: Stack) -> None:
    stream = await stack.stream()
    stream.submit(1, text="The quick brown", output=public.OutputOptions(top_logprobs=3))
    await stream.end_of(1)
    outputs = [output for frame in stream.frames for output in frame.outputs]
    logprobs = [logprob for output in outputs for logprob in output.logprobs]
    tokens = stream.sequences[1].token_ids
    assert [logprob.token_id for logprob in logprobs] == tokens
    assert all(len(logprob.top) == 3 and logprob.top[0].token_id == logprob.token_id for logprob in logprobs)
    assert stream.sequences[1].text == stack.base.tokenizer.decode(tokens)


async def test_logprobs_of_a_prompt_come_in_pieces_with_the_steps_that_compute_it(stack: Stack) -> None:
    stream = await stack.stream()
    prompt = [5 + i % 90 for i in range(150)]
    asked = public.OutputOptions(top_logprobs=2, prompt_logprobs=True)
    for sequence_id, output in enumerate((asked, public.OutputOptions(top_logprobs=2))):
        stream.submit(sequence_id, token_ids=public.TokenIds(ids=prompt), output=output)
    await asyncio.gather(stream.end_of(0), stream.end_of(1))
    outputs = [output for frame in stream.frames for output in frame.outputs]
    entries = [list(output.prompt_logprobs) for output in outputs if output.sequence_id == 0]
    assert not any(output.prompt_logprobs for output in outputs if output.sequence_id == 1)
    # No step has more than 64 tokens
    assert sum(bool(piece) for piece in entries) >= 3 and max(map(len, entries)) <= 64
    found = [entry for piece in entries for entry in piece]
    expected = torch.log_softmax(Oracle(stack.folder, []).logits(prompt), -1)
    assert [entry.token_id for entry in found] == prompt[1:]
    for place, entry in enumerate(found):
        assert entry.logprob == pytest.approx(float(expected[place, entry.token_id]), abs=1e-4)
        assert [top.token_id for top in entry.top] == expected[place].topk(2).indices.tolist()
    assert stream.sequences[0].token_ids == stream.sequences[1].token_ids


async def test_a_drain_lets_open_sequences_finish_and_refuses_new_ones(stack: Stack) -> None:
    stream = await stack.stream()
    stream.submit(1, stopping=public.StoppingParams(max_output_tokens=150, ignore_eos=True))
    await stream.until(lambda: 1 in stream.started)
    draining = asyncio.create_task(stack.servicer.drain(20))
    await asyncio.sleep(0)
    stream.submit(2)
    assert (await stream.end_of(2)).failed.reason == "ENGINE_DRAINING"
    await draining
    await asyncio.wait_for(stream.reading, 10)
    assert stream.ended[1].finished.output_tokens == 150


async def test_an_engine_without_cache_refuses_adapters(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    async with running_stack(tiny_model("llama"), tmp_path, with_cache=False) as stack:
        stream = await stack.stream()
        stream.submit(1, digest="any")
        failed = (await stream.end_of(1)).failed
        assert (failed.code, failed.reason) == (9, "NO_ADAPTERS")


async def test_before_the_base_is_loaded_everything_is_unavailable() -> None:
    server = Server()
    engine_pb2_grpc.add_EngineServiceServicer_to_server(EngineServicer(), server.grpc)
    await server.start("127.0.0.1:0", [])
    async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        stub = engine_pb2_grpc.EngineServiceStub(channel)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.Tokenize(wire.TokenizeRequest())
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    await server.drain(0)
