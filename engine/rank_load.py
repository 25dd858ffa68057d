"""Artifacts on their way into the rows of a store, beside the steps.

Of each layer one contiguous copy goes to a staging buffer, from registered host memory where the driver can register
the mapped file, and one kernel from there into the rows: A as it is, B turned. On a device without streams the same is
done at once.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from engine.kernels.lora import launch
from engine.rank_pieces import PIECE, Layer
from engine.rank_rows import Rows

_log = logging.getLogger(__name__)

# torch has no types for these.
_cuda: Any = torch.cuda

# cudaHostRegisterReadOnly: the artifact is mapped, not ours to write.
_READ_ONLY = 8


@dataclass(frozen=True, slots=True)
class Destination:
    """Rows of one arena: its tensor [layers, rows, width], and which of them."""

    tensor: torch.Tensor
    rows: Rows


class Loader:
    """Copies artifacts to one device, one at a time, on one thread."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream: torch.cuda.Stream | None = _cuda.Stream(device) if device.type == "cuda" else None
        self._steps: torch.cuda.Stream | None = None
        self._staging = torch.empty(0, dtype=torch.uint8, device=device)
        self._held: list[tuple[torch.cuda.Event, _Registered]] = []
        self._registers = True

    def steps_on_this_stream(self) -> None:
        """Tells on which stream steps run: rows that are free may still be read by a step that was launched."""
        if self._stream is not None:
            self._steps = torch.cuda.current_stream(self._device)

    def fill(
        self, content: torch.Tensor, layers: Sequence[Layer], to: Sequence[Destination | None]
    ) -> dict[int, torch.cuda.Event]:
        """Starts to bring an artifact into its rows; returns, by projection, what to wait for before reading them.

        Args:
            content: uint8, the numbers of the artifact's file, in host memory.
            to: by arena.
        """
        if self._stream is None:
            self._bring(content, layers, to)
            return {}
        self._let_go()
        with torch.cuda.device(self._device):
            registered = _Registered(content, self._registers)
            self._registers = registered.is_pinned
            if self._steps is not None:
                self._stream.wait_stream(self._steps)
            try:
                with torch.cuda.stream(self._stream):
                    return self._bring(content, layers, to, pin=not registered.is_pinned)
            finally:
                # Also of a load that failed half-way: what was begun still reads.
                self._held.append((self._stream.record_event(), registered))

    def _bring(
        self,
        content: torch.Tensor,
        layers: Sequence[Layer],
        to: Sequence[Destination | None],
        pin: bool = False,
    ) -> dict[int, torch.cuda.Event]:
        blocks = [self._block(destination) for destination in to]
        flat = [number for layer in layers for placing in layer.placings for its in placing.pieces for number in its]
        pieces = self._uploaded(flat).view(-1, PIECE)
        staging = self._room(max((layer.stop - layer.start for layer in layers), default=0))
        arrivals: dict[int, torch.cuda.Event] = {}
        first = 0
        for layer in layers:
            source = content[layer.start : layer.stop]
            # On one stream: the copy of a layer begins after the one before it was placed.
            staging[: len(source)].copy_(source.pin_memory() if pin else source, non_blocking=True)
            for placing in layer.placings:
                destination = to[placing.arena]
                assert destination is not None
                tensor, (listed, start) = destination.tensor[placing.layer], blocks[placing.arena]
                mine = pieces[first : first + len(placing.pieces)]
                most = placing.most_rows(tensor.shape[1])
                launch.place(
                    staging.view(tensor.dtype), tensor, listed, mine, most, (start, destination.rows.is_scattered)
                )
                first += len(placing.pieces)
            if self._stream is not None:
                event = self._stream.record_event()
                arrivals |= dict.fromkeys(layer.projections, event)
        return arrivals

    def _block(self, destination: Destination | None) -> tuple[torch.Tensor, int]:
        """A list of the rows, where they are scattered, and the row or place of the list where they start."""
        if destination is None or not destination.rows.is_scattered:
            start = destination.rows.runs[0][0] if destination else 0
            return torch.empty(1, dtype=torch.int32, device=self._device), start
        return self._uploaded(destination.rows.listed()), 0

    def _uploaded(self, numbers: list[int]) -> torch.Tensor:
        host = torch.tensor(numbers, dtype=torch.int32)
        if self._stream is not None:
            host = host.pin_memory()
        return host.to(self._device, non_blocking=True)

    def _room(self, size: int) -> torch.Tensor:
        if len(self._staging) < size:
            # A multiple of the largest number, so that it can be viewed as any type.
            self._staging = torch.empty(-(-size // 16) * 16, dtype=torch.uint8, device=self._device)
        return self._staging

    def _let_go(self) -> None:
        """Unregisters what has been copied."""
        for event, registered in self._held:
            if has_passed(event):
                registered.close()
        self._held = [(event, registered) for event, registered in self._held if not registered.is_closed]


def has_passed(event: torch.cuda.Event) -> bool:
    """Whether the device has reached an event."""
    return bool(event.query())  # type: ignore[no-untyped-call]


class _Registered:
    """A mapped file, kept until it has been copied; registered with the driver, where that can be had."""

    def __init__(self, content: torch.Tensor, tried: bool) -> None:
        self._content: torch.Tensor | None = content
        self.is_pinned = tried and self._register(content)

    @property
    def is_closed(self) -> bool:
        return self._content is None

    def close(self) -> None:
        if self._content is not None and self.is_pinned:
            _cuda.cudart().cudaHostUnregister(self._content.untyped_storage().data_ptr())
        self._content = None

    @staticmethod
    def _register(content: torch.Tensor) -> bool:
        # The whole mapping, which begins with a page.
        memory = content.untyped_storage()
        refused = int(_cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.nbytes(), _READ_ONLY))
        if refused:
            _log.warning("the driver cannot register mapped artifacts (error %d); they are copied once more", refused)
            # The runtime keeps an error until somebody asks, and a launch would take it for its own.
            with contextlib.suppress(RuntimeError):
                torch.zeros(1, device="cuda")
        return not refused
