"""Adapters of one projection laid out in a poisoned arena, without the code that loads them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from engine.kernels.lora.form import Form
from engine.rank_layout import Kind, chunks
from engine.rank_rows import RowPool, Rows
from engine.rank_work import Block, Bucket, Span, items_of, rounded

NAN = float("nan")


def form(token_tile: int, *, rank_tile: int = 16, splits: int = 2, tile: int = 32) -> Form:
    return Form(token_tile, rank_tile, tile, splits, tile, 4, 2, 4, 2)


def kind_of(in_features: int, outs: tuple[int, ...]) -> Kind:
    columns = [0]
    for out in outs:
        columns.append(columns[-1] + out)
    return Kind((0,), in_features, tuple(columns))


@dataclass
class Laid:
    """Adapters in an arena. Whatever no adapter may read is NaN, also where a vector ends within a row."""

    kind: Kind
    rows: torch.Tensor
    table: torch.Tensor
    blocks: list[Block]
    pairs: list[list[tuple[torch.Tensor, torch.Tensor] | None]]


def lay_out(kind: Kind, ranks: list[tuple[int, ...]], width: int, dtype: torch.dtype) -> Laid:
    """Random adapters with these ranks by target; every other one is scattered."""
    generator = torch.Generator().manual_seed(sum(map(sum, ranks)))
    counts = [kind.rows_of(its, width) for its in ranks]
    pool = RowPool(2 * sum(counts) + 2)
    # Rows 0, 2, 4, … of a part are taken, so that those between them are all apart.
    single = [pool.allot(1) for _ in range(2 * sum(counts[1::2]) + 2)]
    for one in single[1::2]:
        pool.release(one)
    rows = torch.full((pool.total, width), NAN).to(dtype)
    table = torch.full((pool.total,), pool.total - 1, dtype=torch.int32)
    laid = Laid(kind, rows, table, [], [])
    listed = 0
    for number, (its, count) in enumerate(zip(ranks, counts, strict=True)):
        scattered = number % 2 == 1
        held = _scattered(pool, count) if scattered else pool.allot(count)
        assert held.is_scattered == (scattered and count > 1)
        physical = held.listed()
        start = physical[0] if physical else 0
        if held.is_scattered:
            start = listed
            table[listed : listed + count] = torch.tensor(physical, dtype=torch.int32)
            listed += count
        laid.blocks.append(Block(kind, width, start, held.is_scattered, its))
        laid.pairs.append(_fill(laid, its, physical, generator))
    return laid


def _scattered(pool: RowPool, count: int) -> Rows:
    """The pool prefers rows side by side, so take them away while this one chooses."""
    largest = pool.allot(max(stop - start for start, stop in pool._free))
    held = pool.allot(count)
    pool.release(largest)
    return held


def _fill(
    laid: Laid, ranks: tuple[int, ...], physical: list[int], generator: torch.Generator
) -> list[tuple[torch.Tensor, torch.Tensor] | None]:
    kind, width, dtype = laid.kind, laid.rows.shape[1], laid.rows.dtype
    pairs: list[tuple[torch.Tensor, torch.Tensor] | None] = []
    first, total = 0, sum(ranks)
    for rank, out, base in zip(ranks, kind.outs, kind.bases(ranks, width), strict=True):
        if not rank:
            pairs.append(None)
            continue
        a = (torch.randn(rank, kind.in_features, generator=generator) / 4).to(dtype)
        b = (torch.randn(rank, out, generator=generator) / 4).to(dtype)
        pairs.append((a, b))
        for r in range(rank):
            for c in range(chunks(kind.in_features, width)):
                part = a[r, c * width : (c + 1) * width]
                laid.rows[physical[c * total + first + r], : len(part)] = part
            for c in range(chunks(out, width)):
                part = b[r, c * width : (c + 1) * width]
                laid.rows[physical[base + c * rank + r], : len(part)] = part
        first += rank
    return pairs


@dataclass
class Items:
    """The items of a step, with two dead ones at the end of each, and planes full of NaN."""

    shrink: torch.Tensor
    expand: torch.Tensor
    z: torch.Tensor


def items_for(laid: Laid, spans: list[tuple[int, int, int]], form: Form) -> Items:
    """For spans (start, stop, adapter)."""
    given = [Span(start, stop, (laid.blocks[adapter],)) for start, stop, adapter in spans]
    tiles = sum(-(-(span.stop - span.start) // form.token_tile) for span in given)
    ranks = max(sum(block.ranks) for block in laid.blocks)
    shrinks = tiles * -(-ranks // form.rank_tile)
    bucket = Bucket(form, tiles + 2, rounded(shrinks) + 2, (True,))
    shrink, expand = (torch.from_numpy(items) for items in items_of(0, laid.kind, given, bucket))
    shrink = shrink[: int((shrink[:, 1] > 0).sum()) + 2]
    return Items(shrink, expand, torch.full((form.splits, len(shrink), form.token_tile, form.rank_tile), NAN))


def added(laid: Laid, x: torch.Tensor, spans: list[tuple[int, int, int]]) -> torch.Tensor:
    """What adapters add by their definition, float32 [T, out]; NaN for other tokens."""
    y = torch.full((len(x), laid.kind.columns[-1]), NAN)
    for start, stop, adapter in spans:
        y[start:stop] = 0
        for target, pair in enumerate(laid.pairs[adapter]):
            if pair is not None:
                first, end = laid.kind.columns[target : target + 2]
                y[start:stop, first:end] = x[start:stop].float() @ pair[0].float().T @ pair[1].float()
    return y
