"""The same decode step by transformers alone, and by PEFT with a batch of mixed adapters."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import DynamicCache

from bench.gpu.machine import Machine

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
HAS_PEFT = importlib.util.find_spec("peft") is not None


def decode_seconds(machine: Machine, model: Any, rows: int, context: int, **given: Any) -> float:
    """Seconds of one forward pass of `rows` sequences with `context` tokens in a dynamic cache."""
    config = model.config
    size = config.hidden_size // config.num_attention_heads
    shape = (rows, config.num_key_value_heads, context, size)
    tokens = torch.randint(config.vocab_size, (rows, 1), device=machine.device)
    cache = DynamicCache()
    for layer in range(config.num_hidden_layers):
        key, value = (torch.randn(shape, device=machine.device).to(machine.dtype) for _ in range(2))
        cache.update(key, value, layer)

    def step() -> None:
        model(input_ids=tokens, past_key_values=cache, use_cache=True, **given)

    with torch.no_grad():
        seconds = machine.seconds(step)
    machine.empty_cache()
    return seconds


@contextmanager
def with_peft(model: Any, rank: int, count: int) -> Iterator[tuple[Any, list[str]]]:
    """The model with so many random adapters over all linear layers; as it was afterwards."""
    import peft

    config = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=TARGETS, init_lora_weights=False)
    names = [f"a{number}" for number in range(count)]
    wrapped = peft.get_peft_model(model, config, names[0])
    for name in names[1:]:
        wrapped.add_adapter(name, config)
    wrapped.to(model.device, model.dtype).eval().requires_grad_(False)
    try:
        yield wrapped, names
    finally:
        wrapped.unload()
