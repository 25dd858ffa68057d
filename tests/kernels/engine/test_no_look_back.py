"""A step says everything to the device and asks it nothing: no number is looked at on the host before it is over."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from engine.batch import build_batch
from engine.config import Settings
from engine.gpu.runner import GpuRunner
from engine.model import load_base
from engine.sampler import History, SampleRow, Sampling
from engine.scheduler import Row
from engine.sequence import Sequence
from tests.engine.tiny import make_model

pytestmark = pytest.mark.interpreted

# What makes the host wait for a GPU: a number, a shape that depends on numbers, a tensor made of the host's numbers.
WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "lift_fresh", "unique", "equal"}


class Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes operations that would make the host wait."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.waits: list[str] = []
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().split("::")[1].split(".")[0]
        self.count += 1
        by_mask = name in ("index", "index_put_", "index_put") and any(
            isinstance(index, torch.Tensor) and index.dtype is torch.bool for index in args[1]
        )
        if name in WAITS or by_mask:
            self.waits.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "way", [{}, {"temperature": 1.0}, {"temperature": 1.0, "top_p": 0.8}], ids=["greedy", "drawn", "truncated"]
)
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_a_decode_step_waits_for_nothing(family: str, way: dict[str, Any], tmp_path: Path) -> None:
    folder = make_model(tmp_path / "tiny", family)
    settings = Settings(model=str(folder), device="cpu", threads=1, kv_memory_mib=4, max_sequences=4)
    runner = load_base(settings, kernels=True).runner
    assert isinstance(runner, GpuRunner)
    rows = [Row(Sequence(n, "", [5, 6, 7 + n], 3, blocks=[1 + n]), 2, 1) for n in range(3)]
    asked = Sampling(**way)
    watch = Watch()
    body: Callable[[], torch.Tensor] = lambda: runner.compute(  # noqa: E731
        build_batch(rows), [], [SampleRow(asked, 3, History(asked, ())) for _ in rows]
    )
    with torch.inference_mode(), watch:
        body()
    assert watch.count > 50
    assert not watch.waits
