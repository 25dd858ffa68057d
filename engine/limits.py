"""How much of a model fits and how far it reaches: KV blocks, context length."""

from __future__ import annotations

import logging
import os
from typing import Any

import torch

from engine.attention import Probe
from engine.blocks import BLOCK_SIZE, blocks_for
from engine.config import Settings
from servicekit.errors import StartupError

_log = logging.getLogger(__name__)

MIB = 1024 * 1024


def kv_memory(settings: Settings, device: torch.device) -> int:
    """Bytes for keys and values."""
    return settings.kv_memory_mib * MIB or _free_memory(device, settings.adapter_memory_mib * MIB)


def budget(settings: Settings, longest: int, block: int, memory: int) -> tuple[int, int]:
    """Context length and number of KV blocks. At least one sequence of full length fits, so that each one ends."""
    wanted = settings.context_length or longest
    if wanted > longest:
        raise StartupError(f"context_length {wanted} is more than the model's {longest}")
    # More than every sequence at full length can never be used.
    block_count = min(memory // block, settings.max_sequences * blocks_for(wanted))
    if block_count < 1:
        raise StartupError(f"kv_memory_mib {settings.kv_memory_mib} holds no block of {block} bytes")
    held = block_count * BLOCK_SIZE
    if held >= wanted:
        return wanted, block_count
    if settings.context_length:
        raise StartupError(
            f"context_length {wanted} needs {blocks_for(wanted) * block / MIB:.0f} MiB for keys and values"
        )
    _log.warning("the KV pool holds %d tokens, so that is the context length; the model's is %d", held, longest)
    return held, block_count


def model_context(text: Any, probe: Probe) -> int | None:
    """Most tokens for which our answer is the model's; None where its configuration does not say."""
    longest = getattr(text, "max_position_embeddings", None)
    if not isinstance(longest, int) or longest < 1:
        return None
    return min(longest, _rotation_limit(text) or longest, _hidden_window(text, probe) or longest)


def _rotation_limit(text: Any) -> int | None:
    """Beyond its original length a "dynamic" model changes the rotation of all tokens of a pass at once: one long
    sequence would change the answers of the others in its batch."""
    rope = getattr(text, "rope_parameters", None) or {}
    # One rotation, or one for each kind of layers.
    kinds = [kind for kind in (rope, *rope.values()) if isinstance(kind, dict)]
    limits = [
        kind.get("original_max_position_embeddings")
        for kind in kinds
        if kind.get("rope_type") in ("dynamic", "longrope")
    ]
    return min((int(limit) for limit in limits if limit), default=None)


def _hidden_window(text: Any, probe: Probe) -> int | None:
    """The window of a model that puts it into its mask but does not tell its attention; within it there is none."""
    window = getattr(text, "sliding_window", None) or None
    kinds = layer_types(text) or ["sliding_attention"] * len(probe.layers)
    hidden = any(kind == "sliding_attention" and not probe.windows[number] for number, kind in enumerate(kinds))
    return window if hidden else None


def layer_types(text: Any) -> list[str]:
    """Kind of each layer, by transformers' names; empty where the model has one kind."""
    return getattr(text, "layer_types", None) or []


def _free_memory(device: torch.device, adapter_budget: int) -> int:
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return max(0, int(free * 0.85) - adapter_budget)
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 8
