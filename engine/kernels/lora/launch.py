"""Launches the LoRA kernels. Nothing here allocates or waits, so all of it can be captured in a graph."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
import triton

from engine.kernels.lora import kernels
from engine.kernels.lora.form import Form


def shrink(
    x: torch.Tensor, rows: torch.Tensor, row_table: torch.Tensor, items: torch.Tensor, z: torch.Tensor, form: Form
) -> None:
    """z[split, item] = part of x · Aᵀ for the tokens and ranks of each item; see reference.py. One launch.

    Args:
        x: [T, in], numbers of a token side by side.
        rows: [rows, width], the arena of one layer, width a power of two from 16, x's type.
        row_table: int32, rows of scattered adapters.
        items: int32 [n, 8] token, tokens, first rank, ranks, ranks of the adapter, start, scattered, unused. Where
            tokens is 0 nothing is done; otherwise 1 <= tokens <= form.token_tile and 1 <= ranks <= form.rank_tile.
        z: float32 [form.splits, n, form.token_tile, form.rank_tile]; what is outside an item's tokens or ranks
            becomes 0, or stays as it is where the item has no tokens.
    """
    kernel: Any = kernels.shrink_gemv if form.token_tile == 1 else kernels.shrink_gemm
    width = rows.shape[1]
    kernel[len(items), form.splits](
        x, rows, row_table, items, z, x.stride(0),
        IN=x.shape[1], WIDTH=width, TOKENS=form.token_tile, RANKS=form.rank_tile, K=min(form.k_tile, width),
        SPLITS=form.splits, UPCAST=_upcast(x), num_warps=form.shrink_warps, num_stages=form.shrink_stages,
    )  # fmt: skip


def expand(
    z: torch.Tensor,
    rows: torch.Tensor,
    row_table: torch.Tensor,
    items: torch.Tensor,
    y: torch.Tensor,
    columns: Sequence[int],
    form: Form,
) -> None:
    """Adds to y what the items make of z; see reference.py. One launch for all targets.

    Args:
        z: as `shrink` wrote it.
        rows, row_table: as for `shrink`.
        items: int32 [n, 4 + 4 · targets] token, tokens, first item in z, scattered; for each target first rank, ranks,
            start, unused. Where tokens or a target's ranks are 0 nothing is done. No token is in two items.
        y: [T, columns[-1]] at least, numbers of a token side by side, x's type.
        columns: where each target's columns of y begin, and where the last one's end.
    """
    kernel: Any = kernels.expand_gemv if form.token_tile == 1 else kernels.expand_gemm
    width = rows.shape[1]
    tile = min(form.column_tile, width)
    tiles = sum(-(-(stop - start) // tile) for start, stop in pairwise(columns))
    kernel[tiles, len(items)](
        z, rows, row_table, items, y, y.stride(0), z.shape[1],
        COLUMNS=tuple(columns), WIDTH=width, TOKENS=form.token_tile, RANKS=16, Z_RANKS=form.rank_tile, TILE=tile,
        SPLITS=form.splits, UPCAST=_upcast(y), num_warps=form.expand_warps, num_stages=form.expand_stages,
    )  # fmt: skip


def place(
    source: torch.Tensor,
    rows: torch.Tensor,
    row_table: torch.Tensor,
    pieces: torch.Tensor,
    most_rows: int,
    block: tuple[int, bool],
) -> None:
    """Brings one layer of an artifact into its rows. One launch.

    Args:
        source: flat, the numbers of the layer as they are in the file, rows' type.
        rows, row_table: as for `shrink`.
        pieces: int32 [n, 8], each A or B of one target: its size (in or out), ranks, first logical row, logical rows from
            one chunk to the next, ranks that the layer has of it (zeros for the others), offset in source, and how far
            it is there from rank to rank and from column to column.
        most_rows: of the largest piece.
        block: start, and whether the rows are scattered.
    """
    kernel: Any = kernels.place_rows
    start, scattered = block
    # As many rows as make 8192 numbers of a program.
    at_once = max(1, min(16, 8192 // rows.shape[1]))
    kernel[-(-most_rows // at_once), len(pieces)](
        source, rows, row_table, pieces, start, int(scattered), WIDTH=rows.shape[1], ROWS=at_once, num_warps=4
    )


def _upcast(x: torch.Tensor) -> bool:
    """The interpreter multiplies bfloat16 wrongly (3.6 to 3.9), so there it gets float32."""
    return x.dtype == torch.bfloat16 and bool(triton.knobs.runtime.interpret)
