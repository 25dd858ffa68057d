"""The kernels around attention and adapters compile for the GPUs people have."""

from __future__ import annotations

import pytest

from engine.kernels.rotary.kernels import rotary_kernel
from engine.kernels.threshold.kernels import TILE, floor_kernel
from tests.kernels.compiling import TARGETS, compile_for


@pytest.mark.parametrize("target", TARGETS)
def test_threshold_compiles(target: str) -> None:
    types = {
        "weights": "*fp32+",
        "top_k": "*i32+",
        "top_p": "*fp32+",
        "min_p": "*fp32+",
        "floors": "*fp32+",
        "vocab": "i32+",
    }
    compile_for(target, floor_kernel, types, {"TILE": TILE}, warps=8)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("half", [64, 40])
def test_rotary_compiles(target: str, half: int) -> None:
    tensors = ("query", "key", "query_out", "key_out", "cos", "sin")
    strides = ("query_token", "query_head", "key_token", "key_head")
    types = dict.fromkeys(tensors, "*bf16+") | dict.fromkeys(strides, "i32+")
    types |= {"heads": "i32", "kv_heads": "i32", "half": "i32"}
    compile_for(target, rotary_kernel, types, {"HEADS": 32, "KV_HEADS": 8, "HALF": 64})
