"""The base model: loaded by transformers, attention and linear layers hooked, and checked against itself.

No architecture is named here. What a model needs is found by running it once with a probe in place of attention, and
whether we compute what it means is found by comparing a few tokens with transformers' own attention. A model that fails
either is refused with the reason: it would be answered wrongly, or not at all.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from engine.adapters import arranger_for
from engine.attention import PAGED, Probe, UnsupportedAttention
from engine.base import base_digest, locate_base, weight_files
from engine.batch import build_batch
from engine.blocks import blocks_for
from engine.config import Settings
from engine.flight import Launcher, Runs
from engine.lanes import Lanes
from engine.limits import MIB, budget, kv_memory, layer_types, model_context
from engine.linear import ActiveAdapters, install
from engine.lora import Projection, TargetModule
from engine.pool import KvPool, bytes_per_block
from engine.runner import Runner
from engine.scheduler import Row
from engine.sequence import Sequence
from engine.tokenizer import Tokenizer, load_tokenizer
from servicekit.errors import StartupError

if TYPE_CHECKING:
    from engine.gpu.runner import GpuRunner

_log = logging.getLogger(__name__)

# Largest difference to transformers' own attention, as a share of the largest logit.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.02}
CHECK_TOKENS = 40
# Kinds of layers, by transformers' names for them, whose whole meaning is in what they hand to attention.
SERVED_LAYERS = frozenset({"full_attention", "sliding_attention"})


@dataclass(frozen=True, slots=True)
class Base:
    """The base model, ready to run steps.

    Attributes:
        name: as people know it: the hub id or the folder's name.
        digest: sha256 of configuration and weights.
        context_length: most tokens of one sequence, prompt and answer together.
        threads: CPU threads of a step, to be set by the thread that runs it: torch counts them by thread.
        block_count: KV blocks of the pool.
        targets: linear layers adapters may target, in order of the model.
        projections: the same, joined as they are computed.
        runner: computes steps one at a time.
        launcher: begins a step before the one before is over, where the device can.
    """

    name: str
    digest: str
    architecture: str
    context_length: int
    vocab_size: int
    dtype: str
    device: str
    threads: int
    block_count: int
    targets: tuple[TargetModule, ...]
    projections: tuple[Projection, ...]
    runner: Runs
    tokenizer: Tokenizer
    launcher: Launcher | None = None


def load_base(settings: Settings, *, kernels: bool | None = None) -> Base:
    """Loads the model of the settings. Takes seconds to minutes and says in the log how far it is.

    Raises StartupError when the model cannot be had or cannot be served.

    Args:
        kernels: see open_base.
    """
    folder = locate_base(settings.model)
    device = _device(settings.device)
    kernels = device.type == "cuda" if kernels is None else kernels
    dtype = _dtype(settings.dtype, device)
    threads = settings.threads or torch.get_num_threads()
    torch.set_num_threads(threads)

    size = sum(path.stat().st_size for path in weight_files(folder))
    _log.info("loading base %s: %.0f MB, %s on %s", settings.model, size / 1e6, _name(dtype), device.type)
    started = time.monotonic()
    model = _load(folder, dtype, device)
    tokenizer = load_tokenizer(folder, model)
    _log.info("loaded in %.1f s", time.monotonic() - started)

    started = time.monotonic()
    digest = base_digest(folder)
    _log.info("base %s hashed in %.1f s", digest[:12], time.monotonic() - started)
    name = folder.name if Path(os.path.expanduser(settings.model)).is_dir() else settings.model
    return open_base(model, tokenizer, settings, name, digest, kernels=kernels)


def open_base(
    model: Any, tokenizer: Tokenizer, settings: Settings, name: str, digest: str, *, kernels: bool | None = None
) -> Base:
    """Hooks a loaded model, whose attention is eager, and checks it.

    Raises StartupError when it cannot be served.

    Args:
        kernels: whether steps run on our kernels, as on a GPU; by default where there is one.
    """
    device, dtype = model.device, model.dtype
    kernels = device.type == "cuda" if kernels is None else kernels
    started = time.monotonic()
    expected = _reference(model)
    probe = _probe(model)
    layers = probe.layers
    if kernels:
        # Needs Triton, which not every machine has.
        from engine.gpu.fused import fuse

        fuse(model)
    memory = kv_memory(settings, device)
    # On CPU half of the memory is for lanes, see there.
    lane_bytes = 0 if kernels else memory // 2
    longest = model_context(model.config.get_text_config(), probe)
    if longest is None:
        raise _refusal(model, "its configuration states no max_position_embeddings")
    context_length, block_count = budget(settings, longest, bytes_per_block(layers, dtype), memory - lane_bytes)
    active = ActiveAdapters()
    targets, projections = install(model, len(layers), CHECK_TOKENS, lambda: _pass(model, Probe()), active)
    adapters = arranger_for(projections, settings.adapter_memory_mib * MIB, dtype, device, kernels=kernels)

    def runner_of(pool: KvPool) -> Runner | GpuRunner:
        if not kernels:
            return Runner(model, pool, Lanes(pool, lane_bytes), active, adapters, device)
        from engine.gpu.runner import Adapters, GpuRunner

        assert isinstance(adapters, Adapters)
        return GpuRunner(model, pool, active, adapters, settings.max_sequences, context_length)

    _check(model, runner_of(KvPool(layers, blocks_for(CHECK_TOKENS), dtype, device)), expected, dtype)
    runner = runner_of(KvPool(layers, block_count, dtype, device))
    _log.info(
        "base %s checked in %.1f s: %d layers, %d target modules, context %d, %d KV blocks (%.0f MB)",
        digest[:12], time.monotonic() - started, len(layers), len(targets), context_length, block_count,
        block_count * bytes_per_block(layers, dtype) / 1e6,
    )  # fmt: skip
    return Base(
        name=name,
        digest=digest,
        architecture=type(model).__name__,
        context_length=context_length,
        vocab_size=model.get_input_embeddings().num_embeddings,
        dtype=_name(dtype),
        device=device.type,
        threads=settings.threads or torch.get_num_threads(),
        block_count=block_count,
        targets=targets,
        projections=projections,
        runner=runner,
        tokenizer=tokenizer,
        launcher=None if isinstance(runner, Runner) else runner,
    )


def _load(folder: Path, dtype: torch.dtype, device: torch.device) -> Any:
    try:
        config = AutoConfig.from_pretrained(folder)
        if getattr(config, "is_encoder_decoder", False):
            raise StartupError(f"{folder.name} is an encoder-decoder model; only decoder-only models are served")
        # transformers annotates one result; with the report there are two.
        load: Any = AutoModelForCausalLM.from_pretrained
        model, report = load(
            folder,
            config=config,
            dtype=dtype,
            attn_implementation="eager",
            use_safetensors=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, ImportError) as error:
        reason = " ".join(str(error).split())[:300]
        raise StartupError(f"cannot load the model {folder}: {reason}") from None
    if report["missing_keys"]:
        # transformers makes up what is missing; such a model would answer nonsense.
        raise StartupError(f"{folder} lacks weights of a {type(model).__name__}: {min(report['missing_keys'])}")
    return model.to(device).eval().requires_grad_(False)


def _reference(model: Any) -> torch.Tensor:
    """Logits [CHECK_TOKENS, vocab] of the check's tokens, as transformers computes them."""
    tokens = _check_tokens(model)
    with _refused(model), torch.inference_mode():
        logits: torch.Tensor = model(input_ids=tokens, position_ids=_positions(tokens), use_cache=False).logits
    return logits[0].float()


