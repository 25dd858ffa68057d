"""What the kernel computes, by sorting."""

from __future__ import annotations

import torch


def floors(weights: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor, min_p: torch.Tensor) -> torch.Tensor:
    """The smallest weight of each row that is kept; the largest of a row is 1.

    A weight is inside top-k when fewer than k are larger, and inside top-p when those larger, of what top-k left, sum
    to less than that share of what top-k left.

    Args:
        weights: [R, vocab] float32, from 0 to 1.
        top_k: [R] int32; vocab or more keeps all.
        top_p, min_p: [R] float32; 1 and 0 keep all.

    Returns [R] float32.
    """
    found = []
    for row, k, p, least in zip(weights, top_k.tolist(), top_p.tolist(), min_p.tolist(), strict=True):
        best = row.sort(descending=True).values
        floor = best[min(k, len(best)) - 1]
        left = best[best >= floor].double()
        if p < 1:
            before = left.cumsum(0) - left
            floor = torch.maximum(floor, left[before < p * left.sum()].min().float())
        found.append(torch.maximum(floor, torch.tensor(least)))
    return torch.stack(found)
