"""The KV pool: keys and values of all slots of all blocks."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from engine.blocks import BLOCK_SIZE


@dataclass(frozen=True, slots=True)
class LayerShape:
    """Keys and values of one token in one layer."""

    kv_heads: int
    key_size: int
    value_size: int


class KvPool:
    """Per layer [slots, kv_heads, size]. Slots of block 0 stay zero."""

    def __init__(
        self, layers: dict[int, LayerShape], block_count: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        slots = (block_count + 1) * BLOCK_SIZE
        self.layers = layers
        self.dtype = dtype
        # zeros, not empty: padded reads must be finite, and untouched zero pages cost no memory on CPU.
        self.keys = {
            number: torch.zeros(slots, shape.kv_heads, shape.key_size, dtype=dtype, device=device)
            for number, shape in layers.items()
        }
        self.values = {
            number: torch.zeros(slots, shape.kv_heads, shape.value_size, dtype=dtype, device=device)
            for number, shape in layers.items()
        }


def bytes_per_token(layers: dict[int, LayerShape], dtype: torch.dtype) -> int:
    """Memory of one token over all layers."""
    return sum(shape.kv_heads * (shape.key_size + shape.value_size) for shape in layers.values()) * dtype.itemsize


def bytes_per_block(layers: dict[int, LayerShape], dtype: torch.dtype) -> int:
    """Memory of one block over all layers."""
    return bytes_per_token(layers, dtype) * BLOCK_SIZE
