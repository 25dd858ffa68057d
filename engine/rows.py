"""Adapters on the device.

`ArtifactReader` runs off the step thread: it maps a packed artifact, checks that it is what it says and fits this
base, and copies it to the device. `AdapterRows` belongs to the step thread: which adapters are there, who uses them,
and which generation their rows are of. Whoever uses an adapter was promised a generation and asks for that one in every
step, so rows that were taken away or replaced under a running sequence fail the step instead of answering with other
weights.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from engine.errors import BadArtifact, DeviceFull, StaleRows
from engine.lora import Delta, DeviceAdapter, Part, Projection, TargetModule, delta_of

FORMAT = "loraplex-artifact-1"
# What safetensors allows.
MAX_HEADER = 100_000_000
# So many shapes of adapters are remembered, those of the longest ago are forgotten.
LAYOUTS = 8
_METADATA = re.compile(rb'\{"__metadata__":(\{[^{}]*\}),')

Pair = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True, slots=True)
class Layout:
    """Where the numbers of an artifact go on the device.

    An artifact has hundreds of tensors. To join and turn each of them by itself takes Python's lock hundreds of times, and
    the steps, which take it for each of their operations, would wait; so it is one gather over all, which needs no lock.

    Attributes:
        order: for each number on the device its place in the file, int32.
        deltas: as they will be, of places instead of numbers.
        sizes: of the tensors of `deltas`, in numbers, in their order.
    """

    order: torch.Tensor
    deltas: tuple[Delta | None, ...]
    sizes: list[int]

    @classmethod
    def of(cls, deltas: Sequence[Delta | None], device: torch.device) -> Layout:
        """From deltas of places."""
        tensors = [tensor for delta in deltas if delta for tensor in (delta.a, *(p.b for p in delta.parts))]
        order = torch.cat([tensor.flatten() for tensor in tensors]).to(device)
        return cls(order, tuple(deltas), [tensor.numel() for tensor in tensors])

    def arrange(self, numbers: torch.Tensor) -> tuple[Delta | None, ...]:
        """The deltas of an artifact from its numbers [N] as they are in the file."""
        pieces = iter(torch.split(numbers.index_select(0, self.order), self.sizes))

        def filled(delta: Delta) -> Delta:
            shrink = next(pieces).view(delta.a.shape)
            parts = tuple(Part(p.ranks, p.columns, next(pieces).view(p.b.shape)) for p in delta.parts)
            return Delta(shrink, parts, delta.span)

        return tuple(delta and filled(delta) for delta in self.deltas)


class Memory:
    """Host memory that files are read to, one after another: new memory for each is as much work as the reading."""

    def __init__(self) -> None:
        self._bytes = torch.empty(0, dtype=torch.uint8)

    def of(self, size: int) -> torch.Tensor:
        """uint8 [size], until the next is asked for."""
        if len(self._bytes) < size:
            self._bytes = torch.empty(size, dtype=torch.uint8)
        return self._bytes[:size]


@dataclass(frozen=True, slots=True)
class ArtifactReader:
    """Reads packed artifacts for one base, one at a time.

    Attributes:
        host_tier: folder artifacts must lie in once symbolic links are resolved, or a pattern of such folders.
        projections: the base's.
        layouts: by what the headers of artifacts say beside their digests.
        memory: that the artifact is in until it is on the device.
    """

    host_tier: str
    projections: tuple[Projection, ...]
    dtype: torch.dtype
    device: torch.device
    max_rank: int
    layouts: dict[bytes, Layout] = field(default_factory=dict, kw_only=True, compare=False, repr=False)
    memory: Memory = field(default_factory=Memory, kw_only=True, compare=False, repr=False)

    def read(self, digest: str, path: str) -> DeviceAdapter:
        """Brings an artifact to the device; raises BadArtifact and names what is wrong with it."""
        real = self.located(path)
        header, content = self._content(real)
        metadata = _METADATA.match(header)
        # Artifacts that differ in their numbers alone have the same header, but for the metadata.
        key = header[metadata.end() :] if metadata else b""
        layout = self.layouts.get(key)
        if metadata and layout:
            self._check_identity(digest, json.loads(metadata[1]))
        else:
            layout = self.layouts[key] = self._layout(real, digest)
            if len(self.layouts) > LAYOUTS:
                del self.layouts[next(iter(self.layouts))]
        if content.numel() != layout.order.numel() * self.dtype.itemsize:
            raise BadArtifact(f"{real.name} is not as long as it says", path=str(real))
        return DeviceAdapter(digest, layout.arrange(content.view(self.dtype).to(self.device)), content.nbytes)

    def _content(self, real: Path) -> tuple[bytes, torch.Tensor]:
        """The header, and what follows it: a copy, as the file may be truncated or removed while it is used."""
        try:
            with real.open("rb") as file:
                length = int.from_bytes(file.read(8), "little")
                header = file.read(min(length, MAX_HEADER))
                content = self.memory.of(max(0, os.fstat(file.fileno()).st_size - 8 - length))
                # Lets other threads run meanwhile.
                read = file.readinto(content.numpy().data)
        except OSError as error:
            raise BadArtifact(f"{real.name} cannot be read: {error}", path=str(real)) from None
        return header, content[:read]

    def _layout(self, real: Path, digest: str) -> Layout:
        """Checks an artifact, and finds where its numbers go by doing to their places what is to be done to them."""
        with self.opened(real, digest) as file:
            tensors = {name: file.get_tensor(name) for name in file.offset_keys()}
        self.pairs(tensors)
        total = sum(tensor.numel() for tensor in tensors.values())
        places = torch.split(torch.arange(total, dtype=torch.int32), [tensor.numel() for tensor in tensors.values()])
        numbered = {name: each.view(tensors[name].shape) for name, each in zip(tensors, places, strict=True)}
        pairs = replace(self, dtype=torch.int32).pairs(numbered)
        return Layout.of([delta_of(*each) for each in zip(self.projections, pairs, strict=True)], self.device)

    def located(self, path: str) -> Path:
        """The file itself; raises BadArtifact when it lies outside of the HOST tier."""
        real = Path(os.path.realpath(path))
        if not any(fnmatchcase(str(folder), self.host_tier) for folder in real.parents):
            raise BadArtifact(f"{path} lies outside of the HOST tier", path=path)
        return real

    @contextmanager
    def opened(self, real: Path, digest: str) -> Iterator[Any]:
        """The open file of the artifact of this digest; whatever cannot be read of it is a BadArtifact."""
        try:
            with safe_open(real, framework="pt") as file:
                self._check_identity(digest, file.metadata() or {})
                yield file
        except (OSError, SafetensorError) as error:
            raise BadArtifact(f"{real.name} cannot be read: {error}", path=str(real)) from None

    def _check_identity(self, digest: str, metadata: dict[str, str]) -> None:
        if metadata.get("format") != FORMAT:
            raise BadArtifact(f"the artifact's format is {metadata.get('format')!r}, not {FORMAT}")
        if metadata.get("digest") != digest:
            raise BadArtifact("the artifact is of another version", digest=digest, found=metadata.get("digest"))

    def pairs(self, tensors: dict[str, torch.Tensor]) -> list[list[Pair | None]]:
        """A and B of each target by projection, None where the adapter has none; raises BadArtifact unless all fit."""
        left = dict(tensors)
        pairs = [[self._pair(target, left) for target in projection.targets] for projection in self.projections]
        if left:
            raise BadArtifact(f"this base has no target module for {min(left)}", tensor=min(left))
        if not tensors:
            raise BadArtifact("the artifact has no tensors")
        return pairs

    def _pair(self, target: TargetModule, left: dict[str, torch.Tensor]) -> Pair | None:
        a, b = left.pop(f"{target.name}.A", None), left.pop(f"{target.name}.B", None)
        if a is None and b is None:
            return None
        if a is None or b is None:
            raise BadArtifact(f"{target.name} has half a pair", module=target.name)
        rank = a.shape[0]
        if a.shape != (rank, target.in_features) or b.shape != (target.out_features, rank):
            raise BadArtifact(
                f"{target.name}: A {list(a.shape)} and B {list(b.shape)} do not fit a layer of "
                f"{target.in_features} to {target.out_features}",
                module=target.name,
            )
        if not 1 <= rank <= self.max_rank:
            raise BadArtifact(f"{target.name}: rank {rank}, the limit is {self.max_rank}", limit=self.max_rank)
        if a.dtype != self.dtype or b.dtype != self.dtype:
            raise BadArtifact(f"{target.name}: {a.dtype} where this engine runs {self.dtype}", module=target.name)
        return a, b


@dataclass(slots=True)
class _Entry:
    adapter: DeviceAdapter
    generation: int
    users: int = 0


class AdapterRows:
    """The adapters on the device, within a budget of bytes."""

    def __init__(self, budget_bytes: int) -> None:
        self.budget_bytes = budget_bytes
        self.used_bytes = 0
        self._entries: dict[str, _Entry] = {}
        self._generation = 0

    def __contains__(self, digest: str) -> bool:
        return digest in self._entries

    @property
    def digests(self) -> Sequence[str]:
        return tuple(self._entries)

    def size_of(self, digest: str) -> int:
        """Bytes of an adapter that is here."""
        return self._entries[digest].adapter.size_bytes

    def install(self, adapter: DeviceAdapter) -> None:
        """Adds an adapter that is not here yet; raises DeviceFull, with nothing changed, when it does not fit."""
        assert adapter.digest not in self._entries
        free = self.budget_bytes - self.used_bytes
        if adapter.size_bytes > free:
            raise DeviceFull(adapter.size_bytes, free, self.budget_bytes)
        self._generation += 1
        self._entries[adapter.digest] = _Entry(adapter, self._generation)
        self.used_bytes += adapter.size_bytes

    def can_evict(self, digest: str) -> bool:
        """Whether no sequence uses the adapter. True for one that is not here."""
        entry = self._entries.get(digest)
        return entry is None or entry.users == 0

    def evict(self, digest: str) -> None:
        """Removes an adapter nobody uses; ask `can_evict` first."""
        assert self.can_evict(digest)
        entry = self._entries.pop(digest, None)
        if entry is not None:
            self.used_bytes -= entry.adapter.size_bytes
            entry.adapter.release()

    def acquire(self, digest: str) -> int:
        """Counts one more user; returns the generation it is promised."""
        entry = self._entries[digest]
        entry.users += 1
        return entry.generation

    def release(self, digest: str, generation: int) -> None:
        """Counts one user less; where the rows it was promised are gone, so is their count."""
        entry = self._entries.get(digest)
        if entry is not None and entry.generation == generation:
            assert entry.users > 0
            entry.users -= 1

    def adapter(self, digest: str, generation: int) -> DeviceAdapter:
        """The tensors of an adapter; raises StaleRows unless they are of the generation that was promised."""
        entry = self._entries.get(digest)
        if entry is None or entry.generation != generation:
            raise StaleRows(digest, generation, entry.generation if entry else None)
        return entry.adapter
