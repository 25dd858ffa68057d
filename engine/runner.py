"""A batch becomes tensors, goes through the model, and comes back as logits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from engine.attention import PagedStep
from engine.batch import Batch
from engine.interrupts import Stop, never
from engine.lanes import Lanes
from engine.linear import ActiveAdapters
from engine.lora import Arranger, DeviceSegment
from engine.pool import KvPool


@dataclass(frozen=True, slots=True)
class Runner:
    """The model, its keys and values, and its adapters' hooks. Used by one thread at a time."""

    model: Any
    pool: KvPool
    lanes: Lanes
    active: ActiveAdapters
    adapters: Arranger
    device: torch.device

    @torch.inference_mode()
    def run(self, batch: Batch, segments: list[DeviceSegment], stop: Stop = never) -> torch.Tensor:
        """One forward pass.

        Returns float32 logits of batch.sampled_tokens, then of batch.scored_tokens: [as many as both, vocab_size].

        Args:
            batch: the step.
            segments: batch.segments with the adapters' tensors.
            stop: asked again and again, with the part of the pass that is done, whether it is given up.

        Raises:
            Interrupted: it was given up.
            what the model raises.
        """
        self.active.deltas = self.adapters.arrange(segments)
        try:
            output = self.model(
                input_ids=torch.tensor([batch.tokens], device=self.device),
                position_ids=torch.tensor([batch.positions], device=self.device),
                use_cache=False,
                logits_to_keep=torch.tensor(
                    batch.sampled_tokens + batch.scored_tokens, dtype=torch.long, device=self.device
                ),
                paged=PagedStep(batch, self.pool, self.lanes, self.device, stop),
            )
        finally:
            self.active.deltas = ()
        logits: torch.Tensor = output.logits[0]
        return logits.float()
