"""Random adapters, packed as the cache would pack them, or as PEFT folders to register."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from engine.lora import TargetModule
from engine.rows import FORMAT

# Small enough that answers stay finite, large enough that they differ from the base's.
SCALE = 0.02


def write_artifact(folder: Path, number: int, targets: tuple[TargetModule, ...], rank: int, dtype: torch.dtype) -> Path:
    """An adapter over all linear layers; its digest is the file's name."""
    generator = torch.Generator().manual_seed(number)
    tensors: dict[str, torch.Tensor] = {}
    for target in targets:
        a = torch.randn(rank, target.in_features, generator=generator) * SCALE
        b = torch.randn(target.out_features, rank, generator=generator) * SCALE
        tensors |= {f"{target.name}.A": a.to(dtype), f"{target.name}.B": b.to(dtype)}
    path = folder / f"random-{number:04d}"
    save_file(tensors, path, metadata={"format": FORMAT, "digest": path.name, "rank": str(rank)})
    return path


def write_peft_folder(folder: Path, number: int, targets: tuple[TargetModule, ...], rank: int) -> Path:
    """The same adapter as a PEFT folder in float32."""
    generator = torch.Generator().manual_seed(number)
    path = folder / f"random-{number:04d}"
    path.mkdir()
    tensors: dict[str, torch.Tensor] = {}
    for target in targets:
        prefix = f"base_model.model.{target.name}"
        tensors[f"{prefix}.lora_A.weight"] = torch.randn(rank, target.in_features, generator=generator) * SCALE
        tensors[f"{prefix}.lora_B.weight"] = torch.randn(target.out_features, rank, generator=generator) * SCALE
    save_file(tensors, path / "adapter_model.safetensors", metadata={"format": "pt"})
    modules = sorted({target.name.rpartition(".")[2] for target in targets})
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": modules, "bias": "none"}
    (path / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    return path
