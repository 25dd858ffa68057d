"""Finds the floors by bisection over the numbers a float32 can be: 31 looks at a row, and the answer is exact."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

TILE = 4096
# The bits of 1.0, the largest weight. Of positive floats, the larger has the larger bits.
ONE = tl.constexpr(0x3F800000)


@triton.jit
def floor_kernel(weights, top_k, top_p, min_p, floors, vocab, TILE: tl.constexpr):
    """Program (row). See `reference`."""
    row = tl.program_id(0).to(tl.int64)
    mine = weights + row * vocab
    at = tl.arange(0, TILE)
    k, p = tl.load(top_k + row), tl.load(top_p + row)
    floor = tl.load(min_p + row) * 0.0
    if k < vocab:
        low, high = k * 0, k * 0 + ONE
        while low < high:
            middle = (low + high) // 2
            edge = middle.to(tl.float32, bitcast=True)
            count = k * 0
            for start in range(0, vocab, TILE):
                its = tl.load(mine + start + at, mask=start + at < vocab, other=0.0)
                count += tl.sum((its > edge).to(tl.int32), 0)
            low = tl.where(count < k, low, middle + 1)
            high = tl.where(count < k, middle, high)
        floor = high.to(tl.float32, bitcast=True)
    if p < 1.0:
        whole = (p * 0.0).to(tl.float64)
        for start in range(0, vocab, TILE):
            its = tl.load(mine + start + at, mask=start + at < vocab, other=0.0)
            whole += tl.sum(tl.where(its >= floor, its, 0.0).to(tl.float64), 0)
        wanted = p.to(tl.float64) * whole
        low, high = k * 0, k * 0 + ONE
        while low < high:
            middle = (low + high) // 2
            edge = middle.to(tl.float32, bitcast=True)
            mass = (p * 0.0).to(tl.float64)
            for start in range(0, vocab, TILE):
                its = tl.load(mine + start + at, mask=start + at < vocab, other=0.0)
                mass += tl.sum(tl.where((its > edge) & (its >= floor), its, 0.0).to(tl.float64), 0)
            low = tl.where(mass < wanted, low, middle + 1)
            high = tl.where(mass < wanted, middle, high)
        floor = tl.maximum(floor, high.to(tl.float32, bitcast=True))
    tl.store(floors + row, tl.maximum(floor, tl.load(min_p + row)))


def drop(weights: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor, min_p: torch.Tensor) -> None:
    """Zeroes what top-k, top-p and min-p drop of weights [R, vocab], in place; for the arguments see `reference`."""
    floors = torch.empty_like(top_p)
    floor_kernel[(len(weights),)](weights, top_k, top_p, min_p, floors, weights.shape[1], TILE=TILE, num_warps=8)
    weights.masked_fill_(weights < floors[:, None], 0.0)
