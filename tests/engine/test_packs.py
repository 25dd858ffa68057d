"""Packed adapters add the same as each adapter on its own, whoever comes, goes or changes shape."""

from __future__ import annotations

import gc
import weakref
from unittest.mock import Mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.lora import DeviceAdapter, DeviceSegment, Projection, TargetModule, delta_of
from engine.packs import IDLE_STEPS, Packs

PROJECTIONS = (
    Projection((TargetModule("q", 6, 4), TargetModule("k", 6, 2), TargetModule("v", 6, 2))),
    Projection((TargetModule("down", 8, 6),)),
)
# Ranks of q, k, v and down; 0 where the adapter has none.
SHAPES = [(2, 2, 2, 2), (2, 2, 2, 2), (2, 2, 2, 2), (2, 2, 2, 2), (3, 0, 1, 0), (3, 0, 1, 0), (0, 0, 0, 5)]


def make_adapter(number: int, ranks: tuple[int, ...]) -> DeviceAdapter:
    generator = torch.Generator().manual_seed(number)
    left, deltas = list(ranks), []
    for projection in PROJECTIONS:
        pairs = []
        for target in projection.targets:
            rank = left.pop(0)
            a = torch.randn(rank, target.in_features, generator=generator)
            b = torch.randn(target.out_features, rank, generator=generator)
            pairs.append((a, b) if rank else None)
        deltas.append(delta_of(projection, pairs))
    return DeviceAdapter(str(number), tuple(deltas), 1)


def apply(packs: Packs, segments: list[DeviceSegment], tokens: int) -> list[torch.Tensor]:
    found = []
    arranged = packs.arrange(segments)
    for number, projection in enumerate(PROJECTIONS):
        x = torch.arange(tokens * projection.targets[0].in_features, dtype=torch.float32).view(tokens, -1) / 10
        y = torch.zeros(tokens, projection.columns[-1].stop)
        for delta in arranged:
            delta.add(number, x, y)
        found.append(y)
    return found


def expected(segments: list[DeviceSegment], tokens: int) -> list[torch.Tensor]:
    found = []
    for number, projection in enumerate(PROJECTIONS):
        x = torch.arange(tokens * projection.targets[0].in_features, dtype=torch.float32).view(tokens, -1) / 10
        y = torch.zeros(tokens, projection.columns[-1].stop)
        for segment in segments:
            delta = segment.adapter.deltas[number]
            for part in delta.parts if delta else ():
                rows = slice(segment.start, segment.stop)
                assert delta is not None
                y[rows, part.columns] += x[rows] @ delta.a[part.ranks].T @ part.b
        found.append(y)
    return found


steps = st.lists(
    st.dictionaries(st.integers(0, len(SHAPES) - 1), st.integers(1, 12), max_size=7), min_size=1, max_size=8
)


@settings(max_examples=150, deadline=None)
@given(steps)
def test_any_course_of_steps_adds_what_each_adapter_adds_alone(course: list[dict[int, int]]) -> None:
    adapters = [make_adapter(number, ranks) for number, ranks in enumerate(SHAPES)]
    packs = Packs(torch.device("cpu"))
    for step in course:
        segments, place = [], 2  # two tokens of the base first
        for number, tokens in step.items():
            segments.append(DeviceSegment(place, place + tokens, adapters[number]))
            place += tokens
        for found, right in zip(apply(packs, segments, place + 1), expected(segments, place + 1), strict=True):
            torch.testing.assert_close(found, right, rtol=1e-5, atol=1e-5)


def test_an_adapter_that_was_brought_in_again_is_read_again() -> None:
    packs = Packs(torch.device("cpu"))
    other = DeviceSegment(1, 2, make_adapter(7, SHAPES[0]))
    for number in (1, 2):
        adapter = make_adapter(number, SHAPES[0])
        segments = [DeviceSegment(0, 1, DeviceAdapter("same", adapter.deltas, 1)), other]
        for found, right in zip(apply(packs, segments, 2), expected(segments, 2), strict=True):
            torch.testing.assert_close(found, right, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("failing", ["_room", "_copy"])
def test_a_pack_that_failed_half_way_is_not_used_again(failing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    packs = Packs(torch.device("cpu"))
    segments = [DeviceSegment(i, i + 1, make_adapter(i, SHAPES[0])) for i in range(6)]
    apply(packs, segments[:2], 6)
    with monkeypatch.context() as patch:
        patch.setattr(f"engine.packs.{failing}", Mock(side_effect=RuntimeError("out of memory")))
        with pytest.raises(RuntimeError):
            packs.arrange(segments)
    for part in (segments, segments[2:], segments[:3]):
        for found, right in zip(apply(packs, part, 6), expected(part, 6), strict=True):
            torch.testing.assert_close(found, right, rtol=1e-5, atol=1e-5)


def test_a_pack_keeps_no_adapter_alive_and_goes_when_idle() -> None:
    packs = Packs(torch.device("cpu"))
    segments = [DeviceSegment(i, i + 1, make_adapter(i, SHAPES[0])) for i in range(3)]
    alive = weakref.ref(segments[0].adapter)
    apply(packs, segments, 3)
    del segments
    gc.collect()
    assert alive() is None
    assert packs.bytes_held > 0
    for _ in range(2 * IDLE_STEPS):
        packs.arrange([])
    assert packs.bytes_held == 0
