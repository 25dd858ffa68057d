"""The attention kernels compile for the GPUs people have, within their shared memory."""

from __future__ import annotations

from typing import Any

import pytest

from engine.blocks import BLOCK_SIZE
from engine.kernels.attention import kernels, launch
from tests.kernels.compiling import TARGETS, compile_for

ITEMSIZE = {"bf16": 2, "fp16": 2, "fp32": 4}
# Number type, head size, and whether with window and cap.
CASES = [("bf16", 128, False), ("fp16", 80, True), ("bf16", 256, True), ("fp32", 256, False)]
INTS = ("kv_heads", "group", "heads", "window")
ALIGNED = (
    "query_token", "query_head", "key_size", "value_size", "key_token", "key_head", "value_token",
    "value_head",
)  # fmt: skip
POINTERS = {
    "rows": "*i32", "lengths": "*i32", "slots": "*i32", "tables": "*i32", "tiles": "*i32", "chunks": "*i32",
    "parts": "*fp32", "bests": "*fp32", "totals": "*fp32",
}  # fmt: skip


def types_of(kernel: Any, dtype: str) -> dict[str, str]:
    """Types of a kernel's arguments, by what they are called."""
    types = {}
    for name in kernel.arg_names:
        if name in POINTERS:
            types[name] = POINTERS[name] + "+"
        elif name in ("query", "keys", "values", "out", "key", "value"):
            types[name] = f"*{dtype}+"
        elif name in ("scaling", "softcap"):
            types[name] = "fp32"
        elif name in ALIGNED or name == "table_row":
            types[name] = "i32+"
        elif name in INTS:
            types[name] = "i32"
    return types


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("dtype", "size", "special"), CASES)
def test_decode_compiles(target: str, dtype: str, size: int, special: bool) -> None:
    tiles = launch.decode_tiles(4, size, size, ITEMSIZE[dtype])
    common = {"SPLIT": launch.SPLIT, "SPLITS": 4, "VALUE": tiles.value, "N": tiles.n, "WINDOW": special}
    constants = common | {"BLOCK": BLOCK_SIZE, "M": tiles.m, "KEY": tiles.key, "SOFTCAP": special, "UPCAST": False}
    compile_for(
        target, kernels.decode_kernel, types_of(kernels.decode_kernel, dtype), constants,
        warps=tiles.warps, stages=tiles.stages,
    )  # fmt: skip
    compile_for(target, kernels.join_kernel, types_of(kernels.join_kernel, dtype), common, warps=1)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("dtype", "size", "special"), CASES)
def test_prefill_compiles(target: str, dtype: str, size: int, special: bool) -> None:
    itemsize = ITEMSIZE[dtype]
    tiles = launch.prefill_tiles(launch.prefill_rows(size, itemsize), size, size, itemsize)
    constants = {
        "BLOCK": BLOCK_SIZE, "M": tiles.m, "N": tiles.n, "KEY": tiles.key, "VALUE": tiles.value,
        "SOFTCAP": special, "WINDOW": special, "UPCAST": False,
    }  # fmt: skip
    compiled = compile_for(
        target, kernels.prefill_kernel, types_of(kernels.prefill_kernel, dtype), constants,
        warps=tiles.warps, stages=tiles.stages,
    )  # fmt: skip
    if dtype != "fp32":
        assembly = compiled.asm.get("ptx") or compiled.asm["amdgcn"]
        assert any(word in assembly for word in ("mma.sync", "wgmma", "tcgen05", "mfma")), "no matrix instructions"


@pytest.mark.parametrize("target", TARGETS)
def test_write_compiles(target: str) -> None:
    types = types_of(kernels.write_kernel, "bf16")
    compile_for(target, kernels.write_kernel, types, {"HEADS": 8, "KEY": 128, "VALUE": 128})
