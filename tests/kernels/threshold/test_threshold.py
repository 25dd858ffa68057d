"""The floors of top-k, top-p and min-p against a sort."""

from __future__ import annotations

import pytest
import torch

from engine.kernels.threshold import kernels, reference

pytestmark = pytest.mark.interpreted


@pytest.mark.parametrize("vocab", [300, 4097])
def test_what_is_dropped_is_what_a_sort_drops(vocab: int) -> None:
    torch.manual_seed(vocab)
    weights = torch.randn(8, vocab).mul_(3).softmax(-1)
    weights /= weights.amax(-1, keepdim=True)
    weights[1] = torch.linspace(0, 1, vocab).mul(4).round().div(4)  # ties
    weights[2] = 1.0
    weights[3, 5:] = 0.0
    weights[3, 0] = 1.0
    top_k = torch.tensor([5, 7, 3, vocab, vocab, 1, vocab, 40], dtype=torch.int32)
    top_p = torch.tensor([1.0, 0.4, 0.5, 0.9, 0.3, 0.9, 1.0, 0.8])
    min_p = torch.tensor([0.0, 0.0, 0.0, 0.0, 0.2, 0.0, 0.3, 0.0])
    floors = reference.floors(weights, top_k, top_p, min_p)
    expected = weights.masked_fill(weights < floors[:, None], 0.0)
    kernels.drop(weights, top_k, top_p, min_p)
    assert torch.equal(weights, expected)
