"""What can be served is found out at load; what cannot is refused in one line with the reason."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertLMHeadModel,
    BertModel,
    MptConfig,
    T5Config,
    T5ForConditionalGeneration,
)

from engine.base import base_digest
from engine.config import Settings
from engine.model import load_base
from engine.runner import Runner
from servicekit.errors import StartupError
from tests.engine.harness import tiny_base
from tests.engine.tiny import COMMON, make_tokenizer

T5 = T5Config(vocab_size=50, d_model=16, d_ff=16, num_layers=1, num_heads=2, d_kv=8)
BERT = BertConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
ALIBI = MptConfig(d_model=32, n_heads=4, n_layers=2, max_seq_len=64, vocab_size=384)


def edited(source: Path, to: Path, **changes: Any) -> Path:
    shutil.copytree(source, to)
    config = json.loads((to / "config.json").read_text())
    (to / "config.json").write_text(json.dumps(config | changes))
    return to


@pytest.mark.parametrize(
    ("model", "says"),
    [("", "no base model"), ("/no/such/folder", "does not exist"), ("not a name", "does not exist")],
)
def test_a_model_that_is_not_there_is_named(model: str, says: str) -> None:
    with pytest.raises(StartupError, match=says):
        tiny_base(Path(model)) if model else load_base(Settings())


def test_a_folder_without_model_or_weights_is_named(tmp_path: Path, tiny_model: Callable[[str], Path]) -> None:
    with pytest.raises(StartupError, match=r"no config\.json"):
        tiny_base(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(StartupError, match="no safetensors weights"):
        tiny_base(tmp_path)
    shutil.copy(tiny_model("llama") / "model.safetensors", tmp_path)
    with pytest.raises(StartupError, match="cannot load the model"):
        tiny_base(tmp_path)
    with pytest.raises(StartupError, match="is a file"):
        tiny_base(tmp_path / "config.json")


def test_models_that_do_not_decode_are_refused(tmp_path: Path) -> None:
    T5ForConditionalGeneration(T5).save_pretrained(tmp_path / "t5")
    with pytest.raises(StartupError, match="encoder-decoder"):
        tiny_base(tmp_path / "t5")
    BertModel(BERT).save_pretrained(tmp_path / "headless")
    with pytest.raises(StartupError, match="lacks weights of a BertLMHeadModel"):
        tiny_base(tmp_path / "headless")
    BertLMHeadModel(BERT).save_pretrained(tmp_path / "bert")
    make_tokenizer().save_pretrained(tmp_path / "bert")
    with pytest.raises(StartupError, match="its attention is not causal"):
        tiny_base(tmp_path / "bert")


def test_attention_we_do_not_compute_is_refused(tmp_path: Path) -> None:
    AutoModelForCausalLM.from_config(ALIBI).save_pretrained(tmp_path)  # type: ignore[no-untyped-call]
    make_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(StartupError, match="cannot be served"):
        tiny_base(tmp_path)


def test_logits_that_differ_from_transformers_own_attention_are_refused(
    tiny_model: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    right = Runner.run
    monkeypatch.setattr(Runner, "run", lambda *given: right(*given) + 1.0)
    with pytest.raises(StartupError, match="its logits differ by 1"):
        tiny_base(tiny_model("llama"))


def test_a_context_beyond_the_models_or_the_memory_is_refused(tiny_model: Callable[[str], Path]) -> None:
    with pytest.raises(StartupError, match="more than the model's 256"):
        tiny_base(tiny_model("llama"), context_length=257)


def test_without_a_wish_the_context_is_what_model_and_memory_hold(tmp_path: Path) -> None:
    from transformers import LlamaConfig

    config = LlamaConfig(**(COMMON | {"max_position_embeddings": 100_000}))
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)  # type: ignore[no-untyped-call]
    make_tokenizer().save_pretrained(tmp_path)
    base = tiny_base(tmp_path, kv_memory_mib=1)
    assert base.context_length == base.block_count * 16 < 100_000
    with pytest.raises(StartupError, match="MiB for keys and values"):
        tiny_base(tmp_path, kv_memory_mib=1, context_length=50_000)


def test_a_rotation_that_depends_on_the_longest_sequence_limits_the_context(
    tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0, "original_max_position_embeddings": 64}
    folder = edited(tiny_model("llama"), tmp_path / "dynamic", rope_parameters=rope)
    assert tiny_base(folder).context_length == 64


def test_the_digest_follows_weights_and_configuration_and_nothing_else(
    tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    source = tiny_model("llama")
    digest = base_digest(source)
    assert base_digest(edited(source, tmp_path / "moved", transformers_version="9", dtype="bfloat16")) == digest
    assert base_digest(edited(source, tmp_path / "other", rms_norm_eps=0.1)) != digest
    assert base_digest(tiny_model("mistral")) != digest


def test_targets_are_the_linear_layers_of_the_decoder(tiny_model: Callable[[str], Path]) -> None:
    targets = tiny_base(tiny_model("llama")).targets
    assert len(targets) == 7 * 3
    assert [(t.name, t.in_features, t.out_features) for t in targets[:3]] == [
        ("model.layers.0.self_attn.q_proj", 48, 48),
        ("model.layers.0.self_attn.k_proj", 48, 24),
        ("model.layers.0.self_attn.v_proj", 48, 24),
    ]
    assert not [target for target in targets if "head" in target.name or "embed" in target.name]


def test_bfloat16_passes_its_own_check(tiny_model: Callable[[str], Path]) -> None:
    base = tiny_base(tiny_model("llama"), dtype="bfloat16")
    assert base.dtype == "bfloat16" and base.runner.pool.dtype is torch.bfloat16
