"""Every bad field is refused by its path; everything up to the limits is taken."""

from __future__ import annotations

import math
from typing import Any

import pytest

from loraplex.v1 import generation_pb2
from router.validation import Generation, Prompt, check_generation, check_prompt
from router.wire import generation_from
from servicekit.errors import InvalidField, NotImplementedYet

Request = generation_pb2.GenerateRequest
Sampling = generation_pb2.SamplingParams
Stopping = generation_pb2.StoppingParams
Chat = generation_pb2.Chat
Turn = generation_pb2.ChatMessage
NAN, INF = math.nan, math.inf


def ids(*values: int) -> generation_pb2.TokenIds:
    return generation_pb2.TokenIds(ids=values)


BAD: list[tuple[str, dict[str, Any]]] = [
    ("prompt", {}),
    ("text", {"text": ""}),
    ("text", {"text": "x" * (4 * 2**20 + 1)}),
    ("text", {"text": "é" * (2 * 2**20 + 1)}),
    ("request", {"token_ids": ids(*[2**31 - 1] * 1_700_000)}),
    ("token_ids.ids", {"token_ids": ids()}),
    ("token_ids.ids", {"token_ids": ids(1, -1, 2)}),
    ("chat.messages", {"chat": Chat()}),
    ("chat.messages[1].role", {"chat": Chat(messages=[Turn(role="user"), Turn(content="x")])}),
    ("chat", {"chat": Chat(messages=[Turn(role="user", content="x" * 2**21)] * 2)}),
    ("adapter_id", {"text": "x", "adapter_id": "../etc"}),
    ("adapter_id", {"text": "x", "adapter_id": "a" * 129}),
    ("adapter_id", {"text": "x", "adapter_id": "a\n"}),
    ("adapter_id", {"text": "x", "adapter_id": "ä"}),
    ("request_id", {"text": "x", "request_id": "r" * 129}),
    ("request_id", {"text": "x", "request_id": "a\nb"}),
    ("request_id", {"text": "x", "request_id": "é"}),
    *[("sampling.temperature", {"text": "x", "sampling": Sampling(temperature=v)}) for v in (-1, -1e-9, 101, NAN, INF)],
    *[("sampling.top_k", {"text": "x", "sampling": Sampling(top_k=v)}) for v in (0, -1)],
    *[("sampling.top_p", {"text": "x", "sampling": Sampling(top_p=v)}) for v in (0, -0.5, 2, NAN)],
    *[("sampling.min_p", {"text": "x", "sampling": Sampling(min_p=v)}) for v in (-0.1, 1.1, NAN)],
    *[
        ("sampling.repetition_penalty", {"text": "x", "sampling": Sampling(repetition_penalty=v)})
        for v in (0, -1, 101, NAN)
    ],
    *[
        ("sampling.frequency_penalty", {"text": "x", "sampling": Sampling(frequency_penalty=v)})
        for v in (-2.1, 2.1, NAN, INF)
    ],
    *[("sampling.presence_penalty", {"text": "x", "sampling": Sampling(presence_penalty=v)}) for v in (-3, 3, NAN)],
    ("sampling.logit_bias", {"text": "x", "sampling": Sampling(logit_bias=dict.fromkeys(range(1025), 1.0))}),
    ("sampling.logit_bias", {"text": "x", "sampling": Sampling(logit_bias={-1: 1.0})}),
    *[("sampling.logit_bias[7]", {"text": "x", "sampling": Sampling(logit_bias={7: v})}) for v in (-101, 101, NAN, INF)],
    *[
        ("stopping.max_output_tokens", {"text": "x", "stopping": Stopping(max_output_tokens=v)})
        for v in (0, -1)
    ],
    ("stopping.min_output_tokens", {"text": "x", "stopping": Stopping(min_output_tokens=-1)}),
    ("stopping.min_output_tokens", {"text": "x", "stopping": Stopping(min_output_tokens=6, max_output_tokens=5)}),
    ("stopping.stop", {"text": "x", "stopping": Stopping(stop=["s"] * 65)}),
    ("stopping.stop[1]", {"text": "x", "stopping": Stopping(stop=["s", ""])}),
    ("stopping.stop[0]", {"text": "x", "stopping": Stopping(stop=["é" * 129])}),
    ("stopping.stop_token_ids", {"text": "x", "stopping": Stopping(stop_token_ids=[1] * 65)}),
    ("stopping.stop_token_ids[0]", {"text": "x", "stopping": Stopping(stop_token_ids=[-1])}),
    ("output.top_logprobs", {"text": "x", "output": generation_pb2.OutputOptions(top_logprobs=-1)}),
    ("output.top_logprobs", {"text": "x", "output": generation_pb2.OutputOptions(top_logprobs=21)}),
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(BAD)), ids=lambda n: f"{n}-{BAD[n][0]}")
def test_a_bad_field_is_named_with_its_value_and_limit(number: int) -> None:
    path, fields = BAD[number]
    with pytest.raises(InvalidField) as caught:
        check_generation(generation_from(Request(**fields)))
    assert caught.value.metadata["field"] == path
    assert caught.value.metadata.keys() == {"field", "value", "limit"}
    assert len(caught.value.message) < 300


