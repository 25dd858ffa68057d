"""A tiny model served by the kernels, steps launched ahead, against the same requests served by torch.

The loop, the scheduler and the sampler are the real ones; only graphs are called instead of captured. What is called is
the first pass of its shape, as a graph would replay it, so what is not in a buffer shows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from engine.config import Settings
from engine.gpu.runner import GpuRunner
from engine.messages import Cancel, Request, Submit
from engine.model import Base, load_base
from tests.engine.harness import InProcess, Router, request
from tests.engine.tiny import four_adapters, make_model
from tests.kernels.conftest import HAS_GPU, INTERPRETED

pytestmark = pytest.mark.interpreted


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    return lambda family: make_model(tmp_path_factory.mktemp("models") / f"tiny-{family}", family)


def opened(folder: Path, *, kernels: bool, blocks: int = 64) -> Base:
    device = "cuda" if kernels and HAS_GPU and not INTERPRETED else "cpu"
    settings = Settings(model=str(folder), device=device, dtype="float32", threads=1, kv_memory_mib=16, max_sequences=8)
    return dataclasses.replace(load_base(settings, kernels=kernels), block_count=blocks)


def both(
    folder: Path, *requests: Request, blocks: int = 64, preempts: bool = False
) -> tuple[list[list[int]], list[list[int]]]:
    """Token ids by torch, and by the kernels."""
    answers = []
    for kernels in (False, True):
        base = opened(folder, kernels=kernels, blocks=blocks)
        with InProcess(base, max_sequences=8, step_tokens=48) as engine:
            answered = engine.run(*requests, timeout=120)
            assert preempts is any(collected.finished.preemptions for collected in answered)
            answers.append([collected.token_ids for collected in answered])
            assert all(collected.end for collected in engine.run(request([5, 6])))
            engine.loop._check_integrity()
        if kernels:
            assert isinstance(base.runner, GpuRunner) and len(base.runner.graphs)
    return answers[0], answers[1]


@pytest.mark.parametrize("family", ["llama", "gemma2", "deepseek_v3"])
def test_greedy_tokens_are_those_of_torch(folder: Callable[[str], Path], family: str) -> None:
    wanted = [
        request([3, 14, 15], max_output_tokens=6),
        request(list(range(20, 51)), max_output_tokens=4),
        request([7], max_output_tokens=3),
    ]
    torch_path, kernels = both(folder(family), *wanted)
    assert kernels == torch_path
    assert any(kernels)


def test_adapters_give_the_tokens_of_torch_alone_and_beside_each_other(
    folder: Callable[[str], Path], tmp_path: Path
) -> None:
    place = folder("llama")
    adapters = four_adapters(place, tmp_path, "llama")[1:3]
    wanted = [
        request([3 + number, 5, 7], adapter, max_output_tokens=4)
        for number, adapter in enumerate(["", *(adapter.digest for adapter in adapters), adapters[0].digest])
    ]
    answers = []
    for kernels in (False, True):
        with InProcess(opened(place, kernels=kernels), max_sequences=8) as engine:
            engine.install(*adapters)
            answers.append([collected.token_ids for collected in engine.run(*wanted, timeout=120)])
    assert answers[0] == answers[1]
    assert len(set(map(tuple, answers[1]))) == len(wanted)


def test_every_way_of_sampling_gives_the_tokens_of_torch(folder: Callable[[str], Path]) -> None:
    ways: list[dict[str, Any]] = [
        {},
        {"temperature": 0.8, "seed": 5},
        {"temperature": 1.3, "top_p": 0.7, "seed": 6},
        {"temperature": 1.0, "top_k": 5, "min_p": 0.05, "seed": 7},
        {"temperature": 0.9, "repetition_penalty": 1.4, "seed": 8},
        {"top_logprobs": 2},
        {"min_output_tokens": 5},
        {"logit_bias": {11: 4.0}},
    ]
    wanted = [request([4 + place, 30], max_output_tokens=6, **way) for place, way in enumerate(ways)]
    torch_path, kernels = both(folder("llama"), *wanted)
    assert kernels == torch_path


def test_plain_requests_give_the_tokens_of_torch_where_blocks_run_out(folder: Callable[[str], Path]) -> None:
    wanted = [request([40 + place] * 14, max_output_tokens=20) for place in range(3)]
    torch_path, kernels = both(folder("llama"), *wanted, blocks=6, preempts=True)
    assert kernels == torch_path


def test_prompts_are_scored_as_by_torch(folder: Callable[[str], Path]) -> None:
    place = folder("llama")
    found = []
    for kernels in (False, True):
        with InProcess(opened(place, kernels=kernels)) as engine:
            answers = engine.run(request([8, 9, 10, 11], prompt_logprobs=True), request([3, 4], max_output_tokens=6))
            scored = [each for output in answers[0].outputs for each in output.prompt_logprobs]
            found.append(([each.token for each in scored], [round(each.logprob, 4) for each in scored]))
    assert found[0][0] == found[1][0]
    assert found[0][1] == pytest.approx(found[1][1], abs=1e-3)


def test_a_cancelled_sequence_leaves_nothing_behind_while_its_step_is_under_way(
    folder: Callable[[str], Path],
) -> None:
    with InProcess(opened(folder("llama"), kernels=True)) as engine:
        router = Router()
        engine.loop.post(Submit(router, request([3, 4, 5], sequence_id=1, max_output_tokens=200, eos_ids=frozenset())))
        engine.loop.post(Submit(router, request([6, 7, 8], sequence_id=2, max_output_tokens=20, eos_ids=frozenset())))
        router.wait_for_tokens(1, 5)
        engine.loop.post(Cancel(router, 1))
        router.wait(2, timeout=120)
        alone = engine.run(request([6, 7, 8], max_output_tokens=20, eos_ids=frozenset()))[0]
        assert router.sequences[2].token_ids == alone.token_ids
        assert engine.loop.load.running == 0 and engine.loop.load.free_blocks == 64
