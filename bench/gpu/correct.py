"""Whether what is measured is right: kernels against their references, the engine against transformers and PEFT."""

from __future__ import annotations

import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch

from bench.gpu import adapters as made
from bench.gpu.machine import Machine
from bench.gpu.peers import HAS_PEFT, TARGETS
from bench.gpu.serve import serve
from bench.gpu.shapes import SMALL, TINY, NoTokenizer, make_model, spread
from engine.blocks import BLOCK_SIZE, blocks_for
from engine.config import Settings
from engine.kernels.attention import launch, reference
from engine.lora import DeviceAdapter
from engine.model import open_base

# Largest difference as a share of the reference's norm.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 2e-2}
# Rows whose two best logits lie closer together may go either way.
NEAR_TIE = 1e-3


class Wrong(Exception):
    """Raised where an answer is not the right one; nothing is reported then."""


def check_kernels(machine: Machine) -> list[str]:
    """Attention of rows of many lengths, in every number type, with garbage where nothing may be read."""
    lengths = [33, 1, 300] if machine.dry else [1, 16, 777, 2049, 4096, 100]
    size = 16 if machine.dry else 128
    found = []
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for window in (None, 20):
            error = max(
                _decode_error(machine, dtype, lengths, size, window), _prefill_error(machine, dtype, size, window)
            )
            if not error <= TOLERANCE[dtype]:
                raise Wrong(f"attention in {dtype}, window {window}: {error:.2g} away from its reference")
            found.append(error)
    return [f"attention kernels: at most {max(found):.1e} away from the reference, {len(found)} cases"]


