"""Weights that come and go under load: every token is from the version its answer names, and a cold adapter is loaded once.

LORAPLEX_TEST_REQUESTS sets how many requests are sent while the name changes hands; a long run is 10,000.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from demo.catalog import load_catalog
from loraplex.v1 import generation_pb2, generation_pb2_grpc
from tests.e2e.conftest import ADAPTERS, Stack, free_port
from tests.e2e.test_oracle import greedy_choices
from tests.e2e.test_streams import chat

REQUESTS = int(os.environ.get("LORAPLEX_TEST_REQUESTS", "300"))
TOKENS = 6
PROMPT = "Tell me about the sea."
VERSIONS = [entry.id for entry in load_catalog().adapters[:4]]


@pytest.fixture(scope="module")
def small_device(make_stack: Callable[..., Stack]) -> Stack:
    """A stack whose device holds two or three of the adapters."""
    stack = make_stack(LORAPLEX_ENGINE_ADAPTER_MEMORY_MIB="20")
    for name in VERSIONS:
        stack.register(name, ADAPTERS / name)
    return stack


def ask(stub: generation_pb2_grpc.GenerationServiceStub, name: str) -> generation_pb2.GenerateResponse:
    request = chat(PROMPT, name, max_output_tokens=TOKENS, ignore_eos=True)
    answer: generation_pb2.GenerateResponse = stub.Generate(request, timeout=120)
    return answer


def test_no_token_of_another_version_while_a_name_changes_weights_under_load(small_device: Stack, base: Path) -> None:
    with small_device.channel() as channel, ThreadPoolExecutor(8) as pool:
        stub = generation_pb2_grpc.GenerationServiceStub(channel)
        # Given what each version answers, which is what PEFT says
        alone = {name: ask(stub, name) for name in VERSIONS}
        assert_as_peft(alone, base)
        right = {answer.completion.adapter_digest: list(answer.token_ids) for answer in alone.values()}
        assert len({tuple(tokens) for tokens in right.values()}) == len(VERSIONS), "a wrong version could not be told"
        small_device.register("turns", ADAPTERS / VERSIONS[0])
        # When one name goes from version to version while it and the others are asked for
        over = threading.Event()
        turns = Counter[str]()

        def turn() -> None:
            for name in itertools.cycle(VERSIONS):
                if over.wait(0.2):
                    return
                turns[small_device.register("turns", ADAPTERS / name).digest] += 1

        registrar = threading.Thread(target=turn)
        registrar.start()
        names = ["turns" if number % 4 else VERSIONS[number // 4 % len(VERSIONS)] for number in range(REQUESTS)]
        answers = list(pool.map(lambda name: (name, ask(stub, name)), names))
        over.set()
        registrar.join()
        # Then every answer is wholly that of the version it names
        assert all(list(answer.token_ids) == right[answer.completion.adapter_digest] for _, answer in answers)
        # Names that stayed answered as themselves, and the other as several
        for name in VERSIONS:
            digests = {answer.completion.adapter_digest for asked, answer in answers if asked == name}
            assert digests == {alone[name].completion.adapter_digest}
        seen = {answer.completion.adapter_digest for asked, answer in answers if asked == "turns"}
        assert len(seen) > 1 and seen <= right.keys() and sum(turns.values()) > 3


@torch.inference_mode()
def assert_as_peft(answers: dict[str, generation_pb2.GenerateResponse], base: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(base)
    text: Any = tokenizer.apply_chat_template(
        [{"role": "user", "content": PROMPT}], add_generation_prompt=True, tokenize=False
    )
    prompt = tokenizer(text, add_special_tokens=False)["input_ids"]
    for name, answer in answers.items():
        model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        model = PeftModel.from_pretrained(model, ADAPTERS / name)
        assert greedy_choices(model, prompt, list(answer.token_ids)) == list(answer.token_ids), name


def test_a_thousand_requests_for_one_cold_adapter_load_it_once(make_stack: Callable[..., Stack]) -> None:
    port = free_port()
    stack = make_stack(LORAPLEX_CACHE_METRICS_LISTEN=f"127.0.0.1:{port}", LORAPLEX_ROUTER_MAX_QUEUED_PER_TENANT="2000")
    stack.ports["cache_metrics"] = port
    stack.register("cold", ADAPTERS / VERSIONS[0])
    assert stack.metric("cache", "loraplex_cache_loads_total") == 0

    async def ask_all() -> list[generation_pb2.GenerateResponse]:
        async with grpc.aio.insecure_channel(stack.address("router")) as channel:
            stub: generation_pb2_grpc.GenerationServiceAsyncStub = generation_pb2_grpc.GenerationServiceStub(channel)
            request = chat(PROMPT, "cold", max_output_tokens=1, ignore_eos=True)
            return list(await asyncio.gather(*(stub.Generate(request, timeout=250) for _ in range(1000))))

    answers = asyncio.run(ask_all())
    assert len({tuple(answer.token_ids) for answer in answers}) == 1
    # Registering has read it from its source, once; nobody has since, and it went to the device once
    assert stack.metric("cache", "loraplex_cache_loads_total") == 1
    assert stack.metric("cache", r'loraplex_cache_fetches_total\{outcome="ok"\}') == 1
