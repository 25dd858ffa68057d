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
def greedy_choices(model: Any, prompt_ids: list[int], answer: list[int]) -> list[int]:
    """What the model chooses greedily after the prompt and after each token of the answer but the last.

    Equal to the answer exactly when greedy generation gives the answer, by induction over its tokens; one pass instead
    of one for each token.
    """
    logits = model(input_ids=torch.tensor([prompt_ids + answer[:-1]])).logits[0]
    return [int(token) for token in logits[len(prompt_ids) - 1 :].argmax(-1)]


def test_every_adapter_answers_as_peft_does_with_that_adapter_alone(stack: Stack, base: Path) -> None:
    # Given three prompts for the base and for every adapter
    catalog = load_catalog()
    prompts = {entry.id: entry.oracle_prompts for entry in catalog.adapters}
    prompts[""] = catalog.base_oracle_prompts
    keys = [(adapter_id, prompt) for adapter_id, texts in prompts.items() for prompt in texts]
    assert len(keys) >= 18

    # When all of them run at once through one engine
    with stack.channel() as channel, ThreadPoolExecutor(len(keys)) as pool:
        stub = generation_pb2_grpc.GenerationServiceStub(channel)
        calls = pool.map(lambda key: stub.Generate(request_for(*key), timeout=250), keys)
        answers = {key: list(answer.token_ids) for key, answer in zip(keys, calls, strict=True)}
    assert {len(answer) for answer in answers.values()} == {OUTPUT_TOKENS}

    # Then transformers + PEFT, each adapter alone in float32, choose the same tokens
    tokenizer = AutoTokenizer.from_pretrained(base)
    wrong: dict[tuple[str, str], tuple[list[int], list[int]]] = {}
    for adapter_id in prompts:
        model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        model = PeftModel.from_pretrained(model, ADAPTERS / adapter_id) if adapter_id else model
        for prompt in prompts[adapter_id]:
            messages = [{"role": "user", "content": prompt}]
            text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
            answer = answers[adapter_id, prompt]
            chosen = greedy_choices(model, tokenizer(text, add_special_tokens=False)["input_ids"], answer)
            if chosen != answer:
                wrong[adapter_id, prompt] = (answer, chosen)
    assert not wrong


def test_log_probabilities_of_a_prompt_are_those_of_peft_streamed_or_not(stack: Stack, base: Path) -> None:
    adapter_id = load_catalog().adapters[0].id
    text = "Once upon a time, in a village by the sea, there lived a parrot who knew every song. " * 3
    asked = generation_pb2.GenerateRequest(
        adapter_id=adapter_id,
        text=text,
        stopping=generation_pb2.StoppingParams(max_output_tokens=4, ignore_eos=True),
        output=generation_pb2.OutputOptions(prompt_logprobs=True, top_logprobs=2),
    )
    with stack.channel() as channel:
        stub = generation_pb2_grpc.GenerationServiceStub(channel)
        found = stub.Generate(asked, timeout=120).prompt_logprobs
        # What the first request left in the prefix cache is not used: its logits are gone
        again = [entry for event in stub.StreamGenerate(asked, timeout=120) for entry in event.delta.prompt_logprobs]
    prompt = AutoTokenizer.from_pretrained(base)(text)["input_ids"]
    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), ADAPTERS / adapter_id
    )
    with torch.inference_mode():
        expected = torch.log_softmax(model(input_ids=torch.tensor([prompt])).logits[0].float(), -1)
    assert [entry.token_id for entry in found] == [entry.token_id for entry in again] == prompt[1:]
    for entries in (found, again):
        for place, entry in enumerate(entries):
            assert abs(entry.logprob - float(expected[place, entry.token_id])) <= 1e-4
            assert [abs(top.logprob - float(expected[place, top.token_id])) <= 1e-4 for top in entry.top] == [True] * 2