@pytest.mark.parametrize(
    "path, request_",
    [
        ("constraint", Request(text="x", constraint=generation_pb2.Constraint(json_object=True))),
        ("constraint", Request(text="x", constraint=generation_pb2.Constraint())),
    ],
)
def test_a_field_that_is_not_served_yet_is_named(path: str, request_: Request) -> None:
    with pytest.raises(NotImplementedYet) as caught:
        check_generation(generation_from(request_))
    assert caught.value.metadata == {"field": path}


GOOD = [
    Request(text="x"),
    Request(text="x" * (4 * 2**20)),
    Request(token_ids=ids(0, 2**31 - 1)),
    Request(chat=Chat(messages=[Turn(role="user"), Turn(role="tool", content="x")])),
    Request(text="x", adapter_id="Org/a.b_c-1", request_id="r" * 128),
    Request(text="x", sampling=Sampling()),
    Request(
        text="x",
        sampling=Sampling(
            temperature=0, top_k=1, top_p=1, min_p=0, seed=-(2**63), repetition_penalty=1e-6, frequency_penalty=-2,
            presence_penalty=2, logit_bias=dict.fromkeys(range(1024), -100.0),
        ),
    ),
    Request(text="x", sampling=Sampling(temperature=100, top_p=1e-9, min_p=1, repetition_penalty=100)),
    Request(
        text="x",
        stopping=Stopping(
            max_output_tokens=5, min_output_tokens=5, stop=["é" * 128] * 64, stop_token_ids=[0] * 64, ignore_eos=True
        ),
    ),
    Request(text="x", stopping=Stopping(min_output_tokens=10**6)),
    Request(text="x", output=generation_pb2.OutputOptions(top_logprobs=20, prompt_logprobs=True)),
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(GOOD)))
def test_everything_up_to_the_limits_is_taken(number: int) -> None:
    check_generation(generation_from(GOOD[number]))


def test_a_prompt_to_tokenise_may_be_empty() -> None:
    check_prompt(Prompt(text=""), may_be_empty=True)
    with pytest.raises(InvalidField):
        check_prompt(Prompt(), may_be_empty=True)


def test_the_estimate_of_a_prompt_grows_with_it() -> None:
    assert Prompt(token_ids=(1, 2, 3)).estimated_tokens() == 3
    assert Prompt(text="x" * 400).estimated_tokens() == 105
    assert Prompt(chat=(("user", "x" * 40), ("assistant", "y" * 40))).estimated_tokens() == 29
    assert Generation(Prompt()).prompt.estimated_tokens() > 0