def _pool(
    machine: Machine, dtype: torch.dtype, count: int, size: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    blocks = blocks_for(count)
    keys, values = (
        torch.full(((blocks + 2) * BLOCK_SIZE, 2, size), float("nan"), dtype=dtype, device=machine.device) for _ in "kv"
    )
    table = 1 + torch.randperm(blocks, device=machine.device).int()
    place = torch.arange(count, device=machine.device)
    slots = table.long()[place // BLOCK_SIZE] * BLOCK_SIZE + place % BLOCK_SIZE
    for pool in (keys, values):
        pool[slots] = torch.randn(count, 2, size, device=machine.device).to(dtype)
    return keys, values, table


def _decode_error(machine: Machine, dtype: torch.dtype, lengths: list[int], size: int, window: int | None) -> float:
    worst = 0.0
    for length in lengths:
        keys, values, table = _pool(machine, dtype, length, size)
        query = torch.randn(1, 8, size, device=machine.device).to(dtype)
        out = torch.full_like(query, float("nan"))
        rows = torch.zeros(1, dtype=torch.int32, device=machine.device)
        form: dict[str, Any] = {"scaling": size**-0.5, "softcap": None, "window": window}
        launch.decode(
            query, keys, values, table[None], rows, rows + length, out, splits=launch.splits_for(length), **form
        )
        expected = _reference(query, length - 1, table, keys, values, form)
        worst = max(worst, _distance(out, expected))
    return worst


def _prefill_error(machine: Machine, dtype: torch.dtype, size: int, window: int | None) -> float:
    context, count = (5, 40) if machine.dry else (333, 517)
    keys, values, table = _pool(machine, dtype, context + count, size)
    query = torch.randn(count, 8, size, device=machine.device).to(dtype)
    out = torch.full_like(query, float("nan"))
    m = launch.prefill_rows(size, dtype.itemsize)
    tiles = torch.tensor(launch.tiles_of([count], m), dtype=torch.int32, device=machine.device)
    chunks = torch.tensor([[0, count, context]], dtype=torch.int32, device=machine.device)
    form: dict[str, Any] = {"scaling": size**-0.5, "softcap": None, "window": window}
    launch.prefill(query, keys, values, table[None], tiles, chunks, out, m=m, **form)
    return _distance(out, _reference(query, context, table, keys, values, form))


def _reference(
    query: torch.Tensor,
    context: int,
    table: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    form: dict[str, Any],
) -> torch.Tensor:
    """In float32 on CPU: a device's own products may be rounded more."""
    return reference.attend(query.cpu(), context, table.cpu(), keys.cpu(), values.cpu(), **form)


def _distance(out: torch.Tensor, expected: torch.Tensor) -> float:
    return float((out.float().cpu() - expected).norm() / expected.norm())


@torch.no_grad()
def check_tokens(machine: Machine) -> list[str]:
    """Greedy tokens of a small model in float32, its adapters side by side, against one at a time.

    The oracle is PEFT; where it is missing, a model whose weights have the adapter added.
    """
    config, count, output = (TINY, 2, 4) if machine.dry else (SMALL, 4, 24)
    model = make_model(config, machine.device, torch.float32)
    spread(model)
    rank = 4 if machine.dry else 16
    plain = make_model(config, machine.device, torch.float32)
    plain.load_state_dict(model.state_dict())
    settings = Settings(
        device=machine.device.type, dtype="float32", kv_memory_mib=64, max_sequences=8, adapter_memory_mib=64, threads=1
    )
    base = open_base(model, NoTokenizer(), settings, "small", "0" * 64, kernels=True)  # type: ignore[arg-type]
    shared = Path("/dev/shm")
    prompts = [
        [(place * 37 + number * 11 + 5) % config.vocab_size for place in range(9 + number)]
        for number in range(count + 1)
    ]
    adapters: list[DeviceAdapter] = []
    weights: list[dict[str, tuple[torch.Tensor, torch.Tensor]]] = []
    with tempfile.TemporaryDirectory(dir=shared if shared.is_dir() else None) as folder:
        for number in range(count):
            path = made.write_artifact(machine, base, Path(folder).resolve(), rank, scale=0.1)
            weights.append(made.read_pairs(path, machine.device))
            adapters.append(made.load(machine, base, path, number))
    digests = [*(adapter.digest for adapter in adapters), ""]
    served = serve(base, adapters, list(zip(prompts, digests, strict=True)), output)
    compared = 0
    for prompt, tokens, pairs in zip(prompts, served.tokens, [*weights, {}], strict=True):
        with _Adapted(plain, pairs):
            compared += _compare(plain, prompt, tokens, machine)
    oracle = "PEFT" if HAS_PEFT else "weights with the adapter added"
    return [f"greedy tokens in float32: {compared} of {count + 1} requests equal to {oracle}, the others at near ties"]


def _compare(model: Any, prompt: list[int], tokens: list[int], machine: Machine) -> int:
    """Whether these are the model's tokens after the prompt; up to a near tie."""
    logits = model(input_ids=torch.tensor([prompt + tokens[:-1]], device=machine.device), use_cache=False).logits[0]
    best = logits[len(prompt) - 1 :].float().topk(2, -1)
    for token, (first, _), (high, low) in zip(tokens, best.indices.tolist(), best.values.tolist(), strict=True):
        if token != first:
            if high - low > NEAR_TIE * abs(high):
                raise Wrong(f"token {token} where the oracle has {first}, {high - low:.3g} ahead")
            return 0
    return 1


class _Adapted:
    """The model with one adapter: by PEFT where it is there, otherwise with A and B added to its weights."""

    def __init__(self, model: Any, pairs: dict[str, tuple[torch.Tensor, torch.Tensor]]) -> None:
        self._model, self._pairs = model, pairs
        self._wrapped: Any = None

    def __enter__(self) -> None:
        if not self._pairs:
            return
        if not HAS_PEFT:
            self._add(1)
            return
        import peft

        rank = next(iter(self._pairs.values()))[0].shape[0]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            config = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=TARGETS)
            self._wrapped = peft.get_peft_model(self._model, config)
        for name, (a, b) in self._pairs.items():
            layer = self._model.get_submodule(name)
            layer.lora_A["default"].weight.data.copy_(a)
            layer.lora_B["default"].weight.data.copy_(b)
        self._wrapped.eval()

    def __exit__(self, *_: object) -> None:
        if self._wrapped is not None:
            self._wrapped.unload()
        elif self._pairs:
            self._add(-1)

    def _add(self, sign: int) -> None:
        for name, (a, b) in self._pairs.items():
            self._model.get_submodule(name).weight.data.add_(b @ a, alpha=sign)
