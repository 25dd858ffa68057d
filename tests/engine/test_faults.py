"""Steps that fail: the sequences that cause it end, and the others have the tokens they have alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.batch import Batch
from engine.flight import Runs
from engine.interrupts import Stop, never
from engine.lora import DeviceSegment
from engine.messages import Failed, Submit
from engine.model import Base
from tests.engine.harness import Collected, InProcess, Router, request, tiny_base
from tests.engine.tiny import TinyAdapter, four_adapters

MARK = 13
Fault = Callable[[Batch], None]


class FaultyRunner:
    """A runner that does what a test says after each pass, its keys and values written."""

    def __init__(self, runner: Runs) -> None:
        self._runner = runner
        self.pool, self.adapters = runner.pool, runner.adapters
        self.fault: Fault = lambda batch: None
        self.passes = 0

    def run(self, batch: Batch, segments: list[DeviceSegment], stop: Stop = never) -> torch.Tensor:
        self.passes += 1
        logits = self._runner.run(batch, segments, stop)
        self.fault(batch)
        return logits


class Engine(InProcess):
    def __init__(self, base: Base, adapters: list[TinyAdapter]) -> None:
        self.runner = FaultyRunner(base.runner)
        fields = {name: getattr(base, name) for name in base.__slots__}
        super().__init__(base.__class__(**fields | {"runner": self.runner}), max_sequences=16, step_tokens=32)
        self.install(*adapters)


@pytest.fixture(scope="module")
def adapters(tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> list[TinyAdapter]:
    return four_adapters(tiny_model("llama"), tmp_path_factory.mktemp("artifacts"), "llama")


@pytest.fixture(scope="module")
def running(tiny_model: Callable[[str], Path], adapters: list[TinyAdapter]) -> Iterator[Engine]:
    engine = Engine(tiny_base(tiny_model("llama")), adapters)
    with engine:
        yield engine


@pytest.fixture
def engine(running: Engine) -> Iterator[Engine]:
    """The engine, whole again after each test and with nothing left in it."""
    yield running
    running.runner.fault = lambda batch: None
    assert running.run(request([5, 6]))[0].finished
    load = running.loop.load
    assert (load.running, load.waiting, load.free_blocks) == (0, 0, load.total_blocks)


def answers(collected: list[Collected]) -> list[tuple[str, list[int]] | str]:
    return [
        each.end.error.reason if isinstance(each.end, Failed) else (each.text, each.token_ids) for each in collected
    ]


def mixed(adapters: list[TinyAdapter], count: int = 10) -> list[tuple[list[int], str]]:
    """Prompts of many lengths under many adapters."""
    digests = ["", *(adapter.digest for adapter in adapters)]
    return [([20 + i] * (1 + 5 * i % 37), digests[i % 5]) for i in range(count)]


def test_a_sequence_that_makes_every_step_fail_ends_alone(engine: Engine, adapters: list[TinyAdapter]) -> None:
    good = [request(prompt, digest, temperature=0.7, seed=3, eos_ids=frozenset()) for prompt, digest in mixed(adapters)]
    alone = answers([engine.run(each)[0] for each in good])

    def fail(batch: Batch) -> None:
        begins = (MARK, 0) in zip(batch.tokens, batch.positions, strict=True)
        if begins or any(row.sequence.tokens[0] == MARK for row in batch.sampled):
            raise RuntimeError("the culprit is in the batch")

    engine.runner.fault = fail
    bad = [request([MARK] * 40), request([MARK], adapters[0].digest)]
    found = answers(engine.run(*good[:4], bad[0], *good[4:], bad[1]))
    assert found.pop(4) == found.pop(-1) == "STEP_FAILED"
    assert found == alone


def test_a_sequence_that_fails_after_many_tokens_ends_with_them(engine: Engine) -> None:
    def fail(batch: Batch) -> None:
        if any(row.sequence.tokens[0] == MARK and row.sequence.output_length >= 5 for row in batch.sampled):
            raise RuntimeError("it has become too long")

    good = request([7, 8, 9], eos_ids=frozenset())
    alone = answers(engine.run(good))
    engine.runner.fault = fail
    bad, beside = engine.run(request([MARK, 8], eos_ids=frozenset()), good)
    assert bad.failed.error.reason == "STEP_FAILED" and len(bad.token_ids) == 5
    assert answers([beside]) == alone


def test_what_does_not_fit_together_is_computed_apart(engine: Engine, adapters: list[TinyAdapter]) -> None:
    made = [request(prompt, digest, eos_ids=frozenset()) for prompt, digest in mixed(adapters)]
    alone = answers([engine.run(each)[0] for each in made])

    def fail(batch: Batch) -> None:
        if len(batch.singles) + len(batch.chunks) > 3:
            raise RuntimeError("out of memory")

    engine.runner.fault = fail
    assert answers(engine.run(*made)) == alone


def test_a_device_that_fails_at_everything_ends_all_and_is_asked_a_bounded_number_of_times(engine: Engine) -> None:
    def fail(batch: Batch) -> None:
        raise RuntimeError("the device is gone")

    engine.runner.fault = fail
    engine.runner.passes = 0
    found = engine.run(*(request([20 + i]) for i in range(16)))
    assert answers(found) == ["STEP_FAILED"] * 16
    assert engine.runner.passes < 2 * 16


def test_a_failure_that_does_not_come_again_is_noticed_by_nobody(engine: Engine, adapters: list[TinyAdapter]) -> None:
    made = [request(prompt, digest, eos_ids=frozenset()) for prompt, digest in mixed(adapters)]
    alone = answers([engine.run(each)[0] for each in made])
    engine.runner.passes = 0

    def fail(batch: Batch) -> None:
        if engine.runner.passes % 3 == 0 and len(batch.tokens) > 1:
            raise RuntimeError("now and then")

    engine.runner.fault = fail
    assert answers(engine.run(*made)) == alone


def test_sequences_whose_adapter_rows_are_gone_end_and_the_others_go_on(
    engine: Engine, adapters: list[TinyAdapter]
) -> None:
    gone, kept = adapters[1], adapters[2]
    long: dict[str, Any] = {"max_output_tokens": 200, "eos_ids": frozenset()}
    alone = answers(engine.run(request([7, 8], kept.digest, **long), request([7, 8], **long)))
    router = Router()
    for number, digest in enumerate((gone.digest, kept.digest, gone.digest, "")):
        engine.loop.post(Submit(router, request([7, 8], digest, number, **long)))
    router.wait_for_tokens(2, 3)
    # Given what must be impossible: rows vanish under the sequences that use them
    rows = engine.loop._rows
    entry = rows._entries.pop(gone.digest)
    router.wait(0, 1, 2, 3)
    rows._entries[gone.digest] = entry
    assert [router.sequences[number].failed.error.reason for number in (0, 2)] == ["STALE_ROWS"] * 2
    assert answers([router.sequences[1], router.sequences[3]]) == alone


def test_a_token_that_cannot_become_text_ends_its_sequence_alone(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    good, bad = request([7, 8, 9]), request([30, 31])
    alone = answers(engine.run(good))
    poison = engine.run(bad)[0].token_ids[0]
    assert poison not in alone[0][1]
    decode = engine.base.tokenizer.decode

    def failing(ids: list[int]) -> str:
        if poison in ids:
            raise ValueError("no such token")
        return decode(ids)

    monkeypatch.setattr(engine.base.tokenizer, "decode", failing)
    assert answers(engine.run(good, bad)) == [*alone, "STEP_FAILED"]
