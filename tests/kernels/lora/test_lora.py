"""The LoRA kernels against what they are defined to add, and against their reference; everything else is poisoned."""

from __future__ import annotations

import pytest
import torch

from engine.kernels.lora import launch, reference
from engine.kernels.lora.form import Form
from tests.kernels.lora.blocks import NAN, added, form, items_for, kind_of, lay_out

pytestmark = pytest.mark.interpreted

torch.set_num_threads(1)

GEMV, GEMM = form(1), form(16)
TOLERANCE = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
# Start, stop and adapter of each span; tokens between them have no adapter.
POPULARITY = {
    "distinct": [(1, 2, 0), (2, 3, 1), (4, 5, 2)],
    "uniform": [(0, 2, 0), (2, 4, 1), (5, 7, 2)],
    "skewed": [(1, 20, 1), (20, 21, 0), (21, 22, 2)],
    "identical": [(2, 8, 0)],
    "with empty segments": [(1, 1, 0), (1, 3, 1), (3, 3, 2), (4, 5, 2)],
}


def compare(
    ranks: list[tuple[int, ...]],
    spans: list[tuple[int, int, int]],
    cut: Form,
    dtype: torch.dtype,
    sizes: tuple[int, tuple[int, ...]] = (50, (70, 33)),
) -> None:
    """Runs shrink and expand on a step with these spans; sizes are in and outs."""
    kind = kind_of(*sizes)
    laid = lay_out(kind, ranks, 32, dtype)
    items = items_for(laid, spans, cut)
    tokens = max(stop for _, stop, _ in spans) + 1
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(tokens, kind.in_features, generator=generator)
    expected = added(laid, x.to(dtype), spans)
    x[expected.isnan().any(1)] = NAN
    # The projection's output is part of a wider tensor.
    wide = torch.full((tokens, kind.columns[-1] + 5), NAN)
    base = torch.randn(tokens, kind.columns[-1], generator=generator)
    wide[:, 2:-3] = torch.where(expected.isnan(), NAN, base)
    wide, x = wide.to(dtype), x.to(dtype)
    right = wide.clone()
    right[:, 2:-3] = (right[:, 2:-3].float() + expected).to(dtype)

    found = wide.clone()
    launch.shrink(x, laid.rows, laid.table, items.shrink, items.z, cut)
    launch.expand(items.z, laid.rows, laid.table, items.expand, found[:, 2:-3], kind.columns, cut)
    by_reference = wide.clone()
    z = torch.full_like(items.z, NAN)
    reference.shrink(x, laid.rows, laid.table, items.shrink, z, cut)
    reference.expand(z, laid.rows, laid.table, items.expand, by_reference[:, 2:-3], kind.columns, cut)

    scale = float(expected.nan_to_num().abs().max())
    for one in (found, by_reference):
        torch.testing.assert_close(one, right, rtol=0, atol=TOLERANCE[dtype] * scale, equal_nan=True)
    alive = items.shrink[:, 1] > 0
    assert not items.z[:, alive].isnan().any() and items.z[:, ~alive].isnan().all()


@pytest.mark.parametrize("cut", [GEMV, GEMM], ids=["gemv", "gemm"])
@pytest.mark.parametrize("rank", [1, 3, 8, 16, 64, 200])
def test_any_rank(rank: int, cut: Form) -> None:
    compare([(rank, rank), (rank, 0)], [(1, 2, 0), (3, 5, 1)], cut, torch.float32)


@pytest.mark.parametrize("cut", [GEMV, GEMM], ids=["gemv", "gemm"])
@pytest.mark.parametrize("popularity", POPULARITY)
def test_mixed_ranks_whoever_is_asked_for(popularity: str, cut: Form) -> None:
    compare([(3, 1), (0, 8), (17, 2)], POPULARITY[popularity], cut, torch.float32)


@pytest.mark.parametrize("cut", [GEMV, GEMM, form(16, rank_tile=64, splits=4)], ids=["gemv", "gemm", "wide"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_other_number_types(dtype: torch.dtype, cut: Form) -> None:
    compare([(3, 20), (8, 1)], [(0, 1, 0), (1, 4, 1)], cut, dtype)


@pytest.mark.parametrize("cut", [GEMV, GEMM], ids=["gemv", "gemm"])
@pytest.mark.parametrize("sizes", [(32, (32,)), (17, (1, 64, 31)), (65, (5,)), (16, (16, 16, 16, 16))])
def test_any_width_and_number_of_siblings(sizes: tuple[int, tuple[int, ...]], cut: Form) -> None:
    siblings = len(sizes[1])
    ranks = [tuple(2 + place for place in range(siblings)), tuple(5 * (place % 2) for place in range(siblings))]
    spans = [(0, 1, 0), (1, 2, 1)] if siblings > 1 else [(0, 1, 0)]
    compare(ranks if siblings > 1 else ranks[:1], spans, cut, torch.float32, sizes)


def test_more_splits_than_there_is_input() -> None:
    compare([(4, 4)], [(0, 1, 0)], form(1, splits=8), torch.float32)


def test_a_product_is_not_rounded_between_the_two_kernels() -> None:
    """z is handed on in float32: in float16 this sum would lose its small part."""
    kind = kind_of(16, (16,))
    laid = lay_out(kind, [(1,)], 16, torch.float16)
    ((a, b),) = [pair for pair in laid.pairs[0] if pair is not None]
    a[:], b[:] = 1, 1
    laid.rows[: laid.blocks[0].start + 2][laid.blocks[0].start :] = 1
    x = torch.zeros(1, 16, dtype=torch.float16)
    x[0, 0], x[0, 1] = 2048, 0.5
    for cut in (form(1, tile=16), form(16, tile=16)):
        items = items_for(laid, [(0, 1, 0)], cut)
        y = torch.full((1, 16), -2048, dtype=torch.float16)
        launch.shrink(x, laid.rows, laid.table, items.shrink, items.z, cut)
        launch.expand(items.z, laid.rows, laid.table, items.expand, y, kind.columns, cut)
        assert (y == 0.5).all()


@pytest.mark.parametrize("scattered", [False, True])
def test_a_layer_is_placed_as_its_reference_says(scattered: bool) -> None:
    source = torch.randn(600)
    # A [3, 20] and B [20, 3], of which the layer has 2 ranks; C [5, 40] and D [40, 5].
    pieces = torch.tensor(
        [
            [20, 3, 0, 8, 2, 10, 20, 1],
            [20, 3, 24, 3, 2, 60, 1, 2],
            [40, 5, 3, 8, 5, 110, 40, 1],
            [40, 5, 30, 5, 5, 320, 1, 5],
        ],
        dtype=torch.int32,
    )
    table = torch.randperm(60).to(torch.int32)
    found, right = torch.full((2, 60, 16), NAN)
    block = (4, scattered)
    launch.place(source, found, table, pieces, 15, block)
    reference.place(source, right, table, pieces, 15, block)
    torch.testing.assert_close(found, right, rtol=0, atol=0, equal_nan=True)
    assert found.isnan().any() and (found == 0).any()
