"""What a request is answered does not depend on who else is there: alone, in any batch, before and after preemption, on
computed and on found prefixes, among cancels.

Requests come from a catalogue whose answers were computed alone, without prefix cache. Requests with a near tie of
their two likeliest tokens are not in it: rounding differs with the shape of a batch, and either token would be right.
"""

from __future__ import annotations

import dataclasses
import gc
import random
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import REGISTRY

from engine.messages import Cancel, Failed, Frame, Request, Submit
from engine.sequence import Sequence
from tests.engine.harness import Collected, InProcess, request, tiny_base
from tests.engine.tiny import TinyAdapter, four_adapters, make_model

NEAR_TIE = 1e-3
CATALOGUE = 200
CONTEXT = 96
CHAOS_REQUESTS = 10_000


@dataclass(frozen=True)
class Asked:
    """A request of the catalogue, and its tokens when it is alone."""

    request: Request
    tokens: list[int]


@dataclass(frozen=True)
class Place:
    """A tiny model with four adapters, and a catalogue of requests to it."""

    folder: Path
    adapters: list[TinyAdapter]
    catalogue: list[Asked]

    def engine(self, blocks: int, **given: Any) -> InProcess:
        base = tiny_base(self.folder, context_length=CONTEXT, kv_memory_mib=4)
        engine = InProcess(dataclasses.replace(base, block_count=blocks), **given)
        engine.install(*self.adapters)
        return engine


def make_place(root: Path, seed: int, longest_prompt: int, most_output: int, **shape: int) -> Place:
    folder = make_model(root / "tiny-llama", "llama", **shape)
    place = Place(folder, four_adapters(folder, root, "llama"), [])
    rng = random.Random(seed)
    made = [make_request(rng, place.adapters, longest_prompt, most_output) for _ in range(CATALOGUE)]
    with place.engine(64, prefix_cache=False) as engine:
        for each in made:
            collected = engine.run(each)[0]
            if each.sampling.temperature or not has_near_tie(collected):
                plain = dataclasses.replace(each.sampling, top_logprobs=0)
                place.catalogue.append(Asked(dataclasses.replace(each, sampling=plain), collected.token_ids))
    assert len(place.catalogue) > CATALOGUE * 0.9
    return place


def make_request(rng: random.Random, adapters: list[TinyAdapter], longest_prompt: int, most_output: int) -> Request:
    """Prompts of one stem begin the same, under any adapter; half of the requests are sampled."""
    stem, shared = rng.randrange(3), rng.randrange(longest_prompt)
    prompt = [3 + (stem * 97 + place * place * 31) % 380 for place in range(shared)]
    prompt += [rng.randrange(3, 383) for _ in range(rng.randrange(1, 6))]
    sampled: dict[str, Any] = {
        "temperature": rng.choice([0.7, 1.5]),
        "seed": rng.getrandbits(63),
        "top_p": rng.choice([1.0, 0.9]),
    }
    return request(
        prompt,
        rng.choice(["", *(adapter.digest for adapter in adapters)]),
        max_output_tokens=rng.randrange(1, most_output if rng.random() < 0.5 else 6),
        top_logprobs=2,
        repetition_penalty=rng.choice([1.0, 1.2]),
        **(sampled if rng.random() < 0.5 else {}),
    )


def has_near_tie(collected: Collected) -> bool:
    tops = [logprob.top for output in collected.outputs for logprob in output.logprobs]
    return any(first[1] - second[1] < NEAR_TIE for first, second in tops)


def metric(name: str) -> float:
    return REGISTRY.get_sample_value(f"loraplex_engine_{name}") or 0.0


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return make_place(
        tmp_path_factory.mktemp("cobatch"), 1, 50, 45, num_hidden_layers=2, hidden_size=32, intermediate_size=48
    )


@pytest.fixture(scope="module")
def engines(place: Place) -> Iterator[dict[str, InProcess]]:
    """Room for everybody; room for little more than one, with and without prefix cache, in small chunks."""
    with (
        place.engine(96, max_sequences=8) as roomy,
        place.engine(9, max_sequences=6, step_tokens=20) as cramped,
        place.engine(9, max_sequences=6, step_tokens=20, prefix_cache=False) as uncached,
    ):
        yield {"roomy": roomy, "cramped": cramped, "uncached": uncached}


@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from(["roomy", "cramped", "cramped", "uncached"]),
    st.lists(st.integers(0, int(CATALOGUE * 0.9)), min_size=1, max_size=8),
)
def test_a_request_has_the_tokens_it_has_alone(
    place: Place, engines: dict[str, InProcess], name: str, numbers: list[int]
) -> None:
    batch = [place.catalogue[number] for number in numbers]
    found = engines[name].run(*(asked.request for asked in batch))
    assert [each.token_ids for each in found] == [asked.tokens for asked in batch]
    load = engines[name].loop.load
    assert (load.free_blocks, load.running, load.waiting) == (load.total_blocks, 0, 0)


