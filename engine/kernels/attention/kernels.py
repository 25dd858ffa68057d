"""Paged attention in Triton. What each computes is in `reference`; how they are launched in `launch`.

Softmax runs in float32 and in powers of two: scores are scaled by log2(e) once. `UPCAST` makes operands of products
float32 as well, for where products of bfloat16 cannot be had (the interpreter).
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def write_kernel(
    key, value, slots, keys, values,
    key_token, key_head, value_token, value_head,
    kv_heads, key_size, value_size,
    HEADS: tl.constexpr, KEY: tl.constexpr, VALUE: tl.constexpr,
):  # fmt: skip
    """Program (token): its keys and values, all heads, to its slot."""
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + token).to(tl.int64)
    if slot >= 0:
        heads = tl.arange(0, HEADS)[:, None]
        at = tl.arange(0, KEY)[None, :]
        mask = (heads < kv_heads) & (at < key_size)
        found = tl.load(key + token * key_token + heads * key_head + at, mask=mask)
        tl.store(keys + (slot * kv_heads + heads) * key_size + at, found, mask=mask)
        at = tl.arange(0, VALUE)[None, :]
        mask = (heads < kv_heads) & (at < value_size)
        found = tl.load(value + token * value_token + heads * value_head + at, mask=mask)
        tl.store(values + (slot * kv_heads + heads) * value_size + at, found, mask=mask)


@triton.jit
def _scores(query, key, scaling, softcap, SOFTCAP: tl.constexpr, UPCAST: tl.constexpr):
    """query [M, D] · key [D, N], scaled and capped, times log2(e), float32."""
    if UPCAST:
        query, key = query.to(tl.float32), key.to(tl.float32)
    scores = tl.dot(query, key, input_precision="ieee") * scaling
    if SOFTCAP:
        # tanh by way of exp, which does not overflow to anything but the right limit.
        scores = softcap * (1.0 - 2.0 / (tl.exp(2.0 * scores / softcap) + 1.0))
    return scores * LOG2E


@triton.jit
def _accumulate(best, total, mixed, scores, value, UPCAST: tl.constexpr):
    """One more tile of the running softmax; a row that has seen nothing yet has best = -inf and total = 0."""
    better = tl.maximum(best, tl.max(scores, 1))
    # A row may see nothing of a tile, nor of those before: -inf - -inf must not happen.
    pivot = tl.where(better == float("-inf"), 0.0, better)
    shares = tl.exp2(scores - pivot[:, None])
    shrink = tl.exp2(best - pivot)
    total = total * shrink + tl.sum(shares, 1)
    if UPCAST:
        added = tl.dot(shares, value.to(tl.float32), input_precision="ieee")
    else:
        added = tl.dot(shares.to(value.dtype), value, input_precision="ieee")
    return better, total, mixed * shrink[:, None] + added


@triton.jit
def _slots(table, places, mask, BLOCK: tl.constexpr):
    block = tl.load(table + places // BLOCK, mask=mask, other=0).to(tl.int64)
    return block * BLOCK + places % BLOCK


@triton.jit
def decode_kernel(
    query, keys, values, tables, rows, lengths, out, parts, bests, totals,
    query_token, query_head, table_row, kv_heads, group, key_size, value_size,
    scaling, softcap, window,
    BLOCK: tl.constexpr, SPLIT: tl.constexpr, SPLITS: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, KEY: tl.constexpr, VALUE: tl.constexpr,
    SOFTCAP: tl.constexpr, WINDOW: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Program (row, kv head, split): one token's query heads of one kv head, over SPLIT places of its sequence.

    With one split the result goes to `out`; with several, what is needed to join them goes to `parts`, `bests`, `totals`.
    """
    row, head, split = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    token = tl.load(rows + row).to(tl.int64)
    length = tl.load(lengths + row)
    first = split * SPLIT
    stop = tl.minimum(length, first + SPLIT)
    if WINDOW:
        first = tl.maximum(first, (length - window) // N * N)
    member = tl.arange(0, M)
    is_member = member < group
    at_key, at_value = tl.arange(0, KEY), tl.arange(0, VALUE)
    heads = head * group + member
    mine = query + token * query_token + heads[:, None] * query_head + at_key[None, :]
    asked = tl.load(mine, mask=is_member[:, None] & (at_key < key_size)[None, :], other=0.0)
    best = tl.full([M], float("-inf"), tl.float32)
    total = tl.zeros([M], tl.float32)
    mixed = tl.zeros([M, VALUE], tl.float32)
    table = tables + row * table_row
    for start in range(first, stop, N):
        places = start + tl.arange(0, N)
        here = places < stop
        slots = _slots(table, places, here, BLOCK) * kv_heads + head
        key = tl.load(
            keys + slots[None, :] * key_size + at_key[:, None],
            mask=here[None, :] & (at_key < key_size)[:, None],
            other=0.0,
        )
        scores = _scores(asked, key, scaling, softcap, SOFTCAP, UPCAST)
        visible = here
        if WINDOW:
            visible = visible & (places >= length - window)
        scores = tl.where(visible[None, :], scores, float("-inf"))
        value = tl.load(
            values + slots[:, None] * value_size + at_value[None, :],
            mask=here[:, None] & (at_value < value_size)[None, :],
            other=0.0,
        )
        best, total, mixed = _accumulate(best, total, mixed, scores, value, UPCAST)
    writes = is_member[:, None] & (at_value < value_size)[None, :]
    if SPLITS == 1:
        # A row of length 0 is padding: it gets zeros.
        result = mixed / tl.where(total == 0.0, 1.0, total)[:, None]
        place = token * kv_heads * group + heads
        tl.store(out + place[:, None] * value_size + at_value[None, :], result.to(out.dtype.element_ty), mask=writes)
    else:
        if first < stop:
            part = (row * kv_heads * group + heads) * SPLITS + split
            tl.store(parts + part[:, None] * value_size + at_value[None, :], mixed, mask=writes)
            tl.store(bests + part, best, mask=is_member)
            tl.store(totals + part, total, mask=is_member)


@triton.jit
def join_kernel(
    rows, lengths, out, parts, bests, totals, heads, value_size, window,
    SPLIT: tl.constexpr, SPLITS: tl.constexpr, VALUE: tl.constexpr, WINDOW: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Program (row, head): joins the splits of a row, always in the same order."""
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    length = tl.load(lengths + row)
    first = 0
    if WINDOW:
        first = tl.maximum(0, (length - window) // N * N) // SPLIT
    at = tl.arange(0, VALUE)
    inside = at < value_size
    best = tl.max(tl.full([1], float("-inf"), tl.float32), 0)
    total = tl.sum(tl.zeros([1], tl.float32), 0)
    mixed = tl.zeros([VALUE], tl.float32)
    for split in range(first, tl.cdiv(length, SPLIT)):
        part = (row * heads + head) * SPLITS + split
        its = tl.load(bests + part)
        better = tl.maximum(best, its)
        keep, take = tl.exp2(best - better), tl.exp2(its - better)
        total = total * keep + tl.load(totals + part) * take
        mixed = mixed * keep + tl.load(parts + part * value_size + at, mask=inside, other=0.0) * take
        best = better
    result = mixed / tl.where(total == 0.0, 1.0, total)
    place = tl.load(rows + row).to(tl.int64) * heads + head
    tl.store(out + place * value_size + at, result.to(out.dtype.element_ty), mask=inside)


@triton.jit
def prefill_kernel(
    query, keys, values, tables, tiles, chunks, out,
    query_token, query_head, table_row, heads, kv_heads, key_size, value_size,
    scaling, softcap, window,
    BLOCK: tl.constexpr, M: tl.constexpr, N: tl.constexpr, KEY: tl.constexpr, VALUE: tl.constexpr,
    SOFTCAP: tl.constexpr, WINDOW: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Program (head, tile): M tokens of one chunk, over all places they see.

    tiles [n, 2]: chunk and first token in it, a negative chunk for none. chunks [c, 3]: first token of the step, first
    one after it, how many tokens of the sequence come before.
    """
    head, tile = tl.program_id(0), tl.program_id(1)
    chunk = tl.load(tiles + tile * 2)
    if chunk >= 0:
        offset = tl.load(tiles + tile * 2 + 1)
        begin, end = tl.load(chunks + chunk * 3), tl.load(chunks + chunk * 3 + 1)
        context = tl.load(chunks + chunk * 3 + 2)
        tokens = begin + offset + tl.arange(0, M)
        is_token = tokens < end
        own = context + offset + tl.arange(0, M)
        at_key, at_value = tl.arange(0, KEY), tl.arange(0, VALUE)
        tokens = tokens.to(tl.int64)
        asked = tl.load(
            query + tokens[:, None] * query_token + head * query_head + at_key[None, :],
            mask=is_token[:, None] & (at_key < key_size)[None, :],
            other=0.0,
        )
        best = tl.full([M], float("-inf"), tl.float32)
        total = tl.zeros([M], tl.float32)
        mixed = tl.zeros([M, VALUE], tl.float32)
        first = 0
        if WINDOW:
            first = tl.maximum(0, (context + offset - window + 1) // N * N)
        stop = tl.minimum(context + offset + M, context + end - begin)
        table = tables + chunk.to(tl.int64) * table_row
        kv_head = head // (heads // kv_heads)
        for start in range(first, stop, N):
            places = start + tl.arange(0, N)
            here = places < stop
            slots = _slots(table, places, here, BLOCK) * kv_heads + kv_head
            key = tl.load(
                keys + slots[None, :] * key_size + at_key[:, None],
                mask=here[None, :] & (at_key < key_size)[:, None],
                other=0.0,
            )
            scores = _scores(asked, key, scaling, softcap, SOFTCAP, UPCAST)
            visible = here[None, :] & (places[None, :] <= own[:, None])
            if WINDOW:
                visible = visible & (places[None, :] > own[:, None] - window)
            scores = tl.where(visible, scores, float("-inf"))
            value = tl.load(
                values + slots[:, None] * value_size + at_value[None, :],
                mask=here[:, None] & (at_value < value_size)[None, :],
                other=0.0,
            )
            best, total, mixed = _accumulate(best, total, mixed, scores, value, UPCAST)
        result = mixed / tl.where(total == 0.0, 1.0, total)[:, None]
        tl.store(
            out + (tokens[:, None] * heads + head) * value_size + at_value[None, :],
            result.to(out.dtype.element_ty),
            mask=is_token[:, None] & (at_value < value_size)[None, :],
        )
