"""Steps that are given up for somebody who cannot wait: soon, not often, and without a trace in any answer."""

from __future__ import annotations

import dataclasses
import random
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engine.batch import Batch
from engine.flight import Runs
from engine.interrupts import FAR, MOST_SAVED, SHARE, Interrupted, Interrupts, Stop, never
from engine.lora import DeviceSegment
from engine.messages import Hangup, Submit
from engine.model import Base
from tests.engine.harness import InProcess, Router, request, tiny_base
from tests.engine.tiny import make_model

LAYERS = 4


@given(st.lists(st.tuples(st.sampled_from(["stepped", "lost"]), st.floats(0, 2)), max_size=60))
def test_no_more_time_is_lost_than_its_share(course: list[tuple[str, float]]) -> None:
    interrupts, spent, lost, longest = Interrupts(), 0.0, 0.0, 0.0
    for kind, seconds in course:
        if kind == "stepped":
            interrupts.stepped(seconds)
            spent += seconds
        elif interrupts.may_stop(0.0):
            interrupts.lost(seconds)
            lost, longest = lost + seconds, max(longest, seconds)
    # The last one may begin with hardly anything left
    assert lost <= MOST_SAVED + SHARE * spent + longest + 1e-9


def test_a_step_that_has_come_far_is_finished() -> None:
    assert Interrupts().may_stop(FAR - 0.01)
    assert not Interrupts().may_stop(FAR)


class HeldRunner:
    """A runner whose passes stop on their way until a test lets them go on."""

    def __init__(self, runner: Runs) -> None:
        self._runner = runner
        self.pool, self.adapters = runner.pool, runner.adapters
        # Where the next pass stops; whether it is there; and what it waits for.
        self.stop_at: float | None = None
        self.is_there = threading.Event()
        self.may_go = threading.Event()
        # The tokens of the passes that were begun since it stopped, and whether they were finished.
        self.passes: list[tuple[int, bool]] = []

    def run(self, batch: Batch, segments: list[DeviceSegment], stop: Stop = never) -> torch.Tensor:
        def slowly(progress: float) -> bool:
            if progress == self.stop_at:
                self.stop_at = None
                self.passes.clear()
                self.is_there.set()
                assert self.may_go.wait(60)
            return stop(progress)

        try:
            logits = self._runner.run(batch, segments, slowly)
        except Interrupted:
            self.passes.append((len(batch.tokens), False))
            raise
        self.passes.append((len(batch.tokens), True))
        return logits

    @contextmanager
    def held(self, progress: float = 0.25) -> Iterator[None]:
        """While a pass stands still, begun before, finished after."""
        self.stop_at = progress
        assert self.is_there.wait(60)
        yield
        self.is_there.clear()
        self.may_go.set()


def prompt(sequence_id: int) -> list[int]:
    return random.Random(sequence_id).choices(range(5, 90), k=40)


class Engine(InProcess):
    def __init__(self, base: Base, **limits: Any) -> None:
        self.runner = HeldRunner(base.runner)
        super().__init__(dataclasses.replace(base, runner=self.runner), step_tokens=256, **limits)
        self.router = Router()

    def submit(self, sequence_id: int, **given: Any) -> None:
        adapter = given.pop("adapter", "")
        asked = request(
            prompt(sequence_id), adapter, sequence_id, eos_ids=frozenset(), **{"max_output_tokens": 400} | given
        )
        self.loop.post(Submit(self.router, asked))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return make_model(tmp_path / "llama", "llama", num_hidden_layers=LAYERS)


@pytest.fixture
def engine(model: Path) -> Iterator[Engine]:
    with Engine(tiny_base(model)) as engine:
        # Two streams that go on and on
        for number in (1, 2):
            engine.submit(number)
            engine.router.wait_for_tokens(number, 2)
        yield engine
        engine.loop.post(Hangup(engine.router))


def test_the_step_that_runs_is_given_up_for_an_urgent_request_and_no_other(engine: Engine) -> None:
    with engine.runner.held():
        engine.submit(3)
    engine.router.wait_for_tokens(3, 1)
    assert engine.runner.passes[:2] == [(2, True), (2 + 40, True)]
    engine.runner.may_go.clear()
    with engine.runner.held():
        engine.submit(4, urgent=True)
    engine.router.wait_for_tokens(4, 1)
    assert engine.runner.passes[:2] == [(3, False), (3 + 40, True)]


def test_nobody_has_other_tokens_for_it(engine: Engine, model: Path) -> None:
    for number, urgent in ((3, False), (4, True)):
        with engine.runner.held():
            engine.submit(number, urgent=urgent, max_output_tokens=20)
        engine.runner.may_go.clear()
        engine.router.wait(number)
    found = {number: list(each.token_ids) for number, each in engine.router.sequences.items()}
    assert len(found) == 4
    with InProcess(tiny_base(model)) as alone:
        for number, tokens in found.items():
            wanted = request(prompt(number), eos_ids=frozenset(), max_output_tokens=len(tokens))
            assert alone.run(wanted)[0].token_ids == tokens


def test_a_step_that_is_nearly_done_is_finished(engine: Engine) -> None:
    with engine.runner.held(0.75):
        engine.submit(3, urgent=True)
    engine.router.wait_for_tokens(3, 1)
    assert engine.runner.passes[:2] == [(2, True), (2 + 40, True)]


def test_a_step_with_an_urgent_prompt_is_not_given_up_for_another(engine: Engine) -> None:
    with engine.runner.held():
        engine.submit(3, urgent=True)
        engine.runner.may_go.clear()
        engine.runner.stop_at = 0.5
        engine.runner.is_there.clear()
        engine.runner.may_go.set()
        assert engine.runner.is_there.wait(60)
        engine.submit(4, urgent=True)
    engine.router.wait_for_tokens(4, 1)
    # The other follows in the next step, but not to the cost of those who have waited since
    assert engine.runner.passes[:2] == [(2 + 40, True), (3 + 40, True)]


def test_what_waits_for_its_adapter_gives_up_no_step(engine: Engine) -> None:
    with engine.runner.held():
        engine.submit(3, urgent=True, adapter="f" * 64)
    engine.router.wait_for_tokens(1, len(engine.router.sequences[1].token_ids) + 2)
    assert all(finished for _, finished in engine.runner.passes)


def test_once_its_share_of_time_is_lost_no_step_is_given_up(engine: Engine) -> None:
    given_up = 0
    for number in range(3, 7):
        engine.runner.may_go.clear()
        with engine.runner.held():
            engine.submit(number, urgent=True, max_output_tokens=2)
            time.sleep(0.6 * MOST_SAVED)
        engine.router.wait(number)
        given_up += not engine.runner.passes[0][1]
    assert given_up == 2
