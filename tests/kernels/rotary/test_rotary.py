"""Rotary embedding against its reference."""

from __future__ import annotations

import pytest
import torch

from engine.kernels.rotary import kernels, reference

pytestmark = pytest.mark.interpreted


@pytest.mark.parametrize(("heads", "kv_heads", "size"), [(4, 2, 64), (3, 3, 80), (5, 1, 12)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_queries_and_keys_are_turned_by_their_token_s_angles(
    heads: int, kv_heads: int, size: int, dtype: torch.dtype
) -> None:
    torch.manual_seed(size)
    # As models hand them over: columns of one joined product, heads first.
    joined = torch.randn(1, 7, (heads + kv_heads) * size).to(dtype)
    query = joined[..., : heads * size].view(1, 7, heads, size).transpose(1, 2)
    key = joined[..., heads * size :].view(1, 7, kv_heads, size).transpose(1, 2)
    cos, sin = torch.randn(1, 7, size).to(dtype), torch.randn(1, 7, size).to(dtype)
    for found, given in zip(kernels.rotate(query, key, cos, sin), (query, key), strict=True):
        torch.testing.assert_close(found, reference.rotate(given, cos, sin), atol=1e-6, rtol=1e-2)
