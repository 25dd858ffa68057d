"""Random adapters on the device, all of one file: their rows differ, their numbers need not."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from bench.gpu.machine import Machine
from engine.adapters import reader_for
from engine.lora import DeviceAdapter
from engine.model import Base
from engine.rows import FORMAT

SCALE = 0.02
MAX_RANK = 512


def bytes_per_rank(base: Base) -> int:
    """Of an adapter over all linear layers."""
    numbers = sum(target.in_features + target.out_features for target in base.targets)
    dtype: torch.dtype = getattr(torch, base.dtype)
    return numbers * dtype.itemsize


def name_of(number: int) -> str:
    """The digest of an adapter. All are of one length: the file's header is written over in place."""
    return f"random-{number:04d}"


def write_artifact(machine: Machine, base: Base, folder: Path, rank: int, scale: float = SCALE) -> Path:
    """Adapter 0 of a rank, over all linear layers; another one every time."""
    tensors: dict[str, torch.Tensor] = {}
    for target in base.targets:
        for half, shape in (("A", (rank, target.in_features)), ("B", (target.out_features, rank))):
            numbers = torch.randn(shape, device=machine.device) * scale
            tensors[f"{target.name}.{half}"] = numbers.to(getattr(torch, base.dtype)).cpu()
    path = folder / f"rank-{rank}"
    save_file(tensors, path, metadata={"format": FORMAT, "digest": name_of(0), "rank": str(rank)})
    return path


def read_pairs(path: Path, device: torch.device) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """A and B of each module."""
    tensors = load_file(path, device=str(device))
    return {name[:-2]: (tensors[name], tensors[name[:-1] + "B"]) for name in tensors if name.endswith(".A")}


def rename(path: Path, number: int) -> None:
    """Makes the file that of another adapter."""
    with path.open("r+b") as file:
        header = file.read(8 + int.from_bytes(file.read(8), "little"))
        place = 8 + header.index(b"random-")
        file.seek(place)
        file.write(name_of(number).encode())


def load(machine: Machine, base: Base, path: Path, number: int) -> DeviceAdapter:
    """Brings an adapter to the device and waits until it is there."""
    rename(path, number)
    reader = reader_for(base.runner.adapters, str(path.parent), base.projections, getattr(torch, base.dtype), MAX_RANK)
    adapter = reader.read(name_of(number), str(path))
    machine.synchronize()
    return adapter


@contextmanager
def loaded(machine: Machine, base: Base, rank: int, count: int) -> Iterator[list[DeviceAdapter]]:
    """So many adapters on the device; their rows are free again afterwards."""
    shared = Path("/dev/shm")
    adapters: list[DeviceAdapter] = []
    with tempfile.TemporaryDirectory(dir=shared if shared.is_dir() else None) as folder:
        path = write_artifact(machine, base, Path(folder).resolve(), rank)
        try:
            for number in range(count):
                adapters.append(load(machine, base, path, number))
            yield adapters
        finally:
            machine.synchronize()
            for adapter in adapters:
                adapter.release()
