"""What the LoRA kernels compute, in plain torch, from the same tensors.

An arena of one layer is [rows, width]. An adapter's block in it has logical rows 0, 1, …; row `start + n` of the arena
holds logical row n, or row_table[start + n] where the block is scattered. Chunk c of a vector is its numbers
c · width to (c + 1) · width, the last one filled up with anything.

    logical row c · R + r              chunk c of row r of A, r over the ranks of all targets, R of them
    logical row base_j + c · R_j + r   chunk c of row r of Bᵀ of target j
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from engine.kernels.lora.form import Form


def shrink(
    x: torch.Tensor, rows: torch.Tensor, row_table: torch.Tensor, items: torch.Tensor, z: torch.Tensor, form: Form
) -> None:
    """z[0, i, t, r] = x[token + t] · A[rank + r] for item i; the other planes of z become 0. Shapes as in launch.py."""
    for number, item in enumerate(items.tolist()):
        token, tokens, rank, ranks, stride, start, scattered, _ = item
        if not tokens:
            continue
        a = _vectors(rows, row_table, start, range(rank, rank + ranks), stride, x.shape[1], bool(scattered))
        z[:, number] = 0
        z[0, number, :tokens, :ranks] = x[token : token + tokens].float() @ a.T


def expand(
    z: torch.Tensor,
    rows: torch.Tensor,
    row_table: torch.Tensor,
    items: torch.Tensor,
    y: torch.Tensor,
    columns: Sequence[int],
    form: Form,
) -> None:
    """y[token + t, columns of j] += sum of z over its planes · B of target j. Shapes as in launch.py."""
    for item in items.tolist():
        token, tokens, z_item, scattered = item[:4]
        for target in range(len(columns) - 1):
            rank, ranks, start, _ = item[4 + 4 * target : 8 + 4 * target]
            if not tokens or not ranks:
                continue
            first, stop = columns[target], columns[target + 1]
            b = _vectors(rows, row_table, start, range(ranks), ranks, stop - first, bool(scattered))
            places = [(z_item + r // form.rank_tile, r % form.rank_tile) for r in range(rank, rank + ranks)]
            shrunk = torch.stack([z[:, i, :tokens, r].sum(0) for i, r in places], 1)
            y[token : token + tokens, first:stop] += (shrunk @ b).to(y.dtype)


def place(
    source: torch.Tensor,
    rows: torch.Tensor,
    row_table: torch.Tensor,
    pieces: torch.Tensor,
    most_rows: int,
    block: tuple[int, bool],
) -> None:
    """Row start + logical + c · step + r = chunk c of source[offset + r · by_rank + column · by_column]."""
    start, scattered = block
    width = rows.shape[1]
    for size, ranks, logical, step, there, offset, by_rank, by_column in pieces.tolist():
        for rank in range(ranks):
            vector = source.new_zeros(-(-size // width) * width)
            if rank < there:
                vector[:size] = source[offset + rank * by_rank :][: (size - 1) * by_column + 1 : by_column]
            for chunk, numbers in enumerate(vector.view(-1, width)):
                place = start + logical + chunk * step + rank
                rows[row_table[place] if scattered else place] = numbers


def _vectors(
    rows: torch.Tensor, row_table: torch.Tensor, start: int, ranks: range, stride: int, size: int, scattered: bool
) -> torch.Tensor:
    """Float32 [ranks, size] out of the arena."""
    chunks = -(-size // rows.shape[1])
    logical = torch.tensor([[start + c * stride + r for c in range(chunks)] for r in ranks])
    physical = row_table[logical] if scattered else logical
    return rows[physical.to(rows.device)].flatten(1)[:, :size].float()
