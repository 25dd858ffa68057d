"""What launcher tests share."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from launcher.layout import host_tier_of


@pytest.fixture(autouse=True)
def no_host_tier_is_left(tmp_path: Path) -> Iterator[None]:
    """The host tier outlives an instance on purpose; not that of a test."""
    yield
    for lock in tmp_path.rglob("instance.lock"):
        shutil.rmtree(host_tier_of(lock.parent.resolve()), ignore_errors=True)
