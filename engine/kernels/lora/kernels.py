"""The LoRA kernels. What they compute is in `reference.py`; how the work is cut up, in `form.py`.

Bytes. Both kernels are bound by reading the adapters: rank · (in + out) numbers of each projection and adapter, once per
step in decode. For rank 16 on all linear layers of an 8B model that is 84 MB per adapter and step, 17.5 µs at 4.8 TB/s.
So a step of 8 adapters has 140 µs for 256 launches, and what counts is how long one program waits, not how much it
multiplies. Each program therefore reads its item, then its rows, and nothing in between unless rows are scattered; the
shrink is split over the input features until a few hundred programs are in flight.

Order. Every sum has one order that depends on the form alone: planes are summed when they are read, nothing is added
by atomics, and each number of y has one program. The same step gives the same bits.

Offsets into the arena are 64 bits wide: it may be larger than 2^31 numbers.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Numbers of an item of the shrink, and of a piece of an artifact. An item of the expand has 4, and 4 for each target.
ITEM = PIECE = 8
_ITEM, _PIECE = tl.constexpr(ITEM), tl.constexpr(PIECE)


@triton.jit
def _rows_at(table, start, logical, scattered, live):
    """Physical rows; of a scattered adapter from the table. A load without a live lane touches no memory."""
    listed = tl.load(table + start + logical, mask=live.to(tl.int32) * scattered != 0, other=0)
    return tl.where(scattered != 0, listed, start + logical).to(tl.int64)


@triton.jit
def _product(a, b, acc, UPCAST: tl.constexpr):
    if UPCAST:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def shrink_gemv(
    x, arena, table, items, z, x_stride,
    IN: tl.constexpr, WIDTH: tl.constexpr, TOKENS: tl.constexpr, RANKS: tl.constexpr, K: tl.constexpr,
    SPLITS: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """One token, RANKS ranks, one split of the input. TOKENS is 1 and UPCAST unused: all products are float32."""
    item, split = tl.program_id(0), tl.program_id(1)
    at = items + item * _ITEM
    tokens = tl.load(at + 1)
    if tokens == 0:
        return
    token, rank, ranks, stride = tl.load(at), tl.load(at + 2), tl.load(at + 3), tl.load(at + 4)
    start, scattered = tl.load(at + 5), tl.load(at + 6)
    r = tl.arange(0, RANKS)
    live = r < ranks
    lanes = tl.arange(0, K)
    tiles: tl.constexpr = (IN + K - 1) // K
    each: tl.constexpr = (tiles + SPLITS - 1) // SPLITS
    acc = tl.zeros((RANKS, K), dtype=tl.float32)
    for tile in range(split * each, min(split * each + each, tiles)):
        k = tile * K + lanes
        chunk = tile // (WIDTH // K)
        row = _rows_at(table, start, chunk * stride + rank + r, scattered, live)
        inside = tile % (WIDTH // K) * K + lanes
        a = tl.load(arena + row[:, None] * WIDTH + inside[None, :], mask=live[:, None] & (k < IN)[None, :], other=0.0)
        given = tl.load(x + token.to(tl.int64) * x_stride + k, mask=k < IN, other=0.0)
        acc += a.to(tl.float32) * given.to(tl.float32)[None, :]
    plane = (split * tl.num_programs(0) + item).to(tl.int64)
    tl.store(z + plane * RANKS + r, tl.sum(acc, axis=1))


@triton.jit
def shrink_gemm(
    x, arena, table, items, z, x_stride,
    IN: tl.constexpr, WIDTH: tl.constexpr, TOKENS: tl.constexpr, RANKS: tl.constexpr, K: tl.constexpr,
    SPLITS: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """TOKENS tokens, RANKS ranks, one split of the input, on matrix units."""
    item, split = tl.program_id(0), tl.program_id(1)
    at = items + item * _ITEM
    tokens = tl.load(at + 1)
    if tokens == 0:
        return
    token, rank, ranks, stride = tl.load(at), tl.load(at + 2), tl.load(at + 3), tl.load(at + 4)
    start, scattered = tl.load(at + 5), tl.load(at + 6)
    t, r, lanes = tl.arange(0, TOKENS), tl.arange(0, RANKS), tl.arange(0, K)
    live = r < ranks
    mine = x + (token + t).to(tl.int64)[:, None] * x_stride
    tiles: tl.constexpr = (IN + K - 1) // K
    each: tl.constexpr = (tiles + SPLITS - 1) // SPLITS
    acc = tl.zeros((TOKENS, RANKS), dtype=tl.float32)
    for tile in range(split * each, min(split * each + each, tiles)):
        k = tile * K + lanes
        chunk = tile // (WIDTH // K)
        row = _rows_at(table, start, chunk * stride + rank + r, scattered, live)
        inside = tile % (WIDTH // K) * K + lanes
        # [K, RANKS]: rows of the arena are columns of the product.
        a = tl.load(arena + row[None, :] * WIDTH + inside[:, None], mask=live[None, :] & (k < IN)[:, None], other=0.0)
        given = tl.load(mine + k[None, :], mask=(t < tokens)[:, None] & (k < IN)[None, :], other=0.0)
        acc = _product(given, a, acc, UPCAST)
    plane = (split * tl.num_programs(0) + item).to(tl.int64)
    tl.store(z + (plane * TOKENS + t[:, None]) * RANKS + r[None, :], acc)


@triton.jit(do_not_specialize=["z_items"])
def expand_gemv(
    z, arena, table, items, y, y_stride, z_items,
    COLUMNS: tl.constexpr, WIDTH: tl.constexpr, TOKENS: tl.constexpr, RANKS: tl.constexpr, Z_RANKS: tl.constexpr,
    TILE: tl.constexpr, SPLITS: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """One token, TILE columns of one target, all its ranks. TOKENS is 1 and UPCAST unused."""
    targets: tl.constexpr = len(COLUMNS) - 1
    at = items + tl.program_id(1) * (4 + 4 * targets)
    tokens = tl.load(at + 1)
    if tokens == 0:
        return
    target, tile, first, width = _target(tl.program_id(0), COLUMNS, TILE)
    of = at + 4 + 4 * target
    rank, ranks, start = tl.load(of), tl.load(of + 1), tl.load(of + 2)
    if ranks == 0:
        return
    token, z_item, scattered = tl.load(at), tl.load(at + 2), tl.load(at + 3)
    lanes, planes = tl.arange(0, TILE), tl.arange(0, SPLITS)
    column = tile * TILE + lanes
    chunk, inside = tile // (WIDTH // TILE), tile % (WIDTH // TILE) * TILE + lanes
    acc = tl.zeros((RANKS, TILE), dtype=tl.float32)
    for begin in range(0, ranks, RANKS):
        r = begin + tl.arange(0, RANKS)
        live = r < ranks
        place = (z_item + (rank + r) // Z_RANKS) * Z_RANKS + (rank + r) % Z_RANKS
        parts = planes.to(tl.int64)[:, None] * z_items * Z_RANKS + place[None, :]
        shrunk = tl.sum(tl.load(z + parts, mask=live[None, :], other=0.0), axis=0)
        row = _rows_at(table, start, chunk * ranks + r, scattered, live)
        mask = live[:, None] & (column < width)[None, :]
        b = tl.load(arena + row[:, None] * WIDTH + inside[None, :], mask=mask, other=0.0)
        acc += b.to(tl.float32) * shrunk[:, None]
    out = y + token.to(tl.int64) * y_stride + first + column
    base = tl.load(out, mask=column < width, other=0.0)
    tl.store(out, (base.to(tl.float32) + tl.sum(acc, axis=0)).to(base.dtype), mask=column < width)


@triton.jit(do_not_specialize=["z_items"])
def expand_gemm(
    z, arena, table, items, y, y_stride, z_items,
    COLUMNS: tl.constexpr, WIDTH: tl.constexpr, TOKENS: tl.constexpr, RANKS: tl.constexpr, Z_RANKS: tl.constexpr,
    TILE: tl.constexpr, SPLITS: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """TOKENS tokens, TILE columns of one target, all its ranks, on matrix units.

    They take z in y's type. So that it is not rounded, it is the sum of two such numbers, each multiplied: twice as many
    operations where operations are nothing.
    """
    targets: tl.constexpr = len(COLUMNS) - 1
    at = items + tl.program_id(1) * (4 + 4 * targets)
    tokens = tl.load(at + 1)
    if tokens == 0:
        return
    target, tile, first, width = _target(tl.program_id(0), COLUMNS, TILE)
    of = at + 4 + 4 * target
    rank, ranks, start = tl.load(of), tl.load(of + 1), tl.load(of + 2)
    if ranks == 0:
        return
    token, z_item, scattered = tl.load(at), tl.load(at + 2), tl.load(at + 3)
    t, lanes = tl.arange(0, TOKENS), tl.arange(0, TILE)
    column = tile * TILE + lanes
    chunk, inside = tile // (WIDTH // TILE), tile % (WIDTH // TILE) * TILE + lanes
    acc = tl.zeros((TOKENS, TILE), dtype=tl.float32)
    for begin in range(0, ranks, RANKS):
        r = begin + tl.arange(0, RANKS)
        live = r < ranks
        place = (z_item + (rank + r) // Z_RANKS).to(tl.int64)[None, :] * TOKENS + t[:, None]
        place = place * Z_RANKS + ((rank + r) % Z_RANKS)[None, :]
        shrunk = tl.zeros((TOKENS, RANKS), dtype=tl.float32)
        for _ in tl.static_range(SPLITS):
            shrunk += tl.load(z + place, mask=live[None, :] & (t < tokens)[:, None], other=0.0)
            place += z_items * TOKENS * Z_RANKS
        row = _rows_at(table, start, chunk * ranks + r, scattered, live)
        mask = live[:, None] & (column < width)[None, :]
        b = tl.load(arena + row[:, None] * WIDTH + inside[None, :], mask=mask, other=0.0)
        if UPCAST or b.dtype == tl.float32:
            acc = tl.dot(shrunk, b.to(tl.float32), acc, input_precision="ieee")
        else:
            high = shrunk.to(b.dtype)
            low = (shrunk - high.to(tl.float32)).to(b.dtype)
            acc = tl.dot(high, b, acc)
            acc = tl.dot(low, b, acc)
    out = y + (token + t).to(tl.int64)[:, None] * y_stride + first + column[None, :]
    mask = (t < tokens)[:, None] & (column < width)[None, :]
    base = tl.load(out, mask=mask, other=0.0)
    tl.store(out, (base.to(tl.float32) + acc).to(base.dtype), mask=mask)


@triton.jit
def _target(number, COLUMNS: tl.constexpr, TILE: tl.constexpr):
    """Of a program's number among the columns: target, tile within it, its first column in y, its width."""
    target = 0
    tile = number
    first = 0
    width = COLUMNS[1] - COLUMNS[0] + 0 * number
    for j in tl.static_range(1, len(COLUMNS) - 1):
        is_later = (target == j - 1) & (tile >= (COLUMNS[j] - COLUMNS[j - 1] + TILE - 1) // TILE)
        tile = tl.where(is_later, tile - (COLUMNS[j] - COLUMNS[j - 1] + TILE - 1) // TILE, tile)
        first = tl.where(is_later, COLUMNS[j], first)
        width = tl.where(is_later, COLUMNS[j + 1] - COLUMNS[j], width)
        target = tl.where(is_later, j, target)
    return target, tile, first, width


@triton.jit(do_not_specialize=["start", "scattered"])
def place_rows(
    source, arena, table, pieces, start, scattered,
    WIDTH: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """ROWS rows of the arena from one layer of an artifact as it is in its file; zeros where the artifact has none."""
    at = pieces + tl.program_id(1) * _PIECE
    size, ranks, logical, step = tl.load(at), tl.load(at + 1), tl.load(at + 2), tl.load(at + 3)
    rows = (size + WIDTH - 1) // WIDTH * ranks
    if tl.program_id(0) * ROWS >= rows:
        return
    there, offset = tl.load(at + 4), tl.load(at + 5)
    by_rank, by_column = tl.load(at + 6), tl.load(at + 7)
    number = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    chunk, rank = number // ranks, number % ranks
    lanes = tl.arange(0, WIDTH)
    column = chunk[:, None] * WIDTH + lanes[None, :]
    place = offset.to(tl.int64) + rank.to(tl.int64)[:, None] * by_rank + column.to(tl.int64) * by_column
    live = number < rows
    mask = (column < size) & (rank < there)[:, None] & live[:, None]
    values = tl.load(source + place, mask=mask, other=0.0)
    row = _rows_at(table, start + logical, chunk * step + rank, scattered, live)
    tl.store(arena + row[:, None] * WIDTH + lanes[None, :], values, mask=live[:, None])
