"""Streams: equal to the unary answer, joined and left while others run."""

from __future__ import annotations

import itertools
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from demo.catalog import load_catalog
from loraplex.v1 import adapter_pb2, generation_pb2, generation_pb2_grpc
from tests.e2e.conftest import ADAPTERS, Stack, wait_until

Stub = generation_pb2_grpc.GenerationServiceStub


def chat(prompt: str, adapter_id: str = "", **stopping: object) -> generation_pb2.GenerateRequest:
    stopping.setdefault("max_output_tokens", 32)
    return generation_pb2.GenerateRequest(
        adapter_id=adapter_id,
        chat=generation_pb2.Chat(messages=[generation_pb2.ChatMessage(role="user", content=prompt)]),
        stopping=generation_pb2.StoppingParams(**stopping),  # type: ignore[arg-type]
    )


def joined(stub: Stub, request: generation_pb2.GenerateRequest) -> tuple[str, list[int], generation_pb2.Completion]:
    """A stream's text, token ids and completion; checks that the completion is the last message and the only one."""
    events = list(stub.StreamGenerate(request, timeout=120))
    assert [event.WhichOneof("event") for event in events[:-1]] == ["delta"] * (len(events) - 1)
    assert events[-1].WhichOneof("event") == "completion"
    text = "".join(event.delta.text for event in events)
    return text, [token for event in events for token in event.delta.token_ids], events[-1].completion


def assert_same_unary_and_streamed(
    stub: Stub, request: generation_pb2.GenerateRequest
) -> generation_pb2.GenerateResponse:
    unary = stub.Generate(request, timeout=120)
    text, token_ids, completion = joined(stub, request)
    assert text.encode() == unary.text.encode()
    assert token_ids == list(unary.token_ids)
    assert completion.finish_reason == unary.completion.finish_reason
    assert completion.stop_match == unary.completion.stop_match
    assert completion.usage.prompt_tokens == unary.completion.usage.prompt_tokens
    assert completion.usage.output_tokens == unary.completion.usage.output_tokens
    return unary


def test_unary_and_stream_agree_for_every_demo_adapter(generation: Stub) -> None:
    for entry in load_catalog().adapters:
        answer = assert_same_unary_and_streamed(generation, chat(entry.prompt, entry.id))
        assert answer.text and answer.completion.adapter_id == entry.id and len(answer.completion.adapter_digest) == 64


def test_unary_and_stream_agree_on_characters_of_many_bytes(generation: Stub) -> None:
    # Given sampling pushed to tokens that are single bytes of longer characters
    request = chat(
        "Say something in Chinese, Greek and emoji: 你好, καλημέρα, 🦜🔥", max_output_tokens=48, ignore_eos=True
    )
    request.sampling.temperature = 1.5
    request.sampling.seed = 7
    # Then the joined stream is the unary answer, byte for byte
    answer = assert_same_unary_and_streamed(generation, request)
    assert len(answer.text.encode()) >= len(answer.text)


def test_stop_strings_split_over_tokens_end_the_answer_where_they_first_appear(generation: Stub) -> None:
    # Given an answer and every few-character piece of it as a stop string
    whole = generation.Generate(chat("Name three colours of the rainbow."), timeout=120).text
    assert len(whole) > 24
    for start, length in itertools.product((3, 9, 14), (1, 4, 9)):
        stop = whole[start : start + length]
        for include in (False, True):
            # When it is asked for with that stop string
            request = chat("Name three colours of the rainbow.", stop=[stop], include_stop=include)
            answer = assert_same_unary_and_streamed(generation, request)
            # Then the text ends at its first appearance
            end = whole.index(stop) + (len(stop) if include else 0)
            assert answer.text == whole[:end]
            assert answer.completion.finish_reason == generation_pb2.FINISH_REASON_STOP
            assert answer.completion.stop_match == stop


def test_the_same_seed_gives_the_same_answer_in_any_company(generation: Stub) -> None:
    request = chat("Tell me a short story.", max_output_tokens=24)
    request.sampling.temperature = 1.0
    request.sampling.seed = 42
    alone = generation.Generate(request, timeout=120).token_ids
    company = [generation.Generate.future(chat(f"Count to {n}.", entry.id), timeout=120)
               for n, entry in enumerate(load_catalog().adapters)]  # fmt: skip
    assert generation.Generate(request, timeout=120).token_ids == alone
    for call in company:
        call.result()


