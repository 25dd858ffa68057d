"""Weights that come and go under load: every token is from the version its answer names, and a cold adapter is loaded once.

LORAPLEX_TEST_REQUESTS sets how many requests are sent while the name changes hands; a long run is 10,000.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import shutil
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
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

REQUESTS = int(os.environ.get("LORAPLEX_TEST_REQUESTS", "120"))
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
    answer: generation_pb2.GenerateResponse = stub.Generate(request, timeout=60)
    return answer


@contextmanager
def turning(stack: Stack, name: str) -> Iterator[Counter[str]]:
    """Has a name go from version to version while the block runs; counts the digests that it stood for."""
    over = threading.Event()
    turns = Counter[str]()

    def turn() -> None:
        for version in itertools.cycle(VERSIONS):
            turns[stack.register(name, ADAPTERS / version).digest] += 1
            if over.wait(0.1):
                return

    with ThreadPoolExecutor(1) as registrar:
        turned = registrar.submit(turn)
        try:
            yield turns
        finally:
            over.set()
        turned.result()


def test_no_token_of_another_version_while_a_name_changes_weights_under_load(small_device: Stack, base: Path) -> None:
    with small_device.channel() as channel, ThreadPoolExecutor(8) as pool:
        stub = generation_pb2_grpc.GenerationServiceStub(channel)
        # Given what each version answers, which is what PEFT says
        alone = {name: ask(stub, name) for name in VERSIONS}
        assert_as_peft(alone, base)
        digests = {name: answer.completion.adapter_digest for name, answer in alone.items()}
        right = {digests[name]: list(answer.token_ids) for name, answer in alone.items()}
        assert len({tuple(tokens) for tokens in right.values()}) == len(VERSIONS), "a wrong version could not be told"
        small_device.register("turns", ADAPTERS / VERSIONS[0])

        def answered_by(name: str) -> str:
            """The version that answered, wholly."""
            answer = ask(stub, name)
            digest = answer.completion.adapter_digest
            assert list(answer.token_ids) == right[digest], f"{name} as {digest[:12]}: {list(answer.token_ids)}"
            # A name that stays is answered as itself.
            assert name == "turns" or digest == digests[name]
            return digest

        # When one name goes from version to version while it and the others are asked for
        names = ["turns" if number % 4 else VERSIONS[number // 4 % len(VERSIONS)] for number in range(REQUESTS)]
        with turning(small_device, "turns") as turns:
            seen = Counter(zip(names, pool.map(answered_by, names), strict=True))
        # Then every answer is right, and the name was answered as each of the versions
        assert {digest for name, digest in seen if name == "turns"} == set(turns) == set(right)


@torch.inference_mode()
def assert_as_peft(answers: dict[str, generation_pb2.GenerateResponse], base: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(base)
    text: Any = tokenizer.apply_chat_template(
        [{"role": "user", "content": PROMPT}], add_generation_prompt=True, tokenize=False
    )
    prompt = tokenizer(text, add_special_tokens=False)["input_ids"]
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    first, *others = answers
    model = PeftModel.from_pretrained(model, ADAPTERS / first, adapter_name=first)
    for name in others:
        model.load_adapter(ADAPTERS / name, adapter_name=name)
    for name, answer in answers.items():
        model.set_adapter(name)
        assert greedy_choices(model, prompt, list(answer.token_ids)) == list(answer.token_ids), name


def test_a_thousand_requests_for_one_cold_adapter_fetch_it_once_and_load_it_once(
    make_stack: Callable[..., Stack],
) -> None:
    # Given an adapter that is registered and on no tier of the node
    port = free_port()
    stack = make_stack(LORAPLEX_CACHE_METRICS_LISTEN=f"127.0.0.1:{port}", LORAPLEX_ROUTER_MAX_QUEUED_PER_TENANT="2000")
    stack.ports["cache_metrics"] = port
    stack.register("cold", ADAPTERS / VERSIONS[0])
    stack.kill("cache", signal.SIGTERM)
    for tier in (stack.folder / "data" / "artifacts", stack.host_tier):
        shutil.rmtree(tier)
    stack.start("cache")
    stack.wait_ready("cache")

    async def ask_all() -> list[generation_pb2.GenerateResponse]:
        async with grpc.aio.insecure_channel(stack.address("router")) as channel:
            stub: generation_pb2_grpc.GenerationServiceAsyncStub = generation_pb2_grpc.GenerationServiceStub(channel)
            stopping = generation_pb2.StoppingParams(max_output_tokens=1, ignore_eos=True)
            request = generation_pb2.GenerateRequest(adapter_id="cold", text="The sea", stopping=stopping)
            return list(await asyncio.gather(*(stub.Generate(request, timeout=120) for _ in range(1000))))

    # When a thousand ask for it at once
    answers = asyncio.run(ask_all())
    assert len({tuple(answer.token_ids) for answer in answers}) == 1
    # Then its source was read once since then, and it went to the device once
    assert stack.metric("cache", r'loraplex_cache_fetches_total\{outcome="ok"\}') == 1
    assert stack.metric("cache", "loraplex_cache_loads_total") == 1
