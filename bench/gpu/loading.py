"""How long an adapter takes from each tier to the device."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from bench.gpu import adapters as made
from bench.gpu.machine import Ceilings, Machine
from bench.gpu.report import Figure
from engine.model import Base


def measure(machine: Machine, base: Base, rank: int, ceilings: Ceilings) -> Iterator[Figure]:
    """One adapter, from a file on disk that is in no cache, and from shared memory, for the first time and again."""
    section = f"{base.name}: loading an adapter of rank {rank}"
    floor = rank * made.bytes_per_rank(base) / ceilings.upload * 1e3
    shared = Path("/dev/shm")
    tiers = (("disk", None), ("host", shared if shared.is_dir() else None))
    for tier, folder in tiers:
        with tempfile.TemporaryDirectory(dir=folder) as name:
            path = made.write_artifact(machine, base, Path(name).resolve(), rank)
            _settle(path)
            for attempt in ("first time", "again"):
                began = time.perf_counter()
                adapter = made.load(machine, base, path, 0)
                milliseconds = (time.perf_counter() - began) * 1e3
                machine.synchronize()
                adapter.release()
                if tier == "disk" and attempt == "again":
                    continue  # then it is in the page cache
                yield Figure(section, f"from {tier}, {attempt}", milliseconds, "ms", floor)


def _settle(path: Path) -> None:
    """Writes a file through to its disk and drops it from the page cache, where there is one."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
