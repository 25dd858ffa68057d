"""The LoRA kernels compile for the GPUs people have, with what makes them fast."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from engine.kernels.lora import kernels
from engine.kernels.lora.form import TABLES, Form, table_from_json
from tests.kernels.compiling import TARGETS, compile_for

SHRINK = {"x": "", "arena": "", "table": "*i32+", "items": "*i32+", "z": "*fp32+", "x_stride": "i32+"}
EXPAND = {"z": "*fp32+", "arena": "", "table": "*i32+", "items": "*i32+", "y": "", "y_stride": "i32+", "z_items": "i32"}
PLACE = {"source": "", "arena": "", "table": "*i32+", "pieces": "*i32+", "start": "i32", "scattered": "i32"}
# q, k and v of an 8B model.
IN, COLUMNS, WIDTH = 4096, (0, 4096, 5120, 6144), 1024

DEFAULT = table_from_json((TABLES / "default.json").read_text())
GEMV, SMALL, LARGE = (DEFAULT.choose(tokens, 8) for tokens in (1, 16, 512))
MATRIX_UNITS = ("mma.sync", "wgmma", "tcgen05.mma", "v_mfma")


def types(given: dict[str, str], dtype: str) -> dict[str, str]:
    return {name: type_ or f"*{dtype}+" for name, type_ in given.items()}


def compiled(target: str, form: Form, dtype: str) -> tuple[str, str]:
    """Assembly of shrink and expand."""
    gemv = form.token_tile == 1
    common: dict[str, Any] = {"WIDTH": WIDTH, "TOKENS": form.token_tile, "SPLITS": form.splits, "UPCAST": False}
    shrink = compile_for(
        target, kernels.shrink_gemv if gemv else kernels.shrink_gemm, types(SHRINK, dtype),
        common | {"IN": IN, "RANKS": form.rank_tile, "K": form.k_tile},
        warps=form.shrink_warps, stages=form.shrink_stages,
    )  # fmt: skip
    expand = compile_for(
        target, kernels.expand_gemv if gemv else kernels.expand_gemm, types(EXPAND, dtype),
        common | {"COLUMNS": COLUMNS, "RANKS": 16, "Z_RANKS": form.rank_tile, "TILE": form.column_tile},
        warps=form.expand_warps, stages=form.expand_stages,
    )  # fmt: skip
    return assembly(shrink), assembly(expand)


def assembly(compiled: Any) -> str:
    found: str = compiled.asm.get("ptx") or compiled.asm["amdgcn"]
    return found


def test_the_default_table_has_both_forms() -> None:
    assert GEMV.token_tile == 1 and SMALL.token_tile >= 16 and LARGE.token_tile > SMALL.token_tile


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("form", [SMALL, LARGE], ids=["gemm of a few tokens", "gemm of prefill"])
def test_gemm_forms_use_matrix_units(target: str, form: Form) -> None:
    for text in compiled(target, form, "bf16"):
        assert any(word in text for word in MATRIX_UNITS)


@pytest.mark.parametrize("target", TARGETS)
def test_the_gemv_form_reads_adapters_16_bytes_at_a_time(target: str) -> None:
    for text in compiled(target, GEMV, "bf16"):
        wide = "global_load_dwordx4" if target.startswith("gfx") else "ld.global.v4.b32"
        assert text.count(wide) >= 2
        # What is left is y, of which a thread may have a single number.
        assert sum(text.count(word) for word in ("ld.global.b16", "global_load_ushort")) <= 2


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_other_number_types_compile(target: str) -> None:
    for dtype in ("fp16", "fp32"):
        for form in (GEMV, SMALL):
            compiled(target, form, dtype)


@pytest.mark.parametrize("path", sorted(TABLES.glob("*.json")), ids=lambda path: path.stem)
def test_every_form_of_every_table_compiles(path: Path) -> None:
    if json.loads(path.read_text())["device"].startswith("Triton's interpreter"):
        return
    for entry in table_from_json(path.read_text()).entries:
        compiled("sm_90", entry.form, "bf16")


@pytest.mark.parametrize("target", TARGETS)
def test_placing_compiles(target: str) -> None:
    compile_for(target, kernels.place_rows, types(PLACE, "bf16"), {"WIDTH": WIDTH, "ROWS": 8})
