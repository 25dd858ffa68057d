"""Small operations of a model that are many launches as transformers writes them, and can be one.

At a few rows a decode step on a GPU waits for launches more than for arithmetic. So norms and rotary embeddings are
replaced, module by module, never in transformers itself, and only where ours give the same numbers when both are tried.
What a model calls them is how they are found; what they compute decides. The check of the whole model at load comes
after, and covers what was replaced.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from engine.kernels.rotary import kernels as rotary

_log = logging.getLogger(__name__)

# Ours round once where transformers rounds several times.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 0.05, torch.float16: 0.01}
ROTARY = "apply_rotary_pos_emb"


@torch.inference_mode()
def fuse(model: Any) -> int:
    """Replaces what can be; returns how many modules were changed."""
    changed = 0
    for module in list(model.modules()):
        changed += _fuse_norm(module) or _fuse_rotary(module)
    _log.info("%d norms and rotary embeddings are computed in one launch each", changed)
    return changed


def _fuse_norm(module: nn.Module) -> bool:
    names = [name for name, _ in module.named_parameters()]
    epsilon = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if names != ["weight"] or not isinstance(epsilon, float) or "RMSNorm" not in type(module).__name__:
        return False
    weight = torch.as_tensor(module.weight)
    # Some models keep what is to be added to one.
    for scale in (weight, (1.0 + weight.float()).to(weight.dtype)):
        forward = _norm(scale, epsilon)
        x = torch.randn(3, weight.shape[0], generator=_generator(weight.device), device=weight.device).to(weight.dtype)
        if _is_close(forward(x), module(x)):
            module.forward = forward
            return True
    return False


def _norm(weight: torch.Tensor, epsilon: float) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda x: functional.rms_norm(x, weight.shape, weight, epsilon)


def _fuse_rotary(module: nn.Module) -> bool:
    """Gives one module's forward our function in place of the one its file names."""
    forward = type(module).forward
    original = getattr(forward, "__globals__", {}).get(ROTARY)
    if not isinstance(forward, FunctionType) or ROTARY not in forward.__code__.co_names or original is None:
        return False
    size = getattr(module, "head_dim", None)
    parameter = next(module.parameters(), None)
    if not isinstance(size, int) or size % 2 or parameter is None or not _rotates_alike(original, size, parameter):
        return False
    known = forward.__globals__ | {ROTARY: _either(original)}
    changed = FunctionType(forward.__code__, known, forward.__name__, forward.__defaults__, forward.__closure__)
    changed.__kwdefaults__ = forward.__kwdefaults__
    module.forward = MethodType(changed, module)
    return True


def _either(original: Callable[..., Any]) -> Callable[..., Any]:
    """Ours, or the original where it is asked for more than what was tried."""

    def rotate(
        query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *more: Any, **named: Any
    ) -> Any:
        if more or named or query.shape[0] != 1:
            return original(query, key, cos, sin, *more, **named)
        return _rotate(query, key, cos, sin)

    return rotate


def _rotate(
    query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    if query.stride(-1) != 1 or key.stride(-1) != 1:
        query, key = query.contiguous(), key.contiguous()
    return rotary.rotate(query, key, cos, sin)


def _rotates_alike(original: Callable[..., Any], size: int, like: torch.Tensor) -> bool:
    generator = _generator(like.device)

    def numbers(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=like.device).to(like.dtype)

    given = numbers(1, 4, 5, size), numbers(1, 2, 5, size), numbers(1, 5, size), numbers(1, 5, size)
    try:
        expected = original(*given)
    except (RuntimeError, TypeError, ValueError, IndexError):  # it takes something else
        return False
    return all(_is_close(*pair) for pair in zip(_rotate(*given), expected, strict=True))


def _is_close(found: torch.Tensor, expected: Any) -> bool:
    if not isinstance(expected, torch.Tensor) or found.shape != expected.shape or found.dtype != expected.dtype:
        return False
    difference = (found.float() - expected.float()).abs().max()
    return bool(difference <= TOLERANCE[found.dtype] * expected.float().abs().max())


def _generator(device: torch.device) -> torch.Generator:
    return torch.Generator(device).manual_seed(0)
