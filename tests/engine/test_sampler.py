from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from engine.sampler import History, Sampled, SampleRow, Sampling, sample, uniform

VOCAB = 50


def row(
    tokens: list[int] | None = None, prompt_length: int = 1, forbidden: Any = frozenset(), **given: Any
) -> SampleRow:
    """A row whose sequence has these tokens, `prompt_length` of them the prompt."""
    tokens = tokens or [1]
    history = History(Sampling(**given), tokens[:prompt_length])
    for token in tokens[prompt_length:]:
        history.push(token)
    return SampleRow(Sampling(**given), len(tokens), history, forbidden)


def logits(seed: int, rows: int = 1, vocab: int = VOCAB) -> torch.Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * 2


def token(result: Sampled | None) -> int:
    assert result is not None
    return result.token


def test_greedy_takes_the_largest_and_the_lowest_of_equals() -> None:
    values = torch.tensor([[0.0, 3.0, 1.0, 3.0], [5.0, 5.0, 5.0, 5.0]])
    assert [token(result) for result in sample(values, [row(), row()])] == [1, 0]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_row_that_is_not_finite_fails_alone(bad: float) -> None:
    values = logits(0, 3)
    expected = values.argmax(-1).tolist()
    values[1, 7] = bad
    for temperature in (0.0, 1.0):
        found = sample(values.clone(), [row(), row(temperature=temperature), row()])
        assert found[1] is None
        assert [token(found[0]), token(found[2])] == [expected[0], expected[2]]


def test_a_token_may_have_no_chance_at_all() -> None:
    values = logits(0)
    values[0, 3:] = float("-inf")
    assert token(sample(values, [row(temperature=1.0)])[0]) < 3


rows_given = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([0.0, 0.2, 1.0, 3.0]),
        "top_k": st.sampled_from([0, 1, 5, 49, 1000]),
        "top_p": st.sampled_from([1.0, 0.9, 0.3, 1e-6]),
        "min_p": st.sampled_from([0.0, 0.05, 1.0]),
        "seed": st.integers(-(2**63), 2**63 - 1),
        "repetition_penalty": st.sampled_from([1.0, 1.3]),
        "frequency_penalty": st.sampled_from([0.0, 0.7]),
        "presence_penalty": st.sampled_from([0.0, -0.5]),
        "top_logprobs": st.sampled_from([0, 2]),
    }
)


@settings(max_examples=150, deadline=None)
@given(st.lists(rows_given, min_size=1, max_size=6), st.integers(0, 100))
def test_a_row_gets_the_same_token_alone_and_in_any_batch(given_rows: list[dict[str, Any]], seed: int) -> None:
    rows = [row(list(range(i + 2)), 2, **each) for i, each in enumerate(given_rows)]
    values = logits(seed, len(rows))
    together = sample(values.clone(), rows)
    for index, each in enumerate(rows):
        assert sample(values[index : index + 1].clone(), [each]) == [together[index]]


@settings(max_examples=60, deadline=None)
@given(rows_given, st.integers(0, 100))
def test_what_can_be_drawn_is_what_transformers_would_keep(options: dict[str, Any], seed: int) -> None:
    options |= {"frequency_penalty": 0.0, "presence_penalty": 0.0, "temperature": options["temperature"] or 1.0}
    tokens = [3, 4, 5]
    values = logits(seed)
    warpers = LogitsProcessorList(
        [
            RepetitionPenaltyLogitsProcessor(options["repetition_penalty"]),
            TemperatureLogitsWarper(options["temperature"]),
            TopKLogitsWarper(min(options["top_k"] or VOCAB, VOCAB)),
            TopPLogitsWarper(options["top_p"]),
            MinPLogitsWarper(options["min_p"]),
        ]
    )
    kept = torch.isfinite(warpers(torch.LongTensor([tokens]), torch.FloatTensor(values.clone())))[0]
    for seed in range(40):
        drawn = token(sample(values.clone(), [row(tokens, 3, **(options | {"seed": seed}))])[0])
        assert kept[drawn]


def test_tokens_are_drawn_as_often_as_they_are_likely() -> None:
    values = torch.log(torch.tensor([[0.5, 0.3, 0.2]]))
    draws = [token(sample(values.clone(), [row(temperature=1.0, seed=seed)])[0]) for seed in range(3000)]
    shares = [draws.count(i) / len(draws) for i in range(3)]
    assert shares == pytest.approx([0.5, 0.3, 0.2], abs=0.03)


def test_a_wide_nucleus_is_found_in_a_large_vocabulary() -> None:
    # Given a nearly flat distribution, whose nucleus is wider than the first looks
    values = logits(1, vocab=9000) * 0.01
    reference = TopPLogitsWarper(0.95)(torch.tensor([[1]]), values.clone())
    kept = torch.isfinite(reference)[0]
    assert int(kept.sum()) > 4096
    for seed in range(30):
        assert kept[token(sample(values.clone(), [row(temperature=1.0, top_p=0.95, seed=seed)])[0])]


@pytest.mark.parametrize("temperature", [1e-30, 1e-3])
def test_a_tiny_temperature_is_greedy(temperature: float) -> None:
    values = logits(2)
    assert token(sample(values.clone(), [row(temperature=temperature, seed=5)])[0]) == int(values.argmax())


def test_the_random_number_depends_on_seed_and_position_only() -> None:
    numbers = {uniform(seed, position) for seed in range(-20, 20) for position in range(50)}
    assert len(numbers) == 40 * 50
    assert all(0 <= number < 1 for number in numbers)
    assert abs(sum(numbers) / len(numbers) - 0.5) < 0.03


def test_penalties_and_bias_come_before_logprobs_and_forbidden_tokens_after() -> None:
    values = torch.zeros(1, 4)
    asked = row(
        [0, 2, 2], 1, {1}, frequency_penalty=0.5, presence_penalty=1.0, logit_bias={1: 3.0, 3: -1.0}, top_logprobs=4
    )
    result = sample(values, [asked])[0]
    assert result is not None and result.logprob is not None
    expected = torch.log_softmax(torch.tensor([0.0, 3.0, -2.0, -1.0]), -1)
    assert result.token == 0
    assert [chosen for chosen, _ in result.logprob.top] == [1, 0, 3, 2]
    assert result.logprob.logprob == pytest.approx(float(expected[0]))
    assert [value for _, value in result.logprob.top] == pytest.approx(expected[[1, 0, 3, 2]].tolist())