def _pass(model: Any, probe: Probe) -> None:
    tokens = _check_tokens(model)
    with _refused(model), torch.inference_mode():
        model(input_ids=tokens, position_ids=_positions(tokens), use_cache=False, paged=probe)


@contextmanager
def _refused(model: Any) -> Iterator[None]:
    """Turns whatever a model raises while it is tried out into its refusal."""
    try:
        yield
    except UnsupportedAttention as error:
        raise _refusal(model, str(error)) from None
    except Exception as error:  # noqa: BLE001 - model code is not ours
        reason = " ".join(str(error).split())[:200]
        raise _refusal(model, f"its forward pass fails with {type(error).__name__}: {reason}") from None


def _probe(model: Any) -> Probe:
    """Runs the model once on a probe; refuses one whose layers do not all attend, once, through our function."""
    text = model.config.get_text_config()
    other = sorted(set(layer_types(text)) - SERVED_LAYERS)
    if other:
        raise _refusal(model, f"it has layers of {', '.join(other)}")
    probe = Probe()
    with _refused(model):
        model.set_attn_implementation(PAGED)
    _pass(model, probe)
    count = text.num_hidden_layers
    if set(probe.layers) != set(range(count)):
        found = len(probe.layers)
        raise _refusal(model, f"{found} of its {count} layers attend through transformers' attention interface")
    if probe.calls != count:
        raise _refusal(model, f"its {count} layers attend {probe.calls} times for one token")
    return probe


def _check(model: Any, runner: Runs, expected: torch.Tensor, dtype: torch.dtype) -> None:
    """Compares prefill, a later chunk and decode with the same tokens as transformers computes them."""
    tokens = _check_tokens(model)
    sequence = Sequence(0, "", [], 0, blocks=list(range(1, blocks_for(CHECK_TOKENS) + 1)))
    largest = float(expected.abs().max())
    for stop in (CHECK_TOKENS // 2, CHECK_TOKENS - 1, CHECK_TOKENS):
        sequence.tokens = tokens[0, :stop].tolist()
        batch = build_batch([Row(sequence, sequence.computed, sequence.pending)])
        with _refused(model):
            logits = runner.run(batch, [])[0]
        difference = float((logits - expected[stop - 1]).abs().max())
        sequence.computed = stop
        # Not written as "difference > limit": that would let NaN pass.
        if not difference <= TOLERANCE[dtype] * largest:
            raise _refusal(model, f"its logits differ by {difference:.2g} from those of transformers' own attention")


def _check_tokens(model: Any) -> torch.Tensor:
    vocabulary = model.get_input_embeddings().num_embeddings
    generator = torch.Generator().manual_seed(0)
    return torch.randint(vocabulary, (1, CHECK_TOKENS), generator=generator).to(model.device)


def _positions(tokens: torch.Tensor) -> torch.Tensor:
    return torch.arange(tokens.shape[1], device=tokens.device)[None]


def _refusal(model: Any, reason: str) -> StartupError:
    return StartupError(f"{type(model).__name__} cannot be served: {reason}")


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise StartupError(f"device {name} cannot be used: {str(error).splitlines()[0]}") from None
    return device


def _dtype(name: str, device: torch.device) -> torch.dtype:
    if name == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
