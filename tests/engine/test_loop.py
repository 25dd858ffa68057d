"""The loop in this process: sharing a batch, losing blocks or sitting beside a failure changes nobody's tokens."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from engine.answer import FinishReason
from engine.batch import Batch
from engine.flight import Runs
from engine.interrupts import Stop, never
from engine.lora import DeviceSegment
from engine.messages import Cancel, Evict, Evicted, Submit, Usage
from tests.engine.harness import Collected, InProcess, Router, request, tiny_base
from tests.engine.tiny import TinyAdapter, four_adapters, write_artifact


@pytest.fixture(scope="module")
def llama(tiny_model: Callable[[str], Path]) -> Path:
    return tiny_model("llama")


@pytest.fixture(scope="module")
def adapters(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> list[TinyAdapter]:
    return four_adapters(llama, tmp_path_factory.mktemp("artifacts"), "llama")


@pytest.fixture(scope="module")
def roomy(llama: Path, adapters: list[TinyAdapter]) -> Iterator[InProcess]:
    with InProcess(tiny_base(llama)) as engine:
        engine.install(*adapters)
        yield engine


@pytest.fixture(scope="module")
def cramped(llama: Path, adapters: list[TinyAdapter]) -> Iterator[InProcess]:
    """Room for one sequence of 96 tokens: more than one must fight for blocks, and prefill comes in small chunks."""
    base = tiny_base(llama, context_length=96, kv_memory_mib=1)
    small = base.__class__(**{name: getattr(base, name) for name in base.__slots__} | {"block_count": 6})
    with InProcess(small, max_sequences=6, step_tokens=9) as engine:
        engine.install(*adapters)
        yield engine


asked = st.fixed_dictionaries(
    {
        "prompt": st.lists(st.integers(3, 383), min_size=1, max_size=40),
        "adapter": st.integers(0, 4),
        "max_output_tokens": st.integers(1, 40),
        "temperature": st.sampled_from([0.0, 0.0, 0.8, 1.5]),
        "top_p": st.sampled_from([1.0, 0.9]),
        "top_k": st.sampled_from([0, 20]),
        "repetition_penalty": st.sampled_from([1.0, 1.2]),
        "seed": st.integers(0, 2**63 - 1),
    }
)


def told(collected: Collected) -> tuple[str, list[int], FinishReason, int]:
    end = collected.finished
    return collected.text, collected.token_ids, end.reason, end.output_tokens


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(asked, min_size=1, max_size=6))
def test_a_request_has_the_same_answer_alone_in_any_batch_and_after_preemption(
    roomy: InProcess, cramped: InProcess, adapters: list[TinyAdapter], requests: list[dict[str, Any]]
) -> None:
    digests = ["", *(adapter.digest for adapter in adapters)]
    made = [request(each["prompt"], digests[each["adapter"]], **_options(each)) for each in requests]
    alone = [told(roomy.run(each)[0]) for each in made]
    assert [told(each) for each in roomy.run(*made)] == alone
    assert [told(each) for each in cramped.run(*made)] == alone


def _options(each: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in each.items() if key not in ("prompt", "adapter")}


def test_preempted_sequences_are_computed_again_to_the_same_answer(
    roomy: InProcess, cramped: InProcess, adapters: list[TinyAdapter]
) -> None:
    # Given six sequences that need twice the blocks there are
    digests = ["", *(adapter.digest for adapter in adapters), ""]
    made = [
        request([7 + i] * 10, digest, max_output_tokens=40, eos_ids=frozenset(), temperature=0.9 * (i % 2), seed=i)
        for i, digest in enumerate(digests)
    ]
    squeezed = cramped.run(*made)
    assert sum(each.finished.preemptions for each in squeezed) > 0
    assert [told(each) for each in squeezed] == [told(roomy.run(each)[0]) for each in made]
    assert cramped.loop.load.free_blocks == cramped.base.block_count


class Culprit:
    """A runner that misbehaves for sequences whose prompt begins with token 13."""

    def __init__(self, runner: Runs, how: str) -> None:
        self._runner = runner
        self.pool, self.adapters = runner.pool, runner.adapters
        self._how = how

    def run(self, batch: Batch, segments: list[DeviceSegment], stop: Stop = never) -> torch.Tensor:
        logits = self._runner.run(batch, segments, stop).clone()
        for index, row in enumerate(batch.sampled):
            if row.sequence.tokens[0] == 13:
                if self._how == "raise":
                    raise RuntimeError("the culprit is in the batch")
                logits[index, 5] = float("nan")
        return logits


def misbehaving(llama: Path, how: str) -> InProcess:
    base = tiny_base(llama)
    fields = {name: getattr(base, name) for name in base.__slots__}
    return InProcess(base.__class__(**fields | {"runner": Culprit(base.runner, how)}))


def test_a_row_with_bad_logits_ends_alone(llama: Path, roomy: InProcess) -> None:
    good = request([7, 8, 9])
    with misbehaving(llama, "nan") as engine:
        bad, beside = engine.run(request([13, 8, 9]), good)
        assert bad.failed.error.reason == "BAD_LOGITS"
        assert told(beside) == told(roomy.run(good)[0])


def test_what_a_row_with_bad_logits_computed_is_kept_for_nobody(llama: Path) -> None:
    with misbehaving(llama, "nan") as engine:
        assert engine.run(request([13] * 40))[0].failed.error.reason == "BAD_LOGITS"
        assert engine.loop._scheduler.blocks.published_count == 0
        assert engine.run(request([14] * 40))[0].finished
        assert engine.loop._scheduler.blocks.published_count > 0


def test_a_step_that_raises_ends_its_sequences_and_the_next_ones_are_answered(llama: Path) -> None:
    with misbehaving(llama, "raise") as engine:
        bad = engine.run(request([13, 8, 9]))[0]
        assert bad.failed.error.reason == "STEP_FAILED"
        assert engine.run(request([7, 8, 9]))[0].finished.output_tokens > 0
        assert engine.loop.load.free_blocks == engine.base.block_count


def test_what_a_broken_sequence_leaves_in_its_blocks_harms_nobody(
    llama: Path, adapters: list[TinyAdapter], tmp_path: Path
) -> None:
    # Given an adapter of NaN, whose keys and values are NaN too
    tensors = {name: tensor * float("nan") for name, tensor in load_file(adapters[3].path).items()}
    broken = TinyAdapter("nan", "f" * 64, tmp_path, write_artifact(tmp_path / "nan", tensors, "f" * 64, 64))
    good = request([7, 8, 9, 10])
    with InProcess(tiny_base(llama)) as engine:
        engine.install(broken)
        expected = told(engine.run(good)[0])
        # When it has filled blocks that another sequence gets afterwards, or sits beside it
        bad = request([5] * 40, broken.digest)
        found = engine.run(bad, good, bad)
        # Then only its own sequences fail
        assert found[0].failed.error.reason == found[2].failed.error.reason == "BAD_LOGITS"
        assert told(found[1]) == told(engine.run(good)[0]) == expected


def test_nothing_is_left_after_cancels_in_every_state(roomy: InProcess) -> None:
    router = Router()
    for number in range(30):
        roomy.loop.post(Submit(router, request([5] * (number + 1), "" if number % 3 else "unknown", number)))
    for number in range(30):
        roomy.loop.post(Cancel(router, number))
        roomy.loop.post(Cancel(router, number))
    assert roomy.run(request([5, 6]))[0].finished
    load = roomy.loop.load
    assert (load.running, load.waiting, load.loading) == (0, 0, 0)
    assert load.free_blocks == load.total_blocks


def test_an_adapter_is_given_up_only_when_nobody_uses_it(roomy: InProcess, adapters: list[TinyAdapter]) -> None:
    router = Router()
    digest = adapters[0].digest
    roomy.loop.post(Submit(router, request([5, 6], digest, max_output_tokens=60, eos_ids=frozenset())))
    roomy.loop.post(Evict(digest, force=False))
    router.wait(1)
    assert Evicted(digest, False) in roomy.reports
    assert router.sequences[1].finished.output_tokens == 60


def test_every_sequence_that_begins_is_counted_for_the_cache(roomy: InProcess, adapters: list[TinyAdapter]) -> None:
    known = len(roomy.reports)
    first, second = adapters[0].digest, adapters[1].digest
    # The second of them never comes into use anew, nor does the base count
    roomy.run(request([5, 6], first), request([5, 7], first), request([5, 8], second), request([5, 6]))
    roomy.run(request([5, 9], first))
    counts: Counter[str] = Counter()
    for report in roomy.reports[known:]:
        counts.update(report.begun if isinstance(report, Usage) else {})
    assert counts == {first: 3, second: 1}


def test_the_first_output_says_what_started_and_each_step_is_one_frame(roomy: InProcess) -> None:
    router = Router()
    for number in (1, 2):
        roomy.loop.post(Submit(router, request([5, 6, 7], "", number, max_output_tokens=5, eos_ids=frozenset())))
    router.wait(1, 2)
    outputs = router.sequences[1].outputs
    assert outputs[0].started is not None and outputs[0].started.prompt_tokens == 3
    assert all(output.started is None for output in outputs[1:])
    assert [output.end is None for output in outputs] == [True] * 4 + [False]
    steps = [frame.step for frame in router.frames]
    assert len(set(steps)) == len(steps)


def test_stop_strings_eos_and_length_end_an_answer_with_their_reason(roomy: InProcess) -> None:
    free = roomy.run(request([9, 100], max_output_tokens=30, eos_ids=frozenset()))[0]
    third = free.token_ids[2]
    as_eos = roomy.run(request([9, 100], max_output_tokens=30, eos_ids=frozenset({third})))[0]
    cut = free.token_ids[: free.token_ids.index(third)]
    assert as_eos.token_ids == cut
    assert (as_eos.finished.reason, as_eos.finished.output_tokens) == (FinishReason.EOS, len(cut) + 1)
    late = request([9, 100], max_output_tokens=30, eos_ids=frozenset({third}), min_output_tokens=12)
    assert roomy.run(late)[0].finished.output_tokens >= 12
    inner = free.text[4:6]
    stopped = roomy.run(request([9, 100], max_output_tokens=30, eos_ids=frozenset(), stop=[inner]))[0]
    assert stopped.text == free.text[: free.text.index(inner)]
    assert (stopped.finished.reason, stopped.finished.stop_match) == (FinishReason.STOP, inner)
