"""Launches the attention kernels: shapes in, tile sizes chosen, nothing synchronised.

Tile sizes follow from head size and number type alone, and a row's splits from its own length alone: so the numbers a
row gets do not depend on what else is in the step.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from engine.blocks import BLOCK_SIZE
from engine.kernels.attention import kernels

# Places of a sequence that one program of decode reads.
SPLIT = 256
# Products of smaller operands do not exist on tensor cores.
NARROWEST = 16
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@dataclass(frozen=True, slots=True)
class Tiles:
    """Tile sizes of a launch: m queries by n keys, sizes padded to powers of two."""

    m: int
    n: int
    key: int
    value: int
    warps: int
    stages: int


def decode_tiles(group: int, key_size: int, value_size: int, itemsize: int) -> Tiles:
    """Tiles of decode for `group` query heads per kv head."""
    key, value = _padded(key_size), _padded(value_size)
    n = max(NARROWEST, min(64, 16384 // (max(key, value) * itemsize)))
    return Tiles(max(NARROWEST, _power(group)), n, key, value, 4, 2)


def prefill_rows(largest_size: int, itemsize: int) -> int:
    """Tokens of a tile of prefill where this is the largest head size of any layer."""
    return 64 if _padded(largest_size) * itemsize > 256 else 128


def prefill_tiles(m: int, key_size: int, value_size: int, itemsize: int) -> Tiles:
    """Tiles of prefill of m tokens."""
    key, value = _padded(key_size), _padded(value_size)
    n = max(NARROWEST, min(64, 16384 // (max(key, value) * itemsize)))
    return Tiles(m, n, key, value, m // 16, 2)


def splits_for(length: int) -> int:
    """Splits of the longest row of a step, as a power of two."""
    return _power(-(-max(length, 1) // SPLIT))


def tiles_of(counts: Iterable[int], m: int) -> list[tuple[int, int]]:
    """Tiles of prefill for chunks of so many tokens: (chunk, first token in it)."""
    return [(chunk, first) for chunk, count in enumerate(counts) for first in range(0, count, m)]


def write(
    key: torch.Tensor, value: torch.Tensor, slots: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
) -> None:
    """keys[slots[t]] = key[t], values[slots[t]] = value[t]; nothing where a slot is negative.

    Args:
        key, value: [T, kv_heads, size], dense in the last dimension.
        slots: [T] int32.
        keys, values: the pool, [slots, kv_heads, size].
    """
    if not len(key):
        return
    key, value = _dense(key), _dense(value)
    kv_heads, key_size, value_size = keys.shape[1], keys.shape[2], values.shape[2]
    kernels.write_kernel[(len(key),)](
        key, value, slots, keys, values,
        key.stride(0), key.stride(1), value.stride(0), value.stride(1), kv_heads, key_size, value_size,
        HEADS=_power(kv_heads), KEY=_padded(key_size), VALUE=_padded(value_size), num_warps=4,
    )  # fmt: skip


def decode(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    tables: torch.Tensor,
    rows: torch.Tensor,
    lengths: torch.Tensor,
    out: torch.Tensor,
    *,
    scaling: float,
    softcap: float | None,
    window: int | None,
    splits: int,
) -> None:
    """Attention of rows of one token, each to all tokens of its sequence.

    Args:
        query: [T, heads, key_size], dense in the last dimension.
        keys, values: the pool, [slots, kv_heads, size].
        tables: [R, blocks] int32, the blocks of each row's sequence.
        rows: [R] int32, which of the tokens each row is.
        lengths: [R] int32, tokens of each row's sequence with this one; 0 for padding, which gets zeros.
        out: [T, heads, value_size], contiguous; other tokens stay as they are.
        splits: `splits_for` the longest row, or more.
    """
    query = _dense(query)
    heads, key_size = query.shape[1:]
    kv_heads, value_size = keys.shape[1], values.shape[2]
    tiles = decode_tiles(heads // kv_heads, key_size, value_size, keys.element_size())
    # With one split nothing is joined, and these are not touched. Inside a graph they come from its own memory.
    count = len(rows) * heads * splits if splits > 1 else 0
    parts, bests, totals = (query.new_empty(size, dtype=torch.float32) for size in (count * value_size, count, count))
    kernels.decode_kernel[(len(rows), kv_heads, splits)](
        query, keys, values, tables, rows, lengths, out, parts, bests, totals,
        query.stride(0), query.stride(1), tables.stride(0), kv_heads, heads // kv_heads, key_size, value_size,
        scaling, softcap or 0.0, window or 0,
        BLOCK=BLOCK_SIZE, SPLIT=SPLIT, SPLITS=splits, M=tiles.m, N=tiles.n, KEY=tiles.key, VALUE=tiles.value,
        SOFTCAP=softcap is not None, WINDOW=window is not None, UPCAST=_INTERPRETED,
        num_warps=tiles.warps, num_stages=tiles.stages,
    )  # fmt: skip
    if splits > 1:
        kernels.join_kernel[(len(rows), heads)](
            rows, lengths, out, parts, bests, totals, heads, value_size, window or 0,
            SPLIT=SPLIT, SPLITS=splits, VALUE=tiles.value, WINDOW=window is not None, N=tiles.n, num_warps=1,
        )  # fmt: skip


def prefill(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    tables: torch.Tensor,
    tiles: torch.Tensor,
    chunks: torch.Tensor,
    out: torch.Tensor,
    *,
    m: int,
    scaling: float,
    softcap: float | None,
    window: int | None,
) -> None:
    """Attention of runs of tokens of several sequences, each to what comes before it; their keys are in the pool.

    Args:
        query: [T, heads, key_size], dense in the last dimension.
        keys, values: the pool, [slots, kv_heads, size].
        tables: [chunks, blocks] int32, the blocks of each chunk's sequence.
        tiles: [n, 2] int32, what `tiles_of` made of the chunks.
        chunks: [c, 3] int32: first token of the step, the first after it, tokens of the sequence before.
        out: [T, heads, value_size], contiguous; tokens of no chunk stay as they are.
        m: tokens of a tile.
    """
    query = _dense(query)
    heads, key_size = query.shape[1:]
    value_size = values.shape[2]
    sizes = prefill_tiles(m, key_size, value_size, keys.element_size())
    kernels.prefill_kernel[(heads, len(tiles))](
        query, keys, values, tables, tiles, chunks, out,
        query.stride(0), query.stride(1), tables.stride(0), heads, keys.shape[1], key_size, value_size,
        scaling, softcap or 0.0, window or 0,
        BLOCK=BLOCK_SIZE, M=sizes.m, N=sizes.n, KEY=sizes.key, VALUE=sizes.value,
        SOFTCAP=softcap is not None, WINDOW=window is not None, UPCAST=_INTERPRETED,
        num_warps=sizes.warps, num_stages=sizes.stages,
    )  # fmt: skip


def _dense(rows: torch.Tensor) -> torch.Tensor:
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def _power(number: int) -> int:
    return 1 << (number - 1).bit_length()


def _padded(size: int) -> int:
    return max(NARROWEST, _power(size))
