"""What the kernel computes."""

from __future__ import annotations

import torch


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """x · cos + turned(x) · sin in float32, where turned swaps the halves of the last dimension and negates the first.

    Args:
        x: [1, heads, T, D].
        cos, sin: [1, T, D].
    """
    first, second = x.float().chunk(2, -1)
    turned = torch.cat([-second, first], -1)
    return (x.float() * cos.float()[:, None] + turned * sin.float()[:, None]).to(x.dtype)
