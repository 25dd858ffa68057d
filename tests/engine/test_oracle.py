"""The engine against transformers + PEFT: the same logits, the same tokens, whatever shares the batch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from engine.batch import build_batch
from engine.lora import DeviceSegment
from engine.scheduler import Row
from engine.sequence import Sequence
from tests.engine.harness import InProcess, reader, request, tiny_base
from tests.engine.tiny import CONFIGS, Oracle, four_adapters

PROMPTS = [[5, 80, 33, 7, 290], [44] * 3, list(range(10, 52)), [99, 3], [200, 201, 202, 203, 204, 205, 206]]


@pytest.mark.parametrize("family", CONFIGS)
def test_mixed_batch_has_the_oracles_logits_and_greedy_tokens(
    family: str, tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    # Given a base and adapters of ranks 1, 3, 8 and 64 on different modules
    folder = tiny_model(family)
    adapters = four_adapters(folder, tmp_path, family)
    oracle = Oracle(folder, adapters)
    base = tiny_base(folder)
    digests = ["", *(adapter.digest for adapter in adapters)]

    # When one forward pass holds a prompt of each
    rows = [
        Row(Sequence(i, digests[i], prompt, len(prompt), blocks=[3 * i + 1, 3 * i + 2, 3 * i + 3]), 0, len(prompt))
        for i, prompt in enumerate(PROMPTS)
    ]
    loaded = {a.digest: reader(base, tmp_path).read(a.digest, str(a.path)) for a in adapters}
    batch = build_batch(rows)
    segments = [DeviceSegment(s.start, s.stop, loaded[s.adapter]) for s in batch.segments]
    logits = base.runner.run(batch, segments)

    # Then every row has the logits of its adapter alone
    for row, found in zip(batch.sampled, logits, strict=True):
        expected = oracle.logits(row.sequence.tokens, row.sequence.adapter)[-1]
        assert float((found - expected).abs().max()) <= 1e-4

    # And the loop produces the oracle's tokens for all of them at once
    with InProcess(base) as engine:
        engine.install(*adapters)
        wanted = [request(p, d, max_output_tokens=24) for p in PROMPTS for d in digests]
        for asked, got in zip(wanted, engine.run(*wanted), strict=True):
            assert got.token_ids == oracle.greedy(list(asked.prompt), 24, asked.adapter)


def test_adapters_change_the_answer(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    folder = tiny_model("llama")
    adapters = four_adapters(folder, tmp_path, "llama")
    oracle = Oracle(folder, adapters)
    answers = {tuple(oracle.greedy(PROMPTS[2], 16, digest)) for digest in ("", *(a.digest for a in adapters))}
    assert len(answers) == 5
    assert torch.isfinite(oracle.logits(PROMPTS[2])).all()
