"""The kernel, and how it is launched."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def _rotate(x, out, token, x_token, x_head, heads, half, cos, sin, HEADS: tl.constexpr, HALF: tl.constexpr):
    head, at = tl.arange(0, HEADS)[:, None], tl.arange(0, HALF)[None, :]
    mask = (head < heads) & (at < half)
    mine = x + token * x_token + head * x_head + at
    first = tl.load(mine, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(mine + half, mask=mask, other=0.0).to(tl.float32)
    inside = at < half
    angle = token * 2 * half + at
    cos_first = tl.load(cos + angle, mask=inside, other=0.0).to(tl.float32)
    cos_second = tl.load(cos + angle + half, mask=inside, other=0.0).to(tl.float32)
    sin_first = tl.load(sin + angle, mask=inside, other=0.0).to(tl.float32)
    sin_second = tl.load(sin + angle + half, mask=inside, other=0.0).to(tl.float32)
    there = out + (token * heads + head) * 2 * half + at
    tl.store(there, (first * cos_first - second * sin_first).to(out.dtype.element_ty), mask=mask)
    tl.store(there + half, (second * cos_second + first * sin_second).to(out.dtype.element_ty), mask=mask)


@triton.jit
def rotary_kernel(
    query, key, query_out, key_out, cos, sin,
    query_token, query_head, key_token, key_head, heads, kv_heads, half,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """Program (token): all heads of its query and its key. See `reference`."""
    token = tl.program_id(0).to(tl.int64)
    _rotate(query, query_out, token, query_token, query_head, heads, half, cos, sin, HEADS, HALF)
    _rotate(key, key_out, token, key_token, key_head, kv_heads, half, cos, sin, KV_HEADS, HALF)


def rotate(
    query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Query and key turned; [1, heads, T, D] with the numbers of a token side by side, like what comes in.

    Args:
        query, key: [1, heads, T, D], dense in the last dimension.
        cos, sin: [1, T, D].
    """
    heads, count, size = query.shape[1:]
    kv_heads = key.shape[1]
    query_out, key_out = query.new_empty(1, count, heads, size), key.new_empty(1, count, kv_heads, size)
    rotary_kernel[(count,)](
        query, key, query_out, key_out, cos.contiguous(), sin.contiguous(),
        query.stride(2), query.stride(1), key.stride(2), key.stride(1), heads, kv_heads, size // 2,
        HEADS=triton.next_power_of_2(heads), KV_HEADS=triton.next_power_of_2(kv_heads),
        HALF=triton.next_power_of_2(size // 2), num_warps=4,
    )  # fmt: skip
    return query_out.transpose(1, 2), key_out.transpose(1, 2)
