"""What the kernels compute, in plain torch, one row and one head group at a time. For tests; nothing here is fast.

The pool is `keys` [slots, kv_heads, key_size] and `values` [slots, kv_heads, value_size]. A sequence's token `place` is
in slot `table[place // BLOCK_SIZE] * BLOCK_SIZE + place % BLOCK_SIZE`.
"""

from __future__ import annotations

import torch

from engine.blocks import BLOCK_SIZE


def write(
    key: torch.Tensor, value: torch.Tensor, slots: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
) -> None:
    """keys[slots[t]] = key[t], values[slots[t]] = value[t]; nothing where a slot is negative."""
    for token, slot in enumerate(slots.tolist()):
        if slot >= 0:
            keys[slot], values[slot] = key[token], value[token]


def attend(
    query: torch.Tensor,
    context: int,
    table: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    scaling: float,
    softcap: float | None = None,
    window: int | None = None,
) -> torch.Tensor:
    """Attention of a run of a sequence's tokens, `context` earlier ones before them, in float32.

    out[t, h] = softmax(cap(query[t, h] · key[s, h // group] · scaling)) · value[s, h // group] over the places s that
    t sees: s <= context + t, and s > context + t - window where there is a window.

    Args:
        query: [T, heads, key_size].
        table: [blocks] the sequence's blocks.

    Returns [T, heads, value_size] float32.
    """
    count, heads, _ = query.shape
    length = context + count
    place = torch.arange(length)
    slots = table.long()[place // BLOCK_SIZE] * BLOCK_SIZE + place % BLOCK_SIZE
    repeats = heads // keys.shape[1]
    key = keys[slots].float().repeat_interleave(repeats, dim=1)
    value = values[slots].float().repeat_interleave(repeats, dim=1)
    scores = torch.einsum("thd,shd->hts", query.float(), key) * scaling
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    own = place[context:, None]
    visible = place <= own
    if window is not None:
        visible &= place > own - window
    shares = torch.softmax(scores.masked_fill(~visible, float("-inf")), dim=-1)
    return torch.einsum("hts,shd->thd", shares, value)
