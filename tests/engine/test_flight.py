"""Steps launched before the one before them has been read: the answers stay the same, and nothing is left behind.

The launcher here is late on purpose: it computes on CPU, and hands a step's tokens over only when it is asked to land,
as a GPU would. Tokens the loop does not know yet it takes from the step before, as the device does.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Mapping
from typing import Any

import pytest

from engine.batch import Batch
from engine.flight import Flight, Landed, Runs
from engine.live import Live
from engine.lora import DeviceSegment
from engine.messages import Hangup, Submit
from engine.outcome import read_logits
from engine.sequence import UNKNOWN, Sequence
from tests.engine.harness import InProcess, Router, request
from tests.engine.test_cobatch import Chaos, Place, make_place, metric

REQUESTS = 2000


class Late:
    """Launches steps; they are only read when they land."""

    def __init__(self, runner: Runs) -> None:
        self._runner = runner
        self._known: dict[Sequence, int] = {}
        self.ahead = 0
        self.fails_at: int | None = None
        self.launches = 0

    def launch(self, batch: Batch, segments: list[DeviceSegment], lives: Mapping[Sequence, Live]) -> Flight:
        self.launches += 1
        for row, index in zip(batch.sampled, batch.sampled_tokens, strict=True):
            if batch.tokens[index] == UNKNOWN:
                batch.tokens[index] = self._known[row.sequence]
                self.ahead += 1
        assert UNKNOWN not in batch.tokens
        if self.launches == self.fails_at:
            raise RuntimeError("out of memory")
        rows = [lives[row.sequence].sample_row() for row in batch.sampled]
        is_plain = not batch.scored and not any(
            row.history.seen or row.history.bias or row.forbidden or row.sampling.top_logprobs for row in rows
        )
        outcomes = read_logits(batch, self._runner.run(batch, segments), lives)
        self._known = {each.sequence: each.sampled.token for each in outcomes if each.sampled} if is_plain else {}
        return Landed(outcomes, may_stay=is_plain)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    shape = {"num_hidden_layers": 1, "hidden_size": 16, "intermediate_size": 24}
    return make_place(tmp_path_factory.mktemp("flight"), 5, 20, 60, **shape)


class Ahead(InProcess):
    """An engine whose steps are launched ahead."""

    def __init__(self, place: Place, blocks: int, **limits: Any) -> None:
        with place.engine(blocks) as plain:
            base = plain.base
        self.late = Late(base.runner)
        super().__init__(dataclasses.replace(base, launcher=self.late), **limits)
        self.install(*place.adapters)


def test_thousands_of_requests_are_answered_as_they_are_alone(place: Place) -> None:
    before = metric("preemptions_total")
    chaos = Chaos(random.Random(6))
    # One row that must know its last token makes a whole step wait; most steps here have none.
    plain = [asked for asked in place.catalogue if not asked.request.sampling.penalizes]
    with Ahead(place, 11, max_sequences=12, step_tokens=48) as engine:
        chaos.run(engine, plain, range(REQUESTS // 2), 40)
        chaos.run(engine, place.catalogue, range(REQUESTS // 2, REQUESTS), 40)
        assert chaos.wrong == []
        assert chaos.done == REQUESTS
        engine.run(place.catalogue[0].request)
        load = engine.loop.load
        assert (load.running, load.waiting, load.free_blocks) == (0, 0, load.total_blocks)
        engine.loop._scheduler.check_integrity()
    # Otherwise it was no test of what it is about
    assert engine.late.ahead > REQUESTS
    assert metric("preemptions_total") - before > REQUESTS // 100


def test_no_step_is_run_for_a_sequence_that_is_known_to_end(place: Place) -> None:
    with Ahead(place, 20) as engine:
        engine.run(request([5, 6, 7], max_output_tokens=6, eos_ids=frozenset()))
        assert engine.late.launches == 6
        engine.run(request([5, 6, 7], max_output_tokens=1, eos_ids=frozenset()))
        assert engine.late.launches == 7


def test_a_step_that_fails_does_not_lose_the_tokens_of_the_one_before(place: Place) -> None:
    wanted = [request([8 + number, 9], max_output_tokens=9, eos_ids=frozenset()) for number in range(3)]
    with place.engine(20) as plain:
        expected = [each.token_ids for each in plain.run(*wanted)]
    with Ahead(place, 20) as engine:
        engine.late.fails_at = 5
        assert [each.token_ids for each in engine.run(*wanted)] == expected


def test_a_router_that_hangs_up_in_flight_frees_everything(place: Place) -> None:
    with Ahead(place, 20) as engine:
        router = Router()
        engine.loop.post(Submit(router, request([5, 6], max_output_tokens=90, eos_ids=frozenset())))
        router.wait_for_tokens(1, 3)
        engine.loop.post(Hangup(router))
        engine.run(request([7, 8]))
        assert engine.loop.load.free_blocks == engine.loop.load.total_blocks
