"""Packed artifacts read into the rows of a store."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from engine.lora import DeviceAdapter
from engine.rank_pieces import Extent, Plan
from engine.rank_store import RankStore
from engine.rows import ArtifactReader

MOST_PLANS = 64

# Number types of safetensors that artifacts may have.
_TYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class RankReader(ArtifactReader):
    """Reads packed artifacts into rows; refuses the same ones as its parent, and for the same reasons."""

    store: RankStore
    # By what the header says of the tensors: adapters of one shape, as most are, are looked at once.
    plans: dict[tuple[object, ...], Plan] = field(default_factory=dict)

    def read(self, digest: str, path: str) -> DeviceAdapter:
        """Starts to bring an artifact to the device; raises BadArtifact and names what is wrong with it.

        Raises DeviceFull when too few rows are free.
        """
        real = self.located(path)
        # Opened first, as that checks the header: no tensor lies outside of the file or in another one.
        with self.opened(real, digest):
            content = torch.from_file(str(real), shared=False, size=real.stat().st_size, dtype=torch.uint8)
        begin, header = _header(content)
        form = tuple((name, entry["dtype"], *entry["shape"], *entry["data_offsets"]) for name, entry in header.items())
        plan = self.plans.get(form)
        if plan is None:
            # Tensors without memory, to be looked at like any others.
            self.pairs({name: _shape_of(entry) for name, entry in header.items()})
            plan = self.store.plan({name: _extent(name, entry) for name, entry in header.items()})
            if len(self.plans) >= MOST_PLANS:
                self.plans.clear()
            self.plans[form] = plan
        return self.store.load(digest, content[begin:], plan)


def _header(content: torch.Tensor) -> tuple[int, Mapping[str, Any]]:
    """Where the numbers begin, and what is said of each tensor."""
    length = int.from_bytes(content[:8].numpy().tobytes(), "little")
    header: dict[str, Any] = json.loads(content[8 : 8 + length].numpy().tobytes())
    header.pop("__metadata__", None)
    return 8 + length, header


def _shape_of(entry: Mapping[str, Any]) -> torch.Tensor:
    return torch.empty(entry["shape"], dtype=_TYPES.get(entry["dtype"], torch.float64), device="meta")


def _extent(name: str, entry: Mapping[str, Any]) -> Extent:
    rank: int = entry["shape"][0 if name.endswith(".A") else 1]
    start, stop = entry["data_offsets"]
    return Extent(start, stop, rank)
