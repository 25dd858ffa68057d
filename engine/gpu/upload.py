"""Metadata of a step: written on the host into one int32 buffer, brought to the device by one copy.

A `Layout` says where each field is. The buffer on the device is always the same one, so that a captured graph finds
there what the step after wrote; the host has as many as steps can be under way, as a copy may still be reading one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

# Steps that may be under way while the next one is written.
HOSTS = 3
# Fields begin at multiples of 16 bytes: kernels are compiled for how their arguments are aligned.
ALIGNMENT = 4

Ints = npt.NDArray[np.int32]


@dataclass(frozen=True)
class Layout:
    """Names and sizes, in int32, of the fields of a step."""

    sizes: tuple[tuple[str, int], ...]

    @property
    def places(self) -> dict[str, slice]:
        """Where each field is."""
        found: dict[str, slice] = {}
        start = 0
        for name, size in self.sizes:
            found[name] = slice(start, start + size)
            start += -(-size // ALIGNMENT) * ALIGNMENT
        return found

    @property
    def total(self) -> int:
        """Size of all of them."""
        return sum(-(-size // ALIGNMENT) * ALIGNMENT for _, size in self.sizes)


def event() -> torch.cuda.Event:
    """A new event, not timed."""
    made: Any = torch.cuda.Event
    new: torch.cuda.Event = made()
    return new


class Upload:
    """The buffers. Used by one thread at a time.

    Args:
        capacity: int32 of the largest layout.
    """

    def __init__(self, capacity: int, device: torch.device) -> None:
        self._is_cuda = device.type == "cuda"
        self.device = torch.zeros(capacity, dtype=torch.int32, device=device)
        self._hosts = [
            torch.zeros(capacity, dtype=torch.int32, device="cpu", pin_memory=self._is_cuda) for _ in range(HOSTS)
        ]
        self._copied = [event() for _ in range(HOSTS)] if self._is_cuda else []
        self._turn = 0

    @property
    def capacity(self) -> int:
        return len(self.device)

    def begin(self) -> Ints:
        """The host buffer to write the next step into; waits where the copy of an earlier step still reads it."""
        self._turn = (self._turn + 1) % HOSTS
        if self._is_cuda:
            self._copied[self._turn].synchronize()
        buffer: Ints = self._hosts[self._turn].numpy()
        return buffer

    def send(self, count: int) -> None:
        """Copies the first `count` numbers to the device, in order of the current stream."""
        self.device[:count].copy_(self._hosts[self._turn][:count], non_blocking=True)
        if self._is_cuda:
            self._copied[self._turn].record()

    def views(self, layout: Layout) -> dict[str, torch.Tensor]:
        """The fields on the device."""
        return {name: self.device[place] for name, place in layout.places.items()}


class Tables:
    """Block tables as arrays, kept from step to step: most rows of a step had the same blocks in the step before."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[list[int], Ints]] = {}

    def rows(self, owners: Sequence[tuple[int, list[int]]]) -> list[Ints]:
        """One array for each (sequence, its blocks); forgets all other sequences."""
        known: dict[int, tuple[list[int], Ints]] = {}
        for owner, blocks in owners:
            before = self._known.get(owner)
            if before is None or before[0] != blocks:
                before = (list(blocks), np.array(blocks, dtype=np.int32))
            known[owner] = before
        self._known = known
        return [known[owner][1] for owner, _ in owners]
