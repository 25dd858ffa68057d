"""Builds: a few at a time, and what is needed does not stand behind what is registered."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path

import pytest

from cache import builder
from cache.artifact import AdapterFiles, Artifact, BaseDescription, build_artifact
from cache.builder import BUILDS_AT_ONCE, Builder
from cache.sources import FileSource
from tests.cache.conftest import BASE, write_adapter


async def test_what_is_needed_is_built_while_a_hundred_registrations_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held, building, most = threading.Event(), 0, 0
    lock = threading.Lock()

    def build(files: AdapterFiles, base: BaseDescription) -> Artifact:
        nonlocal building, most
        with lock:
            building += 1
            most = max(most, building)
        if b'"needed"' not in files.config:
            assert held.wait(20)
        with lock:
            building -= 1
        return build_artifact(files, base)

    monkeypatch.setattr(builder, "build_artifact", build)
    uri = f"file://{write_adapter(tmp_path / 'any')}"
    needed = f"file://{write_adapter(tmp_path / 'needed', task_type='needed')}"
    builds = Builder(FileSource([tmp_path], 1 << 24))
    registering = [asyncio.create_task(builds.build(uri, lambda _: BASE)) for _ in range(100)]
    await asyncio.sleep(0.2)
    for _ in range(3):
        await asyncio.wait_for(builds.build(needed, lambda _: BASE, is_needed=True), 10)
    assert not any(task.done() for task in registering)
    held.set()
    assert len({artifact.digest for artifact in await asyncio.gather(*registering)}) == 1
    assert most <= BUILDS_AT_ONCE
