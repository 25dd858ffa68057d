"""How adapters are kept and computed on a device: as rows by kernels, or as tensors by torch."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from engine.lora import Arranger
from engine.packs import Packs
from engine.projection import Projection
from engine.rows import ArtifactReader
from servicekit.errors import StartupError


def arranger_for(
    projections: Sequence[Projection], adapter_bytes: int, dtype: torch.dtype, device: torch.device, *, kernels: bool
) -> Arranger:
    """What computes the adapters of steps. Rows take all of the device memory for adapters at once.

    Raises StartupError when kernels are wanted and there is no Triton.
    """
    if not kernels:
        return Packs(device)
    try:
        from engine.rank_store import RankStore
    except ImportError as error:
        raise StartupError(f"the kernels need Triton, which cannot be imported: {error}") from None
    return RankStore(projections, adapter_bytes, dtype, device)


def reader_for(
    arranger: Arranger, host_tier: str, projections: tuple[Projection, ...], dtype: torch.dtype, max_rank: int
) -> ArtifactReader:
    """What brings artifacts to where this arranger computes them from; see ArtifactReader."""
    if isinstance(arranger, Packs):
        return ArtifactReader(host_tier, projections, dtype, arranger.device, max_rank)
    from engine.rank_reader import RankReader
    from engine.rank_store import RankStore

    assert isinstance(arranger, RankStore)
    return RankReader(host_tier, projections, dtype, arranger.device, max_rank, arranger)
