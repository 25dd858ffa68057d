"""Attention through lanes is attention over pages, whoever comes, goes, grows or finds no room."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.attention import Form, PagedStep
from engine.batch import build_batch
from engine.blocks import BLOCK_SIZE, blocks_for
from engine.lanes import Lanes
from engine.pool import KvPool, LayerShape
from engine.scheduler import Row
from engine.sequence import Sequence

CPU = torch.device("cpu")
SHAPES = {0: LayerShape(2, 8, 6), 1: LayerShape(1, 4, 4)}
HEADS = 4
TOKENS = 320
FORMS = [Form(0.5, None, None), Form(0.5, 3.0, 9)]


class Course:
    """Sequences that decode in steps, through two pools: one with lanes, one without."""

    def __init__(self, budget_bytes: int) -> None:
        self.pools = [KvPool(SHAPES, 8 * blocks_for(TOKENS), torch.float32, CPU) for _ in range(2)]
        self.lanes = [Lanes(self.pools[0], budget_bytes), Lanes(self.pools[1], 0)]
        self.generator = torch.Generator().manual_seed(0)
        self.sequences: list[Sequence] = []

    def begin(self, tokens: int) -> None:
        number = len(self.sequences)
        first = number * blocks_for(TOKENS) + 1
        blocks = list(range(first, first + blocks_for(TOKENS)))
        self.sequences.append(Sequence(number, "", [0] * tokens, tokens, blocks=blocks))

    def step(self, rows: list[Row], form: Form) -> list[torch.Tensor]:
        """What both pools answer, layer by layer."""
        batch = build_batch(rows)
        steps = [PagedStep(batch, pool, lanes, CPU) for pool, lanes in zip(self.pools, self.lanes, strict=True)]
        answers = []
        for layer, shape in SHAPES.items():
            query = torch.randn(HEADS, len(batch.tokens), shape.key_size, generator=self.generator)
            key = torch.randn(shape.kv_heads, len(batch.tokens), shape.key_size, generator=self.generator)
            value = torch.randn(shape.kv_heads, len(batch.tokens), shape.value_size, generator=self.generator)
            answers += [step.attend(layer, query, key, value, form) for step in steps]
        for row in rows:
            row.sequence.computed = row.start + row.count
        return answers

    def prefill(self, number: int) -> None:
        sequence = self.sequences[number]
        self.step([Row(sequence, 0, sequence.pending)], FORMS[0])

    def decode(self, numbers: list[int], form: Form) -> list[torch.Tensor]:
        rows = []
        for number in numbers:
            sequence = self.sequences[number]
            sequence.tokens.append(0)
            rows.append(Row(sequence, sequence.computed, 1))
        return self.step(rows, form)


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(2, 140), min_size=1, max_size=6),
    steps=st.lists(st.sets(st.integers(0, 5), min_size=1), min_size=1, max_size=12),
    budget=st.sampled_from([0, 40_000, 1 << 30]),
    form=st.sampled_from(FORMS),
)
def test_lanes_and_pages_attend_alike(lengths: list[int], steps: list[set[int]], budget: int, form: Form) -> None:
    course = Course(budget)
    for number, length in enumerate(lengths):
        course.begin(length)
        course.prefill(number)
    for wanted in steps:
        numbers = [number for number in sorted(wanted, reverse=True) if number < len(lengths)]
        answers = course.decode(numbers, form) if numbers else []
        for mine, right in zip(answers[::2], answers[1::2], strict=True):
            torch.testing.assert_close(mine, right, rtol=1e-5, atol=1e-5)
        assert course.lanes[0].size_bytes <= budget


def test_a_sequence_moves_to_longer_lanes_as_it_grows() -> None:
    course = Course(1 << 30)
    course.begin(60)
    course.begin(124)
    course.prefill(0)
    course.prefill(1)
    for _ in range(12):
        answers = course.decode([0, 1], FORMS[0])
        torch.testing.assert_close(answers[0], answers[1], rtol=1e-5, atol=1e-5)


def test_what_another_sequence_left_in_a_lane_does_not_show() -> None:
    course = Course(1 << 30)
    course.begin(100)
    course.begin(66)
    course.prefill(0)
    course.pools[0].values[0][BLOCK_SIZE : BLOCK_SIZE * 7] = float("nan")
    assert torch.isnan(course.decode([0], FORMS[0])[0]).all()
    course.prefill(1)
    assert torch.isfinite(course.decode([1], FORMS[0])[0]).all()


@pytest.mark.parametrize(("budget", "in_lanes"), [(0, 0), (1 << 30, 2)])
def test_decode_runs_in_lanes_where_there_is_memory(budget: int, in_lanes: int) -> None:
    course = Course(budget)
    course.begin(20)
    course.begin(30)
    rows = [Row(sequence, sequence.computed, 1) for sequence in course.sequences]
    for row in rows:
        row.sequence.computed = len(row.sequence.tokens) - 1
    steps, paged = course.lanes[0].arrange(build_batch(rows).singles)
    assert sum(len(step.index) for step in steps) == in_lanes == 2 - len(paged)
