"""Steps of the engine's own runner on sequences that are made up."""

from __future__ import annotations

from collections.abc import Sequence as Many

import torch

from bench.gpu.machine import Machine
from engine.batch import build_batch
from engine.blocks import blocks_for
from engine.gpu.runner import GpuRunner
from engine.lora import DeviceAdapter, DeviceSegment
from engine.model import Base
from engine.sampler import History, SampleRow, Sampling
from engine.scheduler import Row
from engine.sequence import Sequence


def runner_of(base: Base) -> GpuRunner:
    """The base's runner."""
    assert isinstance(base.runner, GpuRunner)
    return base.runner


def fill_pool(base: Base) -> None:
    """Makes keys and values numbers like those of a model: zeros can be faster."""
    pool = runner_of(base).pool
    for tensor in (*pool.keys.values(), *pool.values.values()):
        tensor.normal_(0, 0.5)


def weight_bytes(model: torch.nn.Module) -> int:
    """Bytes of weights that a decode step reads: all but the embedding, unless that is the head as well."""
    parameters = {id(each): each.numel() * each.element_size() for each in model.parameters()}
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()  # type: ignore[operator]
    if head is not None and head.weight is not embedding.weight:
        parameters.pop(id(embedding.weight), None)
    return sum(parameters.values())


def step_seconds(
    machine: Machine, base: Base, adapters: Many[DeviceAdapter], rows: int, context: int, count: int = 1
) -> float:
    """Seconds of a step of `rows` sequences, `count` new tokens each after `context` others, adapters in turn."""
    runner, blocks = runner_of(base), blocks_for(context + count)
    assert rows * blocks <= base.block_count
    by_digest = {adapter.digest: adapter for adapter in adapters}
    digests = list(by_digest) or [""]
    made: list[Row] = []
    for number in range(rows):
        tokens = [(number * 7919 + place * 31) % base.vocab_size for place in range(context + count)]
        owned = list(range(1 + number * blocks, 1 + (number + 1) * blocks))
        sequence = Sequence(number, digests[number % len(digests)], tokens, len(tokens), blocks=owned)
        made.append(Row(sequence, context, count))
    batch = build_batch(made)
    segments = [DeviceSegment(each.start, each.stop, by_digest[each.adapter]) for each in batch.segments]
    plain = Sampling()
    sampled = [SampleRow(plain, context + count, History(plain, ())) for _ in batch.sampled]
    with torch.inference_mode():
        return machine.seconds(lambda: runner.compute(batch, segments, sampled))
