"""Models with random weights, made on the device from their configuration: nothing is fetched."""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig

_COMMON: dict[str, Any] = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}

LLAMA = LlamaConfig(
    vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
    num_key_value_heads=8, max_position_embeddings=8192, rms_norm_eps=1e-5,
    rope_parameters={"rope_type": "default", "rope_theta": 500000.0}, **_COMMON,
)  # fmt: skip
MISTRAL = MistralConfig(
    vocab_size=32000, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
    num_key_value_heads=8, max_position_embeddings=32768, sliding_window=4096, **_COMMON,
)  # fmt: skip
TINY = LlamaConfig(
    vocab_size=384, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=512, **_COMMON,
)  # fmt: skip
SMALL = LlamaConfig(
    vocab_size=2048, hidden_size=512, intermediate_size=1024, num_hidden_layers=4, num_attention_heads=8,
    num_key_value_heads=2, max_position_embeddings=512, **_COMMON,
)  # fmt: skip

MODELS = {"Llama-3-8B": LLAMA, "Mistral-7B": MISTRAL}


def make_model(config: Any, device: torch.device, dtype: torch.dtype, seed: int = 0) -> Any:
    """A model whose attention is eager, as `open_base` wants it."""
    torch.manual_seed(seed)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=dtype, attn_implementation="eager")  # type: ignore[no-untyped-call]
    return model.eval().requires_grad_(False)


def spread(model: Any) -> None:
    """Weights so large that answers differ from token to token and are no near ties."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 2.5 / parameter.shape[-1] ** 0.5)


class NoTokenizer:
    """Stands where a tokenizer would be: tokens go in and come out as numbers."""

    eos_ids: frozenset[int] = frozenset()
    special_ids: frozenset[int] = frozenset()
    byte_ids: frozenset[int] = frozenset()
    has_chat_template = False

    def decode(self, ids: Any) -> str:
        """A character for each token."""
        return "".join(chr(33 + token % 90) for token in ids)
