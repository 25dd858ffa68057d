"""Two kinds of kernel tests that cannot share a process: Triton decides at import whether kernels are interpreted.

Tests marked `interpreted` compare numbers and run in a process of their own, started by `test_interpreter.py`; the
others compile kernels, and run with everybody else.
"""

from __future__ import annotations

import os

import pytest

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if (item.get_closest_marker("interpreted") is not None) is not INTERPRETED:
            item.add_marker(pytest.mark.skip(reason="runs in the other process, see tests/kernels/conftest.py"))
