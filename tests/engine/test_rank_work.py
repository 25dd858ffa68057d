"""Every token and rank of a step has its place in the items, once; layouts hold every number, once."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.kernels.lora.form import TABLES, Entry, Form, Table, table_for, table_from_json
from engine.projection import Projection, TargetModule
from engine.rank_layout import Kind, chunks, kinds_of, layer_of, row_width
from engine.rank_pieces import Extent, Layout
from engine.rank_work import SHRINK_ITEM, Block, Bucket, Span, bucket_of, expand_item, fits, items_of, rounded

KINDS = (Kind((0, 2), 48, (0, 48, 72, 96)), Kind((1, 3), 80, (0, 48)))
TABLE = Table(
    (Entry(1, 2, Form(1, 16, 16, 4, 16, 4, 2, 4, 2)), Entry(1 << 30, 1 << 30, Form(16, 32, 16, 1, 16, 4, 2, 4, 2)))
)

ranks_of_three = st.tuples(*[st.sampled_from([0, 1, 3, 16, 20])] * 3)
adapters = st.tuples(ranks_of_three, st.tuples(st.sampled_from([0, 1, 8, 33])), st.booleans(), st.integers(0, 999))
steps = st.lists(st.tuples(adapters, st.sampled_from([1, 1, 1, 2, 17, 32])), min_size=1, max_size=5)
Step = list[tuple[tuple[tuple[int, ...], tuple[int, ...], bool, int], int]]


def spans_of(step: Step) -> list[Span]:
    spans, place = [], 1
    for (first, second, scattered, start), tokens in step:
        blocks = [
            Block(kind, 16, start, scattered, ranks) if any(ranks) else None
            for kind, ranks in zip(KINDS, (first, second), strict=True)
        ]
        spans.append(Span(place, place + tokens, blocks))
        place += tokens + tokens % 2
    return spans


def bucket_for(spans: list[Span]) -> Bucket:
    totals = [[block.total if block else 0 for block in span.blocks] for span in spans]
    return bucket_of([span.stop - span.start for span in spans], totals, KINDS, TABLE)


def parts_of(item: list[int]) -> list[list[int]]:
    return [item[at : at + 4] for at in range(4, len(item), 4)]


@settings(max_examples=120, deadline=None)
@given(steps)
def test_items_cover_every_token_and_rank_once_and_agree(step: Step) -> None:
    spans = spans_of(step)
    bucket = bucket_for(spans)
    form = bucket.form
    assert fits(bucket, bucket)
    for number, kind in enumerate(KINDS):
        if not bucket.touched[number]:
            assert all(span.blocks[number] is None for span in spans)
            continue
        shrinks, expands = (items.tolist() for items in items_of(number, kind, spans, bucket))
        assert all(len(item) == SHRINK_ITEM for item in shrinks)
        assert all(len(item) == expand_item(kind) for item in expands)
        assert len(shrinks) == bucket.shrink_items(kind) and len(expands) == bucket.tiles
        shrunk = Counter(
            (token + t, rank + r)
            for token, tokens, rank, ranks, *_ in shrinks
            for t in range(tokens)
            for r in range(ranks)
        )
        wanted = Counter(
            (token, rank)
            for span in spans
            if (block := span.blocks[number])
            for token in range(span.start, span.stop)
            for rank in range(sum(block.ranks))
        )
        assert shrunk == wanted
        expanded: Counter[tuple[int, int]] = Counter()
        for item in expands:
            token, tokens, z_item, _scattered = item[:4]
            for rank, ranks, _start, _ in parts_of(item) if tokens else []:
                for r in range(rank, rank + ranks):
                    # Its part of z is that of the same tokens and ranks.
                    source = shrinks[z_item + r // form.rank_tile]
                    assert source[:2] == [token, tokens] and source[2] == r - r % form.rank_tile
                    expanded.update((token + t, r) for t in range(tokens))
        assert expanded == wanted
        assert all(0 < item[1] <= form.token_tile and 0 < item[3] <= form.rank_tile for item in shrinks if item[1])


@settings(max_examples=200, deadline=None)
@given(steps)
def test_a_bucket_is_hardly_larger_than_what_is_in_it(step: Step) -> None:
    spans = spans_of(step)
    bucket = bucket_for(spans)
    if any(bucket.touched):
        used = max(
            sum(-(-(span.stop - span.start) // bucket.form.token_tile) for span in spans if span.blocks[number])
            for number in range(2)
        )
        assert used <= bucket.tiles <= max(1, used * 3 // 2)
    assert not any(bucket.touched) or bucket.shrinks


@given(st.integers(1, 5000), st.integers(1, 5000))
def test_sizes_of_buckets_are_few_and_in_order(one: int, other: int) -> None:
    assert one <= rounded(one) <= max(one + 1, one * 3 // 2)
    assert (one > other) or rounded(one) <= rounded(other)
    assert rounded(rounded(one)) == rounded(one)


def test_a_step_of_a_larger_bucket_or_another_form_does_not_fit() -> None:
    bucket = Bucket(TABLE.entries[0].form, 4, 6, (True, True))
    assert fits(Bucket(bucket.form, 3, 4, (True, False)), bucket)
    assert not fits(Bucket(bucket.form, 6, 4, (True, True)), bucket)
    assert not fits(Bucket(bucket.form, 4, 8, (True, True)), bucket)
    assert not fits(bucket, Bucket(bucket.form, 4, 6, (True, False)))
    assert not fits(Bucket(TABLE.entries[1].form, 4, 6, (True, True)), bucket)


@given(ranks_of_three, st.sampled_from([16, 32, 64]))
def test_a_block_uses_each_of_its_rows_once(ranks: tuple[int, ...], width: int) -> None:
    kind, total = KINDS[0], sum(ranks)
    used = [c * total + r for c in range(chunks(48, width)) for r in range(total)]
    for rank, out, base in zip(ranks, kind.outs, kind.bases(ranks, width), strict=True):
        used += [base + c * rank + r for c in range(chunks(out, width)) for r in range(rank)]
    assert sorted(used) == list(range(kind.rows_of(ranks, width)))


def base_of(layers: int, dense: int = 0) -> tuple[Projection, ...]:
    """Two projections for each layer, and a third one in the first `dense`."""
    found = []
    for layer in range(layers):
        name = f"model.layers.{layer}."
        siblings = (("q", 24), ("k", 8))
        found.append(Projection(tuple(TargetModule(name + target, 20, out) for target, out in siblings)))
        found.append(Projection((TargetModule(name + "o", 24, 20),)))
        if layer < dense:
            found.append(Projection((TargetModule(name + "up", 20, 50),)))
    return tuple(found)


def test_projections_at_the_same_place_are_of_one_kind() -> None:
    kinds = kinds_of(base_of(3, dense=1))
    assert [(kind.projections, kind.in_features, kind.outs) for kind in kinds] == [
        ((0, 3, 5), 20, (24, 8)),
        ((1, 4, 6), 24, (20,)),
        ((2,), 20, (50,)),
    ]


def test_widths_waste_next_to_nothing() -> None:
    def width(*sizes: int) -> int:
        return row_width([Kind((0,), size, (0, size)) for size in sizes])

    assert width(4096, 1024, 14336) == 1024
    assert width(4096, 11008) == 256
    assert width(896, 128, 4864) == 128
    assert width(48, 24, 80) == 16


def test_a_layer_is_the_first_number_of_a_path() -> None:
    assert layer_of("model.layers.12.mlp.experts.3.up") == 12


@settings(max_examples=150, deadline=None)
@given(
    st.dictionaries(
        st.sampled_from([target.name for projection in base_of(3, dense=1) for target in projection.targets]),
        st.integers(1, 9),
        min_size=1,
    )
)
def test_pieces_fill_every_row_of_every_layer_once_from_the_right_place(ranks: dict[str, int]) -> None:
    projections = base_of(3, dense=1)
    kinds = kinds_of(projections)
    layout = Layout(projections, kinds, (1, 1, 0), 16, 2)
    targets = {target.name: target for projection in projections for target in projection.targets}
    extents, place = {}, 1000
    for name in sorted(ranks):
        for half, size in (("A", targets[name].in_features), ("B", targets[name].out_features)):
            extents[f"{name}.{half}"] = Extent(place, place + 2 * size * ranks[name], ranks[name])
            place = extents[f"{name}.{half}"].stop
    counts = layout.rows_of(layout.ranks_of(extents))
    written: dict[tuple[int, int], Counter[int]] = {}
    read: Counter[int] = Counter()
    layers = layout.layers_of(extents)
    for layer in layers:
        for placing in layer.placings:
            where = written.setdefault((placing.arena, placing.layer), Counter())
            for size, most, logical, step, there, offset, by_rank, by_column in placing.pieces:
                assert there <= most
                where.update(logical + c * step + r for c in range(chunks(size, 16)) for r in range(most))
                for r in range(there):
                    read.update(layer.start + 2 * (offset + r * by_rank + c * by_column) for c in range(size))
            assert placing.most_rows(16) == max(chunks(size, 16) * most for size, most, *_ in placing.pieces)
    for arena, depth in ((0, 1), (1, 3)):
        for number in range(depth if counts[arena] else 0):
            assert written[arena, number] == Counter(range(counts[arena]))
    assert read == Counter(range(1000, place, 2))
    assert [number for layer in layers for number in layer.projections] == sorted(
        number
        for kind, its in zip(kinds, layout.ranks_of(extents), strict=True)
        if any(its)
        for number in kind.projections
    )
    # Sorted by name, a layer is one run of the file that no other layer's overlaps.
    spans = sorted((layer.start, layer.stop) for layer in layers if layer.stop)
    assert all(one[1] <= following[0] for one, following in pairwise(spans))


def test_a_table_is_looked_up_in_order_and_serves_every_step() -> None:
    assert TABLE.choose(1, 2).token_tile == 1
    assert TABLE.choose(1, 3).token_tile == TABLE.choose(9, 1).token_tile == 16
    with pytest.raises(ValueError, match="last form of a table has no limits"):
        Table(TABLE.entries[:1])


def test_an_unknown_device_gets_the_default_table() -> None:
    default = table_from_json((TABLES / "default.json").read_text())
    assert table_for("NVIDIA  Imaginary 9000") == default != table_for("cpu")


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"token_tile": 8}, "matrix units"),
        ({"rank_tile": 8}, "at least 16"),
        ({"splits": 3}, "power of two"),
        ({"shrink_stages": 0}, "0"),
    ],
)
def test_a_form_that_no_kernel_has_is_refused(changed: dict[str, int], says: str) -> None:
    given = {"token_tile": 16, "rank_tile": 16, "k_tile": 64, "splits": 2, "column_tile": 64}
    warps = {"shrink_warps": 4, "shrink_stages": 3, "expand_warps": 4, "expand_stages": 3}
    Form(**given, **warps)
    with pytest.raises(ValueError, match=says):
        Form(**(given | warps | changed))
