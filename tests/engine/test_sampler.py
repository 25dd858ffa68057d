from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from engine.penalties import SeenTokens
from engine.sampler import History, Sampled, SampleRow, Sampling, invert, sample, uniform

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


def warped(options: dict[str, Any], tokens: list[int], values: torch.Tensor) -> torch.Tensor:
    """Scores as transformers would sample from."""
    warpers = LogitsProcessorList(
        [
            RepetitionPenaltyLogitsProcessor(options["repetition_penalty"]),
            TemperatureLogitsWarper(options["temperature"]),
            TopKLogitsWarper(min(options["top_k"] or values.shape[-1], values.shape[-1])),
            TopPLogitsWarper(options["top_p"]),
            MinPLogitsWarper(options["min_p"]),
        ]
    )
    return torch.as_tensor(warpers(torch.LongTensor([tokens]), torch.FloatTensor(values.clone())))[0]


@settings(max_examples=100, deadline=None)
@given(rows_given, st.integers(0, 100), st.sampled_from([1, 2, 50, 255, 256, 257, 512, 1000]))
def test_the_token_is_where_the_random_number_falls_in_what_transformers_would_draw_from(
    options: dict[str, Any], seed: int, vocab: int
) -> None:
    options |= {"frequency_penalty": 0.0, "presence_penalty": 0.0, "temperature": options["temperature"] or 1.0}
    tokens = [0, vocab // 2, vocab - 1]
    values = logits(seed, vocab=vocab)
    cumulative = torch.softmax(warped(options, tokens, values).double(), -1).cumsum(-1)
    rows = [row(tokens, 3, **(options | {"seed": seed})) for seed in range(40)]
    for seed, drawn in enumerate(sample(values.repeat(40, 1), rows)):
        place = uniform(seed, 3)
        chosen = token(drawn)
        # The oracle rounds in float32 where it cuts.
        assert cumulative[chosen] > place - 1e-5
        assert chosen == 0 or cumulative[chosen - 1] <= place + 1e-5


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(0, 11), max_size=30),
    st.integers(0, 5),
    st.sampled_from([0.5, 1.0, 1.3, 2.0]),
    st.sampled_from([0.0, 0.7, -0.4]),
    st.sampled_from([0.0, 1.1, -0.5]),
    st.dictionaries(st.integers(0, 11), st.floats(-5, 5), max_size=4),
)
def test_penalties_and_bias_are_as_transformers_and_openai_define_them(
    answer: list[int], prompt: int, repetition: float, frequency: float, presence: float, bias: dict[int, float]
) -> None:
    tokens = [*range(prompt + 1), *answer]
    values = logits(len(tokens), vocab=12)
    expected = RepetitionPenaltyLogitsProcessor(repetition)(torch.tensor([tokens]), torch.FloatTensor(values.clone()))
    for each in range(12):
        count = answer.count(each)
        expected[0, each] -= frequency * count + presence * (count > 0)
        expected[0, each] += bias.get(each, 0.0)
    options = {"repetition_penalty": repetition, "frequency_penalty": frequency, "presence_penalty": presence}
    asked = row(tokens, prompt + 1, logit_bias=bias, top_logprobs=12, **options)
    # Given other rows that ask for something else or nothing
    beside = [row([3, 3, 5], 1, presence_penalty=2.0), row(), asked, row(logit_bias={1: 9.0})]
    found = sample(values.repeat(4, 1), beside)[2]
    assert found is not None and found.logprob is not None
    logprobs = torch.log_softmax(expected[0], -1)
    assert dict(found.logprob.top) == pytest.approx(dict(enumerate(logprobs.tolist())), abs=1e-5)
    assert found.logprob.logprob == pytest.approx(float(logprobs.max()), abs=1e-5)


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


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from([0.0, 1e-38, 1e-20, 1e-7, 0.3, 1.0]), min_size=1, max_size=700), st.integers(0, 9))
def test_no_token_without_a_chance_is_drawn_however_sums_are_rounded(weights: list[float], where: int) -> None:
    weights[where % len(weights)] = 1.0
    for share in (0.0, 0.5, 1 - 2.0**-53):
        drawn = invert(torch.tensor([weights]), torch.tensor([[share]], dtype=torch.float64))
        assert weights[drawn[0]] > 0


class Operations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes the operations that see as many numbers as there are logits."""

    def __init__(self, size: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._size = size
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(isinstance(each, torch.Tensor) and each.numel() >= self._size for each in args):
            self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def operations(rows: list[SampleRow]) -> list[str]:
    values = logits(0, len(rows), 1000)
    noted = Operations(values.numel())
    with noted:
        assert all(sample(values, rows))
    return noted.names


def test_greedy_rows_cost_two_looks_at_their_logits() -> None:
    assert operations([row() for _ in range(8)]) == ["amax", "argmax"]


def test_how_many_operations_see_all_logits_does_not_depend_on_the_number_of_rows() -> None:
    options = {
        "temperature": 0.8, "top_k": 40, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 1.1,
        "frequency_penalty": 0.1, "logit_bias": {3: 1.0}, "top_logprobs": 5,
    }  # fmt: skip
    few, many = (operations([row([1, 2, 3], 1, {0}, **options) for _ in range(count)]) for count in (2, 60))
    assert few == many


@given(st.lists(st.integers(0, 200), max_size=300), st.lists(st.integers(0, 200), max_size=300))
def test_seen_tokens_are_counted_one_by_one(prompt: list[int], answer: list[int]) -> None:
    seen = SeenTokens(prompt)
    for each in answer:
        seen.push(each)
    counts = Counter(answer)
    assert dict(zip(seen.ids.tolist(), seen.counts.tolist(), strict=True)) == {
        each: counts[each] for each in {*prompt, *answer}
    }


def test_a_row_that_may_choose_nothing_fails_alone() -> None:
    values = torch.full((2, 4), float("-inf"))
    values[:, 2] = 1.0
    for temperature in (0.0, 1.0):
        found = sample(values.clone(), [row(None, 1, {2}, temperature=temperature), row(temperature=temperature)])
        assert found[0] is None and token(found[1]) == 2


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
