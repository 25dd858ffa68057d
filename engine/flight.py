"""A step between its launch and its tokens.

On a GPU a step is launched without waiting for it: while it runs, the one before is read and the one after is prepared.
Where a step's tokens are not known yet, the next one takes them from the device; on the host such a token is UNKNOWN.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch

from engine.batch import Batch
from engine.interrupts import Stop, never
from engine.live import Live
from engine.lora import Arranger, DeviceSegment
from engine.outcome import Outcome, read_logits
from engine.pool import KvPool
from engine.sequence import Sequence


class Flight(Protocol):
    """A step that was launched.

    Attributes:
        may_stay: whether the next step may be launched before this one has landed.
    """

    @property
    def may_stay(self) -> bool: ...

    def land(self) -> list[Outcome]:
        """Waits for the step; one outcome for each sequence it brought one."""


class Launcher(Protocol):
    """Runs steps."""

    def launch(self, batch: Batch, segments: list[DeviceSegment], lives: Mapping[Sequence, Live]) -> Flight:
        """Begins a step; the ones launched before are computed first.

        Args:
            segments: batch.segments with the adapters' tensors.
            lives: has all sequences of the batch.

        Raises:
            Interrupted: the step was given up; only where it is computed before this returns.
        """


@dataclass(frozen=True, slots=True)
class Landed:
    """A step that is over."""

    outcomes: list[Outcome]
    may_stay: bool = False

    def land(self) -> list[Outcome]:
        return self.outcomes


class Runs(Protocol):
    """A model, its keys and values, and its adapters."""

    @property
    def pool(self) -> KvPool: ...

    @property
    def adapters(self) -> Arranger: ...

    def run(self, batch: Batch, segments: list[DeviceSegment], stop: Stop = never) -> torch.Tensor:
        """Float32 logits of batch.sampled_tokens, then of batch.scored_tokens; see `engine.runner`."""


@dataclass(frozen=True, slots=True)
class Waiting:
    """Launches steps of a runner that computes them at once; asks `stop` meanwhile, see `engine.runner`."""

    runner: Runs
    stop: Stop

    def launch(self, batch: Batch, segments: list[DeviceSegment], lives: Mapping[Sequence, Live]) -> Flight:
        return Landed(read_logits(batch, self.runner.run(batch, segments, self.stop), lives))
