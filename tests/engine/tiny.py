"""Tiny random models with a real tokenizer, PEFT adapters for them, and artifacts as the cache would pack them."""

from __future__ import annotations

import copy
import hashlib
import json
import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    OPTConfig,
    Phi3Config,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

CORPUS = [
    "The quick brown fox jumps over the lazy dog. ",
    "Loraplex serves many adapters over one base. ",
    "Grüße aus Köln, 你好世界, こんにちは, 🙂🚀 emoji. ",
]
CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
EOS = "<|end|>"
VOCAB = 384

COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 80,
    "max_position_embeddings": 256,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": None,
}

GROUPED: dict[str, Any] = COMMON | {"num_key_value_heads": 2}
WINDOWED: dict[str, Any] = GROUPED | {"head_dim": 12, "sliding_window": 7}
EXPERTS: dict[str, Any] = {"moe_intermediate_size": 32, "num_experts_per_tok": 2}

# What is set beside the sizes makes each family's own ways matter: small windows and caps, factors that are not 1.
CONFIGS: dict[str, Any] = {
    "llama": LlamaConfig(**GROUPED),
    "mistral": MistralConfig(**WINDOWED),
    "qwen2": Qwen2Config(**GROUPED),
    "qwen3": Qwen3Config(**GROUPED, head_dim=16),
    "gemma2": Gemma2Config(
        **WINDOWED,
        tie_word_embeddings=False,
        query_pre_attn_scalar=20,
        attn_logit_softcapping=5.0,
        final_logit_softcapping=60.0,
    ),
    "gemma3": Gemma3TextConfig(
        **WINDOWED,
        tie_word_embeddings=False,
        query_pre_attn_scalar=20,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    ),
    "phi3": Phi3Config(**GROUPED),
    "gpt2": GPT2Config(
        vocab_size=VOCAB, n_embd=48, n_layer=3, n_head=4, n_positions=256, bos_token_id=0, eos_token_id=0
    ),
    "opt": OPTConfig(**(COMMON | {"pad_token_id": 1}), ffn_dim=80, word_embed_proj_dim=48),
    "gpt_neox": GPTNeoXConfig(**COMMON),
    "mixtral": MixtralConfig(**GROUPED, num_local_experts=4),
    "qwen3_moe": Qwen3MoeConfig(**GROUPED, **EXPERTS, num_experts=4),
    "deepseek_v3": DeepseekV3Config(
        **COMMON,
        **EXPERTS,
        n_routed_experts=4,
        n_shared_experts=1,
        n_group=1,
        topk_group=1,
        num_key_value_heads=4,
        first_k_dense_replace=1,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_nope_head_dim=8,
        qk_rope_head_dim=4,
        v_head_dim=16,
    ),
    "granite": GraniteConfig(
        **GROUPED, embedding_multiplier=3.0, logits_scaling=0.5, residual_multiplier=0.6, attention_multiplier=0.4
    ),
}

# Two groups of modules by family: attention and the feed-forward part, where adapters may target both.
TARGETS: dict[str, tuple[list[str], list[str]]] = {
    "phi3": (["qkv_proj", "o_proj"], ["gate_up_proj", "down_proj"]),
    "gpt2": (["c_attn"], ["c_fc", "c_proj"]),
    "opt": (["q_proj", "v_proj", "out_proj"], ["fc1", "fc2"]),
    "gpt_neox": (["query_key_value", "dense"], ["dense_h_to_4h", "dense_4h_to_h"]),
    "mixtral": (["q_proj", "v_proj"], ["k_proj", "o_proj"]),
    "qwen3_moe": (["q_proj", "v_proj"], ["k_proj", "o_proj"]),
    "deepseek_v3": (["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa"], ["kv_b_proj", "o_proj"]),
}
DEFAULT_TARGETS = (["q_proj", "v_proj"], ["gate_proj", "up_proj", "down_proj"])


