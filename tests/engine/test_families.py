"""Families of models: each with the logits and tokens of transformers + PEFT, or refused with the reason."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    DiffLlamaConfig,
    FalconH1Config,
    Gemma3TextConfig,
    GptOssConfig,
    Llama4TextConfig,
    MambaConfig,
    NemotronConfig,
    PhimoeConfig,
    Qwen2MoeConfig,
)

from cache.artifact import AdapterFiles, BaseDescription, build_artifact
from cache.errors import UnsupportedAdapter
from engine.batch import Batch, build_batch
from engine.flight import Runs
from engine.lanes import Lanes
from engine.lora import DeviceAdapter, DeviceSegment
from engine.runner import Runner
from engine.scheduler import Row
from engine.sequence import Sequence
from servicekit.errors import StartupError
from tests.engine.harness import InProcess, reader, request, tiny_base
from tests.engine.tiny import CONFIGS, EXPERTS, GROUPED, VOCAB, WINDOWED, Oracle, four_adapters, make_tokenizer

# How far each of five sequences is after each step: prompts in chunks of all sizes, decode beside them.
STOPS = [(9, 10, 11, 33, 34), (16, 17, 33, 34, 35), (1, 15, 16, 21, 22), (20, 28, 29, 30, 31), (30, 31, 32, 33, 48)]

# What each of these does beyond causal attention over all or the latest tokens, and the words it is refused with.
REFUSED: dict[str, tuple[Any, str]] = {
    "distance biases in attention of its own": (
        BloomConfig(vocab_size=VOCAB, hidden_size=48, n_layer=2, n_head=4),
        "0 of its 2 layers attend through transformers' attention interface",
    ),
    "attention that keyword arguments do not reach": (
        NemotronConfig(**GROUPED),
        "does not hand keyword arguments down",
    ),
    "attention sinks": (
        GptOssConfig(**GROUPED, num_local_experts=4, num_experts_per_tok=2, head_dim=12),
        "its attention uses s_aux",
    ),
    "two attentions in a layer": (DiffLlamaConfig(**GROUPED), "3 layers attend 6 times"),
    "attention in both directions": (Gemma3TextConfig(**WINDOWED, use_bidirectional_attention=True), "not causal"),
    "chunked attention": (
        Llama4TextConfig(**GROUPED, head_dim=12, intermediate_size_mlp=80, num_local_experts=4),
        "it has layers of chunked_attention",
    ),
    "states in place of attention": (
        MambaConfig(vocab_size=VOCAB, hidden_size=48, num_hidden_layers=2, state_size=4),
        "it has layers of linear_attention",
    ),
    "states beside attention": (
        FalconH1Config(
            **GROUPED, mamba_d_ssm=48, mamba_n_heads=4, mamba_d_head=12, mamba_d_state=4, mamba_chunk_size=8
        ),
        "it has layers of hybrid",
    ),
}


def random_tokens(count: int, seed: int) -> list[int]:
    return torch.randint(1, VOCAB, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def logits_of(runner: Runs, batch: Batch, loaded: Mapping[str, DeviceAdapter]) -> torch.Tensor:
    segments = [DeviceSegment(s.start, s.stop, loaded[s.adapter]) for s in batch.segments]
    return runner.run(batch, segments)


@pytest.mark.parametrize("lane_bytes", [0, 1 << 20], ids=["pages", "lanes"])
@pytest.mark.parametrize("family", CONFIGS)
def test_logits_are_those_of_each_adapter_alone(
    family: str, lane_bytes: int, tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    # Given the base and adapters of ranks 1, 3, 8 and 64 on different modules, a sequence for each
    folder = tiny_model(family)
    adapters = four_adapters(folder, tmp_path, family)
    base, oracle = tiny_base(folder), Oracle(folder, adapters)
    assert isinstance(base.runner, Runner)
    runner = dataclasses.replace(base.runner, lanes=Lanes(base.runner.pool, lane_bytes))
    loaded = {a.digest: reader(base, tmp_path).read(a.digest, str(a.path)) for a in adapters}
    texts = [random_tokens(stops[-1], seed) for seed, stops in enumerate(STOPS)]
    digests = ["", *loaded]
    expected = [oracle.logits(text, digest) for text, digest in zip(texts, digests, strict=True)]
    assert all(
        float((logits - oracle.logits(text)).abs().max()) > 1
        for logits, text in zip(expected[1:], texts[1:], strict=True)
    )

    # When they share steps, in every stage
    sequences = [Sequence(i, d, [], 0, blocks=[3 * i + 1, 3 * i + 2, 3 * i + 3]) for i, d in enumerate(digests)]
    for stops in zip(*STOPS, strict=True):
        for sequence, text, stop in zip(sequences, texts, stops, strict=True):
            sequence.tokens = text[:stop]
        batch = build_batch([Row(sequence, sequence.computed, sequence.pending) for sequence in sequences])
        # Then each has the logits of its adapter alone
        for row, logits in zip(batch.sampled, logits_of(runner, batch, loaded), strict=True):
            stop = len(row.sequence.tokens)
            assert float((logits - expected[row.sequence.arrival][stop - 1]).abs().max()) <= 1e-4, (row, stop)
            row.sequence.computed = stop


@pytest.mark.parametrize("family", CONFIGS)
def test_greedy_tokens_are_those_of_each_adapter_alone(
    family: str, tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = tiny_model(family)
    adapters = four_adapters(folder, tmp_path, family)
    oracle = Oracle(folder, adapters)
    # A pool for a third of what they need: they are preempted and computed again.
    base = dataclasses.replace(tiny_base(folder), block_count=24)
    digests = ["", *(adapter.digest for adapter in adapters)] * 2
    asked = [
        request(random_tokens(5 + 4 * i, seed=i), digest, max_output_tokens=64, eos_ids=frozenset())
        for i, digest in enumerate(digests)
    ]
    with InProcess(base, step_tokens=32) as engine:
        engine.install(*adapters)
        answers = engine.run(*asked)
    assert sum(answer.finished.preemptions for answer in answers) > 0
    for wanted, answer in zip(asked, answers, strict=True):
        prompt, tokens = list(wanted.prompt), answer.token_ids
        # Token by token the oracle's choice, given those before it: then the whole answer is.
        logits = oracle.logits([*prompt, *tokens[:-1]], wanted.adapter)[len(prompt) - 1 :]
        behind = logits.max(-1).values - logits.gather(-1, torch.tensor(tokens)[:, None])[:, 0]
        # Zero, but for a tie within the rounding of float32, which may fall either way on another processor.
        assert len(tokens) == 64 and float(behind.max()) <= 1e-5


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_served_is_refused_with_the_reason(what: str, tmp_path: Path) -> None:
    config, reason = REFUSED[what]
    with pytest.raises(StartupError, match=f"cannot be served: .*{reason}"):
        tiny_base(saved(config, tmp_path))


@pytest.mark.parametrize(
    "config",
    [
        PhimoeConfig(**GROUPED, num_local_experts=4, sliding_window=64),
        Qwen2MoeConfig(**GROUPED, **EXPERTS, num_experts=4, use_sliding_window=True, sliding_window=64),
    ],
    ids=["of all layers", "of some layers"],
)
def test_a_window_that_only_the_mask_has_limits_the_context(config: Any, tmp_path: Path) -> None:
    assert tiny_base(saved(config, tmp_path)).context_length == 64


def test_a_rotation_is_looked_at_for_each_kind_of_layers(tmp_path: Path) -> None:
    plain = {"rope_type": "default", "rope_theta": 10000.0}
    dynamic = plain | {"rope_type": "dynamic", "factor": 4.0, "original_max_position_embeddings": 64}
    config = Gemma3TextConfig(**WINDOWED, rope_parameters={"sliding_attention": plain, "full_attention": dynamic})
    assert tiny_base(saved(config, tmp_path)).context_length == 64


def test_an_adapter_for_experts_is_refused_by_name(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    # Given a base whose experts are three-dimensional parameters, and an adapter that PEFT trained for them
    folder = tiny_model("mixtral")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], target_parameters=["mlp.experts.gate_up_proj"])
    peft.get_peft_model(AutoModelForCausalLM.from_pretrained(folder), config).save_pretrained(str(tmp_path))
    written = (tmp_path / "adapter_config.json").read_bytes()
    files = AdapterFiles(written, (tmp_path / "adapter_model.safetensors").read_bytes())
    modules = {target.name: (target.in_features, target.out_features) for target in tiny_base(folder).targets}
    base = BaseDescription("mixtral", "0" * 64, "float32", 64, modules)
    # Then its registration is refused for what it says, and would be for what it holds
    with pytest.raises(UnsupportedAdapter, match="target_parameters"):
        build_artifact(files, base)
    silent = json.dumps(json.loads(written) | {"target_parameters": None}).encode()
    with pytest.raises(UnsupportedAdapter, match=r"model\.layers\.0\.mlp\.experts"):
        build_artifact(AdapterFiles(silent, files.weights), base)


def saved(config: Any, folder: Path) -> Path:
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)  # type: ignore[no-untyped-call]
    make_tokenizer().save_pretrained(folder)
    return folder
