"""One step of a tiny model with the kernels themselves: adapters loaded, placed, shrunk and expanded by them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.engine.tiny import Oracle, make_adapter, make_model
from tests.kernels.lora.served import logits, read, with_rows

pytestmark = pytest.mark.interpreted

PROMPT = [5, 80, 33]


def test_a_step_of_mixed_adapters_and_the_base_gives_what_peft_gives(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "tiny-llama", "llama", num_hidden_layers=1)
    adapters = [
        make_adapter(folder, tmp_path, "three", 3, ["q_proj", "v_proj", "down_proj"]),
        make_adapter(folder, tmp_path, "seven", 7, ["k_proj", "o_proj", "gate_proj", "up_proj"], rslora=True),
    ]
    oracle = Oracle(folder, adapters)
    base, store = with_rows(folder)
    held = [read(base, store, adapter) for adapter in adapters]
    held[0].release()
    held[0] = read(base, store, adapters[0])
    for prompts in ([(PROMPT, held[0]), ([9], None), (PROMPT[:2], held[1])], [(PROMPT[:1], one) for one in held]):
        for (prompt, adapter), found in zip(prompts, logits(base, prompts), strict=True):
            right = oracle.logits(prompt, adapter.digest if adapter else "")[-1]
            torch.testing.assert_close(found, right, rtol=1e-3, atol=1e-3 * float(right.abs().max()))
