"""Numbers from outside: transformers + PEFT, one adapter alone, against everything in one batch over gRPC."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from demo.catalog import load_catalog
from loraplex.v1 import generation_pb2, generation_pb2_grpc
from tests.e2e.conftest import ADAPTERS, Stack

OUTPUT_TOKENS = 48


def request_for(adapter_id: str, prompt: str) -> generation_pb2.GenerateRequest:
    return generation_pb2.GenerateRequest(
        adapter_id=adapter_id,
        chat=generation_pb2.Chat(messages=[generation_pb2.ChatMessage(role="user", content=prompt)]),
        stopping=generation_pb2.StoppingParams(max_output_tokens=OUTPUT_TOKENS, ignore_eos=True),
    )


@torch.inference_mode()
def greedy(model: torch.nn.Module, prompt_ids: list[int]) -> list[int]:
    """Greedy continuation, without any end-of-sequence handling of a library in between."""
    ids, cache, answer = torch.tensor([prompt_ids]), None, []
    for _ in range(OUTPUT_TOKENS):
        out = model(input_ids=ids, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        answer.append(int(out.logits[0, -1].argmax()))
        ids = torch.tensor([[answer[-1]]])
    return answer


def oracle(base: Path) -> dict[tuple[str, str], list[int]]:
    catalog = load_catalog()
    tokenizer = AutoTokenizer.from_pretrained(base)

    def prompt_ids(prompt: str) -> list[int]:
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, tokenize=False
        )
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    plain: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    expected = {("", prompt): greedy(plain, prompt_ids(prompt)) for prompt in catalog.base_oracle_prompts}
    for entry in catalog.adapters:
        model: Any = PeftModel.from_pretrained(plain, ADAPTERS / entry.id)
        for prompt in entry.oracle_prompts:
            expected[entry.id, prompt] = greedy(model, prompt_ids(prompt))
        plain = model.unload()
    return expected


def test_every_adapter_answers_as_peft_does_with_that_adapter_alone(stack: Stack, base: Path) -> None:
    # Given what each adapter answers alone
    expected = oracle(base)
    assert len(expected) >= 18

    # When all prompts run at once through one engine
    with stack.channel() as channel, ThreadPoolExecutor(len(expected)) as pool:
        stub = generation_pb2_grpc.GenerationServiceStub(channel)
        answers = pool.map(lambda key: stub.Generate(request_for(*key), timeout=250), expected)

        # Then every answer has the same token ids
        wrong = {
            key: (list(answer.token_ids), expected[key])
            for key, answer in zip(expected, answers, strict=True)
            if list(answer.token_ids) != expected[key]
        }
    assert not wrong
