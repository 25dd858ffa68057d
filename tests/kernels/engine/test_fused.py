"""Which small operations are replaced, and that a model computes the same with them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from engine.gpu.fused import fuse
from tests.engine.tiny import CONFIGS

pytestmark = pytest.mark.interpreted

# Norms and attentions of each family with three layers, as many as are like ours.
CHANGED = {
    "llama": 7 + 3,
    "mistral": 7 + 3,
    "qwen3": 7 + 6 + 3,
    "gemma2": 13 + 3,
    "gpt2": 0,
    "gpt_neox": 0,
    "granite": 7 + 3,
}


@pytest.mark.parametrize("family", CHANGED)
def test_a_model_computes_the_same_with_fused_operations(family: str) -> None:
    torch.manual_seed(0)
    make: Any = AutoModelForCausalLM.from_config
    model = make(copy.deepcopy(CONFIGS[family]), attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
        tokens = torch.randint(384, (1, 11))
        expected = model(input_ids=tokens, use_cache=False).logits
        assert fuse(model) == CHANGED[family]
        found = model(input_ids=tokens, use_cache=False).logits
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