def test_adapters_are_registered_while_others_stream(stack: Stack, generation: Stub) -> None:
    # Given four streams under way
    entries = load_catalog().adapters
    results: dict[int, int] = {}

    def stream(number: int) -> None:
        request = chat("Write a long story about the sea.", entries[number].id, max_output_tokens=120, ignore_eos=True)
        results[number] = len(joined(generation, request)[1])

    threads = [threading.Thread(target=stream, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    wait_until(lambda: stack.metric("engine", "loraplex_engine_running_sequences") >= 4, 30, "four streams run")

    # When new adapters are registered and asked at once
    for number, entry in enumerate(entries[:2]):
        folder = stack.incoming / f"late-{number}"
        shutil.copytree(ADAPTERS / entry.id, folder)
        adapter = stack.register(f"late-{number}", folder)
        assert adapter.state == adapter_pb2.Adapter.STATE_ACTIVE
        # Then they answer as the same weights do under their other name
        late = generation.Generate(chat(entry.prompt, f"late-{number}"), timeout=120)
        assert late.text == generation.Generate(chat(entry.prompt, entry.id), timeout=120).text

    # And no stream failed
    for thread in threads:
        thread.join()
    assert results == dict.fromkeys(range(4), 120)


@pytest.mark.parametrize("leave", ["cancel", "deadline"])
def test_a_client_that_leaves_is_gone_from_the_engine_within_two_steps(
    stack: Stack, generation: Stub, leave: str
) -> None:
    # Given one stream that would go on for long, and one that keeps the engine stepping
    keeper = generation.StreamGenerate(chat("Count for ever.", max_output_tokens=400, ignore_eos=True), timeout=200)
    next(keeper)
    timeout = 2.0 if leave == "deadline" else 200.0
    stream: Iterator[generation_pb2.StreamGenerateResponse] = generation.StreamGenerate(
        chat("Write a very long story.", max_output_tokens=1000, ignore_eos=True), timeout=timeout
    )
    next(stream)
    wait_until(lambda: stack.metric("engine", "loraplex_engine_running_sequences") == 2, 20, "both run")

    # When its client leaves
    if leave == "cancel":
        stream.cancel()  # type: ignore[attr-defined]
    else:
        with pytest.raises(Exception, match=r"(?i)deadline"):
            list(stream)
    started = stack.metric("engine", "loraplex_engine_steps_total")

    # Then the engine is without it two steps after it could have heard of it
    wait_until(lambda: stack.metric("engine", "loraplex_engine_running_sequences") <= 1, 20, "the sequence is gone")
    steps = stack.metric("engine", "loraplex_engine_steps_total") - started
    assert steps <= 2 + 1, "one more than two: the two readings of the counter are not of one moment"
    keeper.cancel()
    wait_until(lambda: stack.metric("engine", "loraplex_engine_running_sequences") == 0, 20, "all gone")


def test_a_receipt_tells_what_happened(generation: Stub) -> None:
    entry = load_catalog().adapters[0]
    began = time.monotonic()
    completion = generation.Generate(chat(entry.prompt, entry.id, max_output_tokens=8), timeout=60).completion
    elapsed = time.monotonic() - began
    receipt = completion.receipt
    first, total = receipt.time_to_first_token.ToNanoseconds() / 1e9, receipt.total.ToNanoseconds() / 1e9
    assert 0 < first <= total <= elapsed
    assert receipt.engine_id == "engine-0"
    assert receipt.adapter_tier in ("disk", "host", "device")
    usage = completion.usage
    assert receipt.charge >= usage.prompt_tokens - usage.cached_prompt_tokens + usage.output_tokens
    assert usage.prompt_tokens > 0 and 0 < usage.output_tokens <= 8
    assert completion.request_id


def test_a_prompt_that_was_there_before_is_cheaper_under_the_same_adapter_only(generation: Stub, stack: Stack) -> None:
    # Given a prompt of several blocks that nobody has asked before
    adapters = load_catalog().adapters
    prompt = "Of all that is written on this page, " * 8
    found = stack.metric("engine", "loraplex_engine_prefix_cache_hit_tokens_total")

    def ask(adapter_id: str) -> generation_pb2.Completion:
        stopping = generation_pb2.StoppingParams(max_output_tokens=4, ignore_eos=True)
        request = generation_pb2.GenerateRequest(adapter_id=adapter_id, text=prompt, stopping=stopping)
        return generation.Generate(request, timeout=60).completion

    # When it is asked twice under one adapter and once under another
    first, again, other = ask(adapters[0].id), ask(adapters[0].id), ask(adapters[1].id)
    # Then the second time all of its full blocks are found, and charged to nobody
    assert (first.usage.cached_prompt_tokens, other.usage.cached_prompt_tokens) == (0, 0)
    assert 16 <= again.usage.cached_prompt_tokens == (again.usage.prompt_tokens - 1) // 16 * 16
    assert again.receipt.charge == first.receipt.charge - again.usage.cached_prompt_tokens
    after = stack.metric("engine", "loraplex_engine_prefix_cache_hit_tokens_total")
    assert after - found == again.usage.cached_prompt_tokens


def test_logs_hold_no_traceback(stack: Stack) -> None:
    for name in ("cache", "engine", "router"):
        assert "Traceback" not in stack.log(name), stack.log(name)[-3000:]


def test_no_half_artifacts_are_left(stack: Stack) -> None:
    left: list[Path] = [path for root in (stack.folder / "data", stack.host_tier) for path in root.rglob("*tmp*")]
    assert not left