def make_tokenizer() -> Any:
    """A byte-level BPE tokenizer; token 0 ends an answer."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=[EOS, "<|user|>", "<|assistant|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    made: Any = PreTrainedTokenizerFast
    return made(tokenizer_object=tokenizer, eos_token=EOS, chat_template=CHAT_TEMPLATE)


def make_model(folder: Path, family: str, seed: int = 0, **changed: Any) -> Path:
    """Writes a random model of a family; its weights are large enough that answers differ and are no near ties.

    `changed` are fields of its configuration.
    """
    torch.manual_seed(seed)
    config = copy.deepcopy(CONFIGS[family])
    config.update(changed)
    model = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    embeddings = model.get_input_embeddings().weight
    # Where they are the head too, large ones would make a model repeat its last token for ever.
    deviation = 0.12 if model.config.tie_word_embeddings else 0.5
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, deviation if parameter is embeddings else 0.16)
            else:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@dataclass(frozen=True)
class TinyAdapter:
    """An adapter as PEFT sees it (`folder`) and as the engine gets it (`path`)."""

    name: str
    digest: str
    folder: Path
    path: Path


def make_adapter(base: Path, out: Path, name: str, rank: int, targets: list[str], rslora: bool = False) -> TinyAdapter:
    """A PEFT adapter with random weights, and its packed artifact."""
    model = AutoModelForCausalLM.from_pretrained(base)
    config = peft.LoraConfig(
        r=rank,
        lora_alpha=4 if rslora else 2 * rank,
        target_modules=targets,
        use_rslora=rslora,
        fan_in_fan_out=model.config.model_type == "gpt2",
        task_type="CAUSAL_LM",
    )
    torch.manual_seed(sum(name.encode()) * 1000 + rank)
    with warnings.catch_warnings():
        # PEFT asks transformers for an attribute that has a newer name.
        warnings.simplefilter("ignore", FutureWarning)
        wrapped = peft.get_peft_model(model, config)
    for key, parameter in wrapped.named_parameters():
        if "lora_" in key:
            torch.nn.init.normal_(parameter, std=0.25 / rank**0.25)
    folder = out / name
    wrapped.save_pretrained(str(folder))
    digest = hashlib.sha256(f"{base.name}/{name}".encode()).hexdigest()
    return TinyAdapter(name, digest, folder, pack(folder, digest, out))


def pack(folder: Path, digest: str, out: Path) -> Path:
    """Packs a PEFT folder: names as in the base, float32, scaling folded into B."""
    from safetensors.torch import load_file

    config = json.loads((folder / "adapter_config.json").read_text())
    rank = config["r"]
    scaling = config["lora_alpha"] / (math.sqrt(rank) if config["use_rslora"] else rank)
    tensors = {}
    for key, tensor in load_file(folder / "adapter_model.safetensors").items():
        module, _, half = key.removeprefix("base_model.model.").removesuffix(".weight").rpartition(".lora_")
        tensor = tensor.float()
        tensors[f"{module}.{half}"] = (tensor * scaling if half == "B" else tensor).contiguous()
    return write_artifact(out / f"{digest}.float32.safetensors", tensors, digest, rank)


def write_artifact(path: Path, tensors: Mapping[str, torch.Tensor], digest: str, rank: int) -> Path:
    save_file(dict(tensors), path, metadata={"digest": digest, "rank": str(rank), "format": "loraplex-artifact-1"})
    return path


def four_adapters(base: Path, out: Path, family: str) -> list[TinyAdapter]:
    """Ranks 1, 3, 8 and 64 on different modules; one of them rsLoRA."""
    attention, feed_forward = TARGETS.get(family, DEFAULT_TARGETS)
    return [
        make_adapter(base, out, "one", 1, attention[:1]),
        make_adapter(base, out, "three", 3, feed_forward),
        make_adapter(base, out, "eight", 8, attention, rslora=True),
        make_adapter(base, out, "many", 64, [*attention, *feed_forward]),
    ]


class Oracle:
    """transformers + PEFT, one adapter and one prompt at a time."""

    def __init__(self, base: Path, adapters: list[TinyAdapter]) -> None:
        self._model: Any = AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager")
        self._with_adapters: Any = None
        for adapter in adapters:
            if self._with_adapters is None:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", FutureWarning)
                    self._with_adapters = peft.PeftModel.from_pretrained(self._model, adapter.folder, adapter.digest)
            else:
                self._with_adapters.load_adapter(adapter.folder, adapter.digest)

    @torch.no_grad()
    def logits(self, prompt: list[int], digest: str = "") -> torch.Tensor:
        """[len(prompt), vocab]"""
        if self._with_adapters is None:
            result = self._model(torch.tensor([prompt])).logits
        elif digest:
            self._with_adapters.set_adapter(digest)
            result = self._with_adapters(torch.tensor([prompt])).logits
        else:
            with self._with_adapters.disable_adapter():
                result = self._with_adapters(torch.tensor([prompt])).logits
        return torch.as_tensor(result[0])

    def greedy(self, prompt: list[int], count: int, digest: str = "") -> list[int]:
        """`count` tokens, or fewer when token 0 ends the answer; that token is left out."""
        tokens = list(prompt)
        while len(tokens) < len(prompt) + count:
            token = int(self.logits(tokens, digest)[-1].argmax())
            if token == 0:
                break
            tokens.append(token)
        return tokens[len(prompt) :]
