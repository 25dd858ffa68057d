"""Bases whose adapters are rows of a store, on CPU."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.batch import build_batch
from engine.kernels.lora import launch, reference
from engine.lora import DeviceAdapter, DeviceSegment
from engine.model import Base
from engine.rank_reader import RankReader
from engine.rank_step import RankedAdapter
from engine.rank_store import RankStore
from engine.runner import Runner
from engine.scheduler import Row
from engine.sequence import Sequence
from tests.engine.harness import tiny_base
from tests.engine.tiny import TinyAdapter


def with_rows(folder: Path, budget_bytes: int = 1 << 22) -> tuple[Base, RankStore]:
    """A tiny base whose adapters are rows; everything else is the path of a CPU."""
    base = tiny_base(folder)
    assert isinstance(base.runner, Runner)
    store = RankStore(base.projections, budget_bytes, torch.float32, torch.device("cpu"))
    return dataclasses.replace(base, runner=dataclasses.replace(base.runner, adapters=store)), store


def read(base: Base, store: RankStore, adapter: TinyAdapter) -> RankedAdapter:
    root = os.path.realpath(adapter.path.parent)
    reader = RankReader(root, base.projections, torch.float32, store.device, 512, store)
    held = reader.read(adapter.digest, str(adapter.path))
    assert isinstance(held, RankedAdapter)
    return held


def logits(base: Base, prompts: Iterable[tuple[list[int], DeviceAdapter | None]]) -> list[torch.Tensor]:
    """Of the last token of each prompt, all in one step."""
    prompts = list(prompts)
    sequences, block = [], 1
    for number, (prompt, adapter) in enumerate(prompts):
        digest = adapter.digest if adapter else ""
        sequences.append(Sequence(number, digest, list(prompt), len(prompt), blocks=[block, block + 1]))
        block += 2
    batch = build_batch([Row(sequence, 0, sequence.pending) for sequence in sequences])
    held = {adapter.digest: adapter for _, adapter in prompts if adapter}
    segments = [DeviceSegment(s.start, s.stop, held[s.adapter]) for s in batch.segments]
    found = base.runner.run(batch, segments)
    by_arrival = {row.sequence.arrival: found[place] for place, row in enumerate(batch.sampled)}
    return [by_arrival[number] for number in range(len(prompts))]


@pytest.fixture
def torch_kernels(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Has the references do the kernels' work; remembers the launches."""
    launches: list[str] = []

    def noted(name: str) -> Any:
        def run(*given: Any) -> None:
            launches.append(name)
            getattr(reference, name)(*given)

        return run

    for name in ("shrink", "expand", "place"):
        monkeypatch.setattr(launch, name, noted(name))
    return launches
