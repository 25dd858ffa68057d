"""Two kinds of kernel tests that cannot share a process: Triton decides at import whether kernels are interpreted.

Tests marked `interpreted` compare numbers and run in a process of their own, started by `test_interpreter.py`, and
where there is a GPU also on it, in this one. The others compile kernels, and run with everybody else.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator

import pytest
import torch

# A machine that cannot have Triton tests everything else; where changes are judged its absence is a failure.
if importlib.util.find_spec("triton") is None and not os.environ.get("CI"):
    collect_ignore_glob = ["*"]

# A machine with a GPU may have torch, triton and transformers and little else.
if importlib.util.find_spec("opentelemetry") is None:
    from bench.gpu.absent import stand_in

    stand_in()

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
HAS_GPU = torch.cuda.is_available()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        compares = item.get_closest_marker("interpreted") is not None
        if "/tests/kernels/" in str(item.path) and compares is not INTERPRETED and not (compares and HAS_GPU):
            item.add_marker(pytest.mark.skip(reason="runs in the other process, see tests/kernels/conftest.py"))


@pytest.fixture(autouse=True)
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    """Where kernels run. What a test makes without saying where is made there, but for tests of the whole engine."""
    name = "cuda" if HAS_GPU and not INTERPRETED else "cpu"
    if request.path.parent.name == "engine":
        yield name
        return
    with torch.device(name):
        yield name
