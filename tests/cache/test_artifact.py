"""Validation and packing: what is refused, by name, and what the packed numbers are."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.numpy import load, save
from transformers import LlamaConfig, LlamaForCausalLM

from cache.artifact import AdapterFiles, build_artifact, deserialize
from cache.errors import MalformedAdapter, UnsupportedAdapter
from cache.peft_config import IRRELEVANT, SERVED, parse_peft_config
from servicekit.errors import ServiceError
from tests.cache.conftest import BASE, PLAIN, make_tensors

Q = "base_model.model.model.layers.0.self_attn.q_proj.lora_"


def files(tensors: dict[str, Any] | None = None, template: str = "", **config: Any) -> AdapterFiles:
    content = save(make_tensors() if tensors is None else tensors)
    return AdapterFiles(json.dumps({**PLAIN, **config}).encode(), content, template)


def test_a_packed_delta_is_the_scaled_product() -> None:
    tensors = make_tensors(("self_attn.q_proj", "mlp.up_proj"))
    artifact = build_artifact(files(tensors, lora_alpha=6), BASE)
    packed = load(artifact.packed)
    for module in ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj"):
        a, b = (tensors[f"base_model.model.{module}.lora_{side}.weight"] for side in "AB")
        np.testing.assert_allclose(packed[f"{module}.B"] @ packed[f"{module}.A"], 1.5 * b @ a, rtol=1e-6)
    assert artifact.rank == 4 and artifact.target_modules == ("q_proj", "up_proj")


def test_rslora_and_patterns_scale_as_peft_does(tmp_path: Path) -> None:
    # Given an adapter made by PEFT with rsLoRA, ranks and alphas by pattern
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
                    num_key_value_heads=1, vocab_size=32)
    )  # fmt: skip
    config = LoraConfig(
        r=4, lora_alpha=7, use_rslora=True, target_modules=["q_proj", "v_proj", "up_proj"], init_lora_weights=False,
        rank_pattern={"v_proj": 2, r"layers\.1\.self_attn.q_proj": 8}, alpha_pattern={"^model.layers.0.mlp.up_proj$": 3},
    )  # fmt: skip
    peft: Any = get_peft_model(model, config)
    peft.save_pretrained(tmp_path)
    # When it is packed
    config_file, weights = (tmp_path / name for name in ("adapter_config.json", "adapter_model.safetensors"))
    packed = load(build_artifact(AdapterFiles(config_file.read_bytes(), weights.read_bytes()), BASE).packed)
    # Then every delta is PEFT's
    for module in BASE.modules:
        expected = peft.base_model.model.get_submodule(module).get_delta_weight("default").detach().numpy()
        np.testing.assert_allclose(packed[f"{module}.B"] @ packed[f"{module}.A"], expected, atol=1e-6)


def test_the_digest_is_the_content_and_nothing_else() -> None:
    digest = build_artifact(files(), BASE).digest
    # The same, however it is written
    assert build_artifact(files(lora_dropout=0.3, task_type="CAUSAL_LM", use_dora=False), BASE).digest == digest
    # Another with any change that changes an answer
    changed = make_tensors()
    changed[f"{Q}A.weight"][0, 0] += 1
    others = [
        files(changed),
        files(lora_alpha=9),
        files(use_rslora=True),
        files(template="{{ messages }}"),
        files(make_tensors(dtype=np.float16)),
    ]
    digests = {build_artifact(other, BASE).digest for other in others}
    digests.add(build_artifact(files(), dataclasses.replace(BASE, digest="c" * 64)).digest)
    assert len(digests) == 6 and digest not in digests


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("source", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_any_source_type_is_packed_in_the_engines_type(dtype: str, source: Any) -> None:
    artifact = build_artifact(files(make_tensors(dtype=source)), dataclasses.replace(BASE, dtype=dtype))
    names = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
    assert {names[entry["dtype"]] for _, entry in deserialize(artifact.packed)} == {dtype}


def drop(tensors: dict[str, Any]) -> None:
    del tensors[f"{Q}B.weight"]


def nan(tensors: dict[str, Any]) -> None:
    tensors[f"{Q}A.weight"][1, 1] = np.nan


def inf(tensors: dict[str, Any]) -> None:
    tensors[f"{Q}B.weight"][1, 1] = np.inf


def narrow(tensors: dict[str, Any]) -> None:
    tensors[f"{Q}A.weight"] = np.zeros((4, 15), np.float32)


def other_rank(tensors: dict[str, Any]) -> None:
    tensors[f"{Q}A.weight"] = np.zeros((3, 16), np.float32)


def embedding(tensors: dict[str, Any]) -> None:
    tensors["base_model.model.model.embed_tokens.lora_embedding_A"] = np.zeros((4, 16), np.float32)


def dora(tensors: dict[str, Any]) -> None:
    tensors[Q.removesuffix("lora_") + "lora_magnitude_vector"] = np.zeros(16, np.float32)


def head(tensors: dict[str, Any]) -> None:
    tensors["base_model.model.lm_head.lora_A.weight"] = np.zeros((4, 16), np.float32)
    tensors["base_model.model.lm_head.lora_B.weight"] = np.zeros((32, 4), np.float32)


def integers(tensors: dict[str, Any]) -> None:
    tensors[f"{Q}A.weight"] = np.zeros((4, 16), np.int8)


def empty(tensors: dict[str, Any]) -> None:
    tensors.clear()


BAD_TENSORS: list[tuple[Any, type[ServiceError], str, str]] = [
    (drop, MalformedAdapter, "HALF_A_PAIR", "q_proj"),
    (nan, MalformedAdapter, "NOT_FINITE", "q_proj"),
    (inf, MalformedAdapter, "NOT_FINITE", "q_proj"),
    (narrow, UnsupportedAdapter, "WRONG_SHAPE", "[4, 16]"),
    (other_rank, UnsupportedAdapter, "WRONG_SHAPE", "[3, 16]"),
    (embedding, UnsupportedAdapter, "UNSUPPORTED_TENSOR", "lora_embedding_A"),
    (dora, UnsupportedAdapter, "UNSUPPORTED_TENSOR", "lora_magnitude_vector"),
    (head, UnsupportedAdapter, "UNKNOWN_MODULE", "lm_head"),
    (integers, UnsupportedAdapter, "UNSUPPORTED_DTYPE", "I8"),
    (empty, MalformedAdapter, "NO_TENSORS", "no tensors"),
]


@pytest.mark.parametrize(
    "change, error, reason, named", BAD_TENSORS, ids=lambda value: getattr(value, "__name__", None)
)
def test_bad_tensors_are_refused_by_name(change: Any, error: type[ServiceError], reason: str, named: str) -> None:
    tensors = make_tensors()
    change(tensors)
    with pytest.raises(error) as refused:
        build_artifact(files(tensors), BASE)
    assert refused.value.reason == reason
    assert named in refused.value.message


def test_a_rank_over_the_limit_is_refused() -> None:
    with pytest.raises(UnsupportedAdapter, match="rank 65, the limit is 64"):
        build_artifact(files(make_tensors(rank=65), r=65), BASE)


@pytest.mark.parametrize("size", [0, 1, 7, 8, 9, 100, -1, -100])
def test_truncated_weights_are_refused(size: int) -> None:
    whole = files()
    with pytest.raises(MalformedAdapter, match=r"adapter_model\.safetensors"):
        build_artifact(dataclasses.replace(whole, weights=whole.weights[:size]), BASE)


def test_a_header_that_lies_is_refused() -> None:
    for header in (b"\xff" * 8, (2**40).to_bytes(8, "little"), (10).to_bytes(8, "little") + b"{}"):
        with pytest.raises(MalformedAdapter):
            build_artifact(dataclasses.replace(files(), weights=header + b"x" * 64), BASE)


UNSERVED: dict[str, Any] = {
    "peft_type": "IA3", "bias": "all", "init_lora_weights": "pissa_niter_4", "use_dora": True, "lora_bias": True,
    "modules_to_save": ["lm_head"], "target_parameters": ["experts.weight"], "trainable_token_indices": [1],
    "layer_replication": [[0, 1]], "alora_invocation_tokens": [5], "arrow_config": {"top_k": 1}, "use_qalora": True,
    "corda_config": {"x": 1}, "loftq_config": {"bits": 4}, "megatron_config": {"x": 1}, "use_bdlora": {"x": 1},
    "kasa_config": {"x": 1}, "velora_config": {"x": 1}, "monteclora_config": {"x": 1}, "lora_ga_config": {"x": 1},
    "a_feature_of_tomorrow": True, "r": 0, "lora_alpha": "8", "rank_pattern": {"(a+)+b": 4}, "alpha_pattern": [1],
    "target_modules": [1],
}  # fmt: skip


@pytest.mark.parametrize("name", UNSERVED)
def test_what_would_change_the_answer_is_refused_by_name(name: str) -> None:
    with pytest.raises(UnsupportedAdapter) as refused:
        build_artifact(files(**{name: UNSERVED[name]}), BASE)
    assert refused.value.metadata["feature"] == name
    assert name in refused.value.message


@pytest.mark.parametrize("value", ["pissa", "olora", "corda", "loftq", "lora_ga", "mica"])
def test_initialisations_that_change_the_base_are_refused(value: str) -> None:
    with pytest.raises(UnsupportedAdapter, match="init_lora_weights"):
        build_artifact(files(init_lora_weights=value), BASE)


def test_every_field_of_peft_is_known_or_refused_when_set() -> None:
    # The table was made for this version of PEFT: a field it adds must be looked at before it may be ignored.
    known = {field.name for field in dataclasses.fields(LoraConfig)}
    assert known >= IRRELEVANT
    assert known >= SERVED.keys()
    assert known - IRRELEVANT - SERVED.keys() <= UNSERVED.keys()


@pytest.mark.parametrize("raw", [b"", b"{", b"[]", b"null", b"[" * 100_000, b'{"r": 4}', b"\xff"])
def test_a_malformed_config_is_refused(raw: bytes) -> None:
    with pytest.raises(MalformedAdapter, match=r"adapter_config\.json"):
        parse_peft_config(raw)
