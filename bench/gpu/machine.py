"""The device, how long things take on it, and what it can do at best."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

# How long one measurement runs, in seconds, and how many there are; the figure is their median.
MEASURED = 0.08
ROUNDS = 3


@dataclass(frozen=True)
class Machine:
    """Where it runs. A dry run is on CPU and measures nothing worth keeping."""

    device: torch.device
    dtype: torch.dtype
    dry: bool

    @property
    def name(self) -> str:
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "dry run on CPU"

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def empty_cache(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def seconds(self, body: Callable[[], object]) -> float:
        """Median seconds of a call, back to back as a server makes them; warm."""
        if not self.dry:
            body()
            self.synchronize()
        began = time.perf_counter()
        body()
        self.synchronize()
        if self.dry:
            return time.perf_counter() - began
        count = max(3, min(200, int(MEASURED / (time.perf_counter() - began))))
        return statistics.median(self._mean(body, count) for _ in range(ROUNDS))

    def _mean(self, body: Callable[[], object], count: int) -> float:
        event: Any = torch.cuda.Event
        first, last = (event(enable_timing=True) for _ in range(2))
        first.record()
        for _ in range(count):
            body()
        last.record()
        last.synchronize()
        milliseconds: float = first.elapsed_time(last)
        return milliseconds / 1e3 / count


@dataclass(frozen=True)
class Ceilings:
    """Rates measured on this machine; floors are computed from them.

    Attributes:
        copy: bytes per second of a copy on the device, read and written counted.
        products: operations per second of a large matrix product.
        upload: bytes per second from pinned host memory to the device.
    """

    copy: float
    products: float
    upload: float


def measure_ceilings(machine: Machine) -> Ceilings:
    """Some seconds."""
    size = 1 << (12 if machine.dry else 31)
    source = torch.empty(size, dtype=torch.uint8, device=machine.device).random_()
    target = torch.empty_like(source)
    copy = 2 * size / machine.seconds(partial(target.copy_, source))
    del source, target
    side = 64 if machine.dry else 8192
    left, right = (torch.randn(side, side, device=machine.device).to(machine.dtype) for _ in range(2))
    products = 2 * side**3 / machine.seconds(lambda: torch.mm(left, right))
    size = 1 << (12 if machine.dry else 29)
    host = torch.empty(size, dtype=torch.uint8, pin_memory=not machine.dry).random_()
    place = torch.empty(size, dtype=torch.uint8, device=machine.device)
    upload = size / machine.seconds(lambda: place.copy_(host, non_blocking=True))
    machine.empty_cache()
    return Ceilings(copy, products, upload)
