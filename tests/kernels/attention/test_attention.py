"""Paged attention against its reference: odd lengths, shared heads, windows, caps, padded rows, poisoned memory."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from engine.blocks import BLOCK_SIZE, blocks_for
from engine.kernels.attention import launch, reference

pytestmark = pytest.mark.interpreted

TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
NAN = float("nan")


@dataclass(frozen=True)
class Case:
    """Heads and sizes of a layer, and how it attends."""

    heads: int = 4
    kv_heads: int = 2
    key_size: int = 64
    value_size: int = 64
    dtype: torch.dtype = torch.float32
    softcap: float | None = None
    window: int | None = None

    @property
    def form(self) -> dict[str, Any]:
        return {"scaling": self.key_size**-0.5, "softcap": self.softcap, "window": self.window}


@dataclass
class Pool:
    """A pool whose every slot that belongs to no token is NaN."""

    case: Case
    lengths: list[int]
    tables: torch.Tensor = field(init=False)
    keys: torch.Tensor = field(init=False)
    values: torch.Tensor = field(init=False)

    def __post_init__(self) -> None:
        case = self.case
        count = sum(blocks_for(length) for length in self.lengths) + 2
        slots = count * BLOCK_SIZE
        self.keys = torch.full((slots, case.kv_heads, case.key_size), NAN, dtype=case.dtype)
        self.values = torch.full((slots, case.kv_heads, case.value_size), NAN, dtype=case.dtype)
        free = (1 + torch.randperm(count - 1)).tolist()
        # Beyond a row's last block the table is poisoned too: it must not be followed.
        width = max([blocks_for(length) for length in self.lengths] + [1])
        self.tables = torch.full((len(self.lengths), width), -(10**6), dtype=torch.int32)
        for row, length in enumerate(self.lengths):
            for place in range(blocks_for(length)):
                self.tables[row, place] = free.pop()
            slots_of_row = self.slots(row, 0, length)
            self.keys[slots_of_row] = torch.randn(length, case.kv_heads, case.key_size).to(case.dtype)
            self.values[slots_of_row] = torch.randn(length, case.kv_heads, case.value_size).to(case.dtype)

    def slots(self, row: int, start: int, stop: int) -> torch.Tensor:
        place = torch.arange(start, stop)
        return self.tables[row].long()[place // BLOCK_SIZE] * BLOCK_SIZE + place % BLOCK_SIZE


def check_decode(case: Case, lengths: list[int]) -> None:
    torch.manual_seed(len(lengths))
    pool = Pool(case, lengths)
    # The rows are some of the step's tokens, in any order.
    heads, tokens = case.heads, len(lengths) + 2
    places = torch.randperm(tokens)[: len(lengths)].int()
    # As models hand it over: heads first.
    query = torch.randn(heads, tokens, case.key_size).to(case.dtype).transpose(0, 1)
    out = torch.full((tokens, heads, case.value_size), NAN, dtype=case.dtype)
    launch.decode(
        query, pool.keys, pool.values, pool.tables, places, torch.tensor(lengths, dtype=torch.int32), out,
        splits=launch.splits_for(max(lengths)), **case.form,
    )  # fmt: skip
    for row, length in enumerate(lengths):
        expected = torch.zeros(1, heads, case.value_size)
        if length:
            one = query[places[row]][None]
            expected = reference.attend(one, length - 1, pool.tables[row], pool.keys, pool.values, **case.form)
        torch.testing.assert_close(out[places[row]][None].float(), expected, atol=TOLERANCE[case.dtype], rtol=0)
    rest = sorted(set(range(tokens)) - set(places.tolist()))
    assert out[rest].isnan().all()


def check_prefill(case: Case, chunks: list[tuple[int, int]]) -> None:
    """Chunks as (tokens before, tokens)."""
    torch.manual_seed(len(chunks))
    pool = Pool(case, [context + count for context, count in chunks])
    total = sum(count for _, count in chunks)
    query = torch.randn(case.heads, total, case.key_size).to(case.dtype).transpose(0, 1)
    out = torch.full((total, case.heads, case.value_size), NAN, dtype=case.dtype)
    places: list[list[int]] = []
    for context, count in chunks:
        first = places[-1][1] if places else 0
        places.append([first, first + count, context])
    m = launch.prefill_rows(max(case.key_size, case.value_size), case.dtype.itemsize)
    tiles = [*launch.tiles_of([count for _, count in chunks], m), (-1, 0)]
    launch.prefill(
        query, pool.keys, pool.values, pool.tables, torch.tensor(tiles, dtype=torch.int32),
        torch.tensor(places, dtype=torch.int32), out, m=m, **case.form,
    )  # fmt: skip
    for row, (first, stop, context) in enumerate(places):
        one = query[first:stop]
        expected = reference.attend(one, context, pool.tables[row], pool.keys, pool.values, **case.form)
        torch.testing.assert_close(out[first:stop].float(), expected, atol=TOLERANCE[case.dtype], rtol=0)


FORMS = [
    Case(),
    Case(heads=2, kv_heads=2),
    Case(heads=8, kv_heads=1, key_size=80, value_size=80),
    Case(heads=3, kv_heads=1, key_size=96, value_size=48),
    Case(heads=2, kv_heads=1, key_size=256, value_size=256),
    Case(heads=2, kv_heads=2, key_size=192, value_size=128),
    Case(softcap=3.0),
    Case(window=7),
    Case(window=100, softcap=3.0),
    Case(dtype=torch.float16),
    Case(dtype=torch.bfloat16, key_size=128, value_size=128),
]


@pytest.mark.parametrize("case", FORMS, ids=str)
def test_decode_is_attention_over_the_pages_of_each_row(case: Case) -> None:
    check_decode(case, [33, 1, 0, 16])


@pytest.mark.parametrize("case", [Case(), Case(window=40), Case(window=300), Case(softcap=3.0)], ids=str)
def test_decode_joins_the_splits_of_long_rows(case: Case) -> None:
    check_decode(case, [launch.SPLIT * 2 + 5, 3, 0, launch.SPLIT, launch.SPLIT + 1])


@pytest.mark.parametrize("case", FORMS, ids=str)
def test_prefill_is_attention_over_earlier_tokens_and_the_chunk_s_own(case: Case) -> None:
    check_prefill(case, [(0, 19), (37, 5), (16, 1)])


@pytest.mark.parametrize("window", [None, 70])
def test_prefill_of_more_than_one_tile(window: int | None) -> None:
    check_prefill(Case(heads=2, kv_heads=1, window=window), [(3, 131), (130, 17)])


def test_a_row_gets_the_same_bits_alone_and_beside_others() -> None:
    case = Case()
    torch.manual_seed(0)
    together, query = Pool(case, [600, 40]), torch.randn(2, 4, 64)

    def run(rows: slice, splits: int) -> torch.Tensor:
        out = torch.empty(2, 4, 64)[rows]
        lengths = torch.tensor(together.lengths, dtype=torch.int32)[rows]
        launch.decode(
            query[rows], together.keys, together.values, together.tables[rows], torch.arange(len(out)).int(), lengths,
            out, splits=splits, **case.form,
        )  # fmt: skip
        return out

    assert torch.equal(run(slice(0, 2), 4)[1], run(slice(1, 2), 1)[0])


def test_new_keys_and_values_go_to_their_slots_and_nowhere_else() -> None:
    case = Case(kv_heads=3, key_size=80, value_size=48)
    pool = Pool(case, [40])
    keys, values = pool.keys.clone(), pool.values.clone()
    # As models hand them over: columns of one joined product, heads first.
    key = torch.randn(3, 4, 100)[:, :, :80].transpose(0, 1)
    value = torch.randn(3, 4, 48).transpose(0, 1)
    slots = torch.tensor([17, -1, 3, 40], dtype=torch.int32)
    launch.write(key, value, slots, pool.keys, pool.values)
    reference.write(key, value, slots, keys, values)
    assert torch.equal(pool.keys.nan_to_num(7), keys.nan_to_num(7))
    assert torch.equal(pool.values.nan_to_num(7), values.nan_to_num(7))
