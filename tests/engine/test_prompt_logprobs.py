"""Log probabilities of prompts against transformers + PEFT, in chunks, after preemption, beside others."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.batch import Batch
from engine.flight import Runs
from engine.interrupts import Stop, never
from engine.logprobs import TokenLogprob, logprobs_of
from engine.lora import DeviceSegment
from engine.model import Base
from tests.engine.harness import Collected, InProcess, request, tiny_base
from tests.engine.tiny import Oracle, TinyAdapter, four_adapters

PROMPT = [(7 * i * i + 3) % 380 + 3 for i in range(90)]


@pytest.fixture(scope="module")
def adapters(tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> list[TinyAdapter]:
    return four_adapters(tiny_model("llama"), tmp_path_factory.mktemp("artifacts"), "llama")


@pytest.fixture(scope="module")
def oracle(tiny_model: Callable[[str], Path], adapters: list[TinyAdapter]) -> Oracle:
    return Oracle(tiny_model("llama"), adapters)


@pytest.fixture(scope="module")
def base(tiny_model: Callable[[str], Path]) -> Base:
    return tiny_base(tiny_model("llama"), context_length=128)


@dataclass
class WatchingRunner:
    """A runner that remembers the most logits it was asked for in one pass."""

    runner: Runs
    most: int = 0

    def __post_init__(self) -> None:
        self.pool, self.adapters = self.runner.pool, self.runner.adapters

    def run(self, batch: Batch, segments: list[DeviceSegment], stop: Stop = never) -> torch.Tensor:
        logits = self.runner.run(batch, segments, stop)
        self.most = max(self.most, len(logits))
        return logits


def with_(base: Base, **changed: object) -> Base:
    return base.__class__(**{name: getattr(base, name) for name in base.__slots__} | changed)


def told(collected: Collected) -> list[TokenLogprob]:
    return [entry for output in collected.outputs for entry in output.prompt_logprobs]


def assert_right(collected: Collected, oracle: Oracle, prompt: list[int], digest: str, top: int) -> None:
    expected = torch.log_softmax(oracle.logits(prompt, digest), -1)
    found = told(collected)
    assert [entry.token for entry in found] == prompt[1:]
    for place, entry in enumerate(found):
        assert abs(entry.logprob - float(expected[place, entry.token])) <= 1e-4
        best = expected[place].topk(top)
        assert [token for token, _ in entry.top] == best.indices.tolist()
        assert [value for _, value in entry.top] == pytest.approx(best.values.tolist(), abs=1e-4)
    # All of them come before or with the first token, and the first output says that it has started
    outputs = collected.outputs
    first = next(i for i, output in enumerate(outputs) if output.token_ids)
    assert not any(output.prompt_logprobs for output in outputs[first + 1 :])
    assert [output.started is not None for output in outputs] == [True] + [False] * (len(outputs) - 1)


@pytest.mark.parametrize("step_tokens", [6, 17, 128])
def test_they_are_the_oracles_in_chunks_of_any_size_beside_others(
    base: Base, oracle: Oracle, adapters: list[TinyAdapter], step_tokens: int
) -> None:
    digests = ["", adapters[2].digest, adapters[3].digest]
    cases = [(prompt, digest, top) for digest in digests for prompt, top in ((PROMPT, 3), (PROMPT[:2], 0), ([9], 2))]
    runner = WatchingRunner(base.runner)
    with InProcess(with_(base, runner=runner), max_sequences=6, step_tokens=step_tokens) as engine:
        engine.install(*adapters)
        plain = [request(PROMPT[:60], digest, max_output_tokens=8) for digest in digests]
        before = [each.token_ids for each in engine.run(*plain)]
        asked = [
            request(prompt, digest, top_logprobs=top, prompt_logprobs=True, max_output_tokens=4, eos_ids=frozenset())
            for prompt, digest, top in cases
        ]
        found = engine.run(*asked, *plain)
    for each, (prompt, digest, top) in zip(found, cases, strict=False):
        assert_right(each, oracle, prompt, digest, top)
    assert [each.token_ids for each in found[len(cases) :]] == before
    assert not any(told(each) for each in found[len(cases) :])
    # However long the prompt, no pass has more logits than the step has tokens
    assert runner.most <= step_tokens


@pytest.mark.parametrize(
    ("step_tokens", "older", "younger"), [(2, 20, 50), (11, 40, 40)], ids=["in prefill", "in decode"]
)
def test_they_are_told_once_although_they_are_computed_again(
    base: Base, oracle: Oracle, adapters: list[TinyAdapter], step_tokens: int, older: int, younger: int
) -> None:
    # Given room for one sequence of full length, and an older one that grows into what a younger one needs
    digest = adapters[3].digest
    with InProcess(with_(base, block_count=8), max_sequences=2, step_tokens=step_tokens) as engine:
        engine.install(*adapters)
        first = request([5] * older, max_output_tokens=60, eos_ids=frozenset())
        asked = request(PROMPT[:younger], digest, prompt_logprobs=True, max_output_tokens=60, eos_ids=frozenset())
        found = engine.run(first, asked)[1]
        assert engine.loop.load.free_blocks == 8
    assert found.finished.preemptions > 0
    assert_right(found, oracle, PROMPT[:younger], digest, 0)


def test_penalties_and_bias_do_not_touch_them(base: Base, oracle: Oracle) -> None:
    options: dict[str, Any] = {
        "temperature": 0.5,
        "repetition_penalty": 1.5,
        "presence_penalty": 1.0,
        "logit_bias": {5: 50.0},
    }
    with InProcess(base) as engine:
        found = engine.run(request(PROMPT, prompt_logprobs=True, top_logprobs=2, max_output_tokens=3, **options))[0]
    assert_right(found, oracle, PROMPT, "", 2)


def test_a_prompt_whose_logits_are_not_finite_ends_its_sequence_alone(base: Base) -> None:
    class Broken(WatchingRunner):
        def run(self, batch: Batch, segments: list[DeviceSegment], stop: Stop = never) -> torch.Tensor:
            logits = super().run(batch, segments, stop).clone()
            for index, row in enumerate(batch.scored):
                if row.sequence.tokens[0] == 13:
                    logits[len(batch.sampled) + index, 7] = float("nan")
            return logits

    with InProcess(with_(base, runner=Broken(base.runner)), step_tokens=24) as engine:
        made = [request([first, 8, 9, 10] * 20, prompt_logprobs=True) for first in (13, 14)]
        bad, good = engine.run(*made)
    assert bad.failed.error.reason == "BAD_LOGITS"
    assert good.finished and len(told(good)) == 79


def test_many_places_are_looked_at_in_slices_with_the_same_result() -> None:
    logits = torch.randn(150, 40, generator=torch.Generator().manual_seed(0))
    logits[70, 3] = float("inf")
    tokens, counts = [i % 40 for i in range(150)], [i % 3 for i in range(150)]
    found = logprobs_of(logits, tokens, counts)
    assert [i for i, entry in enumerate(found) if entry is None] == [70]
    assert found == [logprobs_of(logits[i : i + 1], tokens[i : i + 1], counts[i : i + 1])[0] for i in range(150)]