def test_batches_like_these_meet_preemption_hits_and_evictions(place: Place, engines: dict[str, InProcess]) -> None:
    before = [metric(name) for name in ("preemptions_total", "prefix_cache_evictions_total")]
    long = sorted(place.catalogue, key=lambda asked: -len(asked.request.prompt))[:8]
    for name in ("cramped", "uncached", "roomy", "roomy"):
        found = engines[name].run(*(asked.request for asked in long))
        assert [each.token_ids for each in found] == [asked.tokens for asked in long]
        starts = [each.outputs[0].started for each in found]
        cached = [start.cached_prompt_tokens for start in starts if start is not None]
        assert len(cached) == len(long)
        assert name != "uncached" or not any(cached)
    # All of a prompt is there the second time but for what fills no block, and the last token
    assert cached == [(len(asked.request.prompt) - 1) // 16 * 16 for asked in long]
    after = [metric(name) for name in ("preemptions_total", "prefix_cache_evictions_total")]
    assert after[0] > before[0] and after[1] > before[1]


@dataclass(eq=False)
class Chaos:
    """A router that keeps only what is open, and compares as tokens come."""

    rng: random.Random
    open: dict[int, tuple[Asked, int]] = field(default_factory=dict)
    done: int = 0
    wrong: list[str] = field(default_factory=list)
    changed: threading.Condition = field(default_factory=threading.Condition)

    def deliver(self, frame: Frame) -> None:
        with self.changed:
            for output in frame.outputs:
                if output.sequence_id not in self.open:
                    continue  # cancelled meanwhile
                asked, got = self.open[output.sequence_id]
                expected = asked.tokens[got : got + len(output.token_ids)]
                if list(output.token_ids) != expected or isinstance(output.end, Failed):
                    self.wrong.append(f"{output} where {expected} was expected")
                self.open[output.sequence_id] = asked, got + len(output.token_ids)
                if output.end is not None:
                    self._close(output.sequence_id, complete=True)
            self.changed.notify_all()

    def cancel_one(self) -> int:
        """Gives up a random open sequence; returns which."""
        with self.changed:
            sequence_id = self.rng.choice(sorted(self.open))
            self._close(sequence_id, complete=False)
            return sequence_id

    def _close(self, sequence_id: int, complete: bool) -> None:
        asked, got = self.open.pop(sequence_id)
        if complete and got != len(asked.tokens):
            self.wrong.append(f"{got} tokens where {len(asked.tokens)} were expected")
        self.done += 1

    def run(self, engine: InProcess, catalogue: list[Asked], numbers: range, most_open: int) -> None:
        """Submits random requests, some urgent, cancels every seventh or so, and returns when all have ended."""
        for number in numbers:
            asked = self.rng.choice(catalogue)
            with self.changed:
                assert self.changed.wait_for(lambda: len(self.open) < most_open, 60)
                self.open[number] = asked, 0
            urgent = self.rng.random() < 0.2
            engine.loop.post(Submit(self, dataclasses.replace(asked.request, sequence_id=number, urgent=urgent)))
            if self.rng.random() < 0.15:
                with self.changed:
                    self.changed.wait(self.rng.random() * 0.004)
                if self.open:
                    engine.loop.post(Cancel(self, self.cancel_one()))
        with self.changed:
            assert self.changed.wait_for(lambda: not self.open, 60)


def sequences_alive() -> int:
    gc.collect()
    return sum(type(thing) is Sequence for thing in gc.get_objects())


def test_thousands_of_requests_with_cancels_and_preemptions_leave_nothing_behind(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    place = make_place(
        tmp_path_factory.mktemp("chaos"), 2, 20, 60, num_hidden_layers=1, hidden_size=16, intermediate_size=24
    )
    before, alive = metric("preemptions_total"), sequences_alive()
    given_up = metric("interrupted_steps_total")
    chaos = Chaos(random.Random(3))
    with place.engine(11, max_sequences=12, step_tokens=48) as engine:
        chaos.run(engine, place.catalogue, range(CHAOS_REQUESTS // 4), 40)
        early = psutil.Process().memory_info().rss
        chaos.run(engine, place.catalogue, range(CHAOS_REQUESTS // 4, CHAOS_REQUESTS), 40)
        late = psutil.Process().memory_info().rss
        assert chaos.wrong == []
        assert chaos.done == CHAOS_REQUESTS
        # What was cancelled last may not have been handled yet; an answer comes after it
        engine.run(place.catalogue[0].request)
        load = engine.loop.load
        assert (load.running, load.waiting, load.loading) == (0, 0, 0)
        assert load.free_blocks == load.total_blocks
        engine.loop._scheduler.check_integrity()
    assert sequences_alive() == alive
    # Otherwise it was no test of these
    assert metric("preemptions_total") - before > CHAOS_REQUESTS // 100
    assert metric("interrupted_steps_total") - given_up > 10
    assert late - early < 8 << 20
