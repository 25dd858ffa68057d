"""The work of one step for the LoRA kernels: items, counted in sizes that graphs can be captured for. PURE.

Each segment is cut into tiles of tokens. The expand has one item for each of them; the shrink has one for each tile and
each `rank_tile` of the adapter's ranks, those of a tile one after the other. So there are no programs for what does not
exist, whatever ranks sit beside each other; only up to the size of a bucket, which ends at once.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from engine.kernels.lora.form import Form, Table
from engine.rank_layout import Kind

SHRINK_ITEM = 8


@dataclass(frozen=True, slots=True)
class Block:
    """Where an adapter's block of one kind is: logical row n is row start + n, or where the table says so at that place.

    Attributes:
        ranks: by target of the kind.
    """

    start: int
    scattered: bool
    ranks: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Span:
    """Tokens `start` to `stop` of a step, and the block of their adapter in each kind; None where it has none."""

    start: int
    stop: int
    blocks: tuple[Block | None, ...]


@dataclass(frozen=True, slots=True)
class Bucket:
    """A size of step: whatever fits in it can run in the same graph.

    Attributes:
        tiles: items of the expand of each kind.
        shrinks: items of the shrink of each kind, for each of its targets.
        touched: by kind, whether any adapter has a block; kinds without are not launched.
    """

    form: Form
    tiles: int
    shrinks: int
    touched: tuple[bool, ...]

    def shrink_items(self, kind: Kind) -> int:
        """Items of the shrink of a kind."""
        return self.shrinks * len(kind.outs)


def bucket_of(spans: Sequence[Span], kinds: Sequence[Kind], table: Table) -> Bucket:
    """The smallest bucket for a step with at least one span."""
    form = table.choose(max(span.stop - span.start for span in spans), len(spans))
    tiles = shrinks = 0
    for number, kind in enumerate(kinds):
        held = [(_tiles(span, form), block) for span in spans if (block := span.blocks[number]) is not None]
        tiles = max(tiles, sum(count for count, _ in held))
        needed = sum(count * -(-sum(block.ranks) // form.rank_tile) for count, block in held)
        shrinks = max(shrinks, -(-needed // len(kind.outs)))
    touched = tuple(any(span.blocks[number] is not None for span in spans) for number in range(len(kinds)))
    return Bucket(form, rounded(tiles), rounded(shrinks), touched)


def fits(inner: Bucket, outer: Bucket) -> bool:
    """Whether a step of bucket `inner` may run as one of bucket `outer`."""
    no_more = inner.tiles <= outer.tiles and inner.shrinks <= outer.shrinks
    touched = all(ours or not theirs for ours, theirs in zip(outer.touched, inner.touched, strict=True))
    return inner.form == outer.form and no_more and touched


def rounded(count: int) -> int:
    """The next of 1, 2, 3, 4, 6, 8, 12, 16, …: at most a third of a bucket is empty."""
    power = 1 << max(0, count - 1).bit_length()
    return power * 3 // 4 if power > 2 and count <= power * 3 // 4 else power


def items_of(number: int, kind: Kind, spans: Iterable[Span], width: int, bucket: Bucket) -> tuple[list[int], list[int]]:
    """Items of shrink and expand of one kind, flat, filled up with zeros to the bucket's size; see kernels/lora."""
    form = bucket.form
    shrink: list[int] = []
    expand: list[int] = []
    for span in spans:
        block = span.blocks[number]
        if block is None:
            continue
        total = sum(block.ranks)
        scattered = int(block.scattered)
        parts: list[int] = []
        rank = 0
        for ranks, base in zip(block.ranks, kind.bases(block.ranks, width), strict=True):
            parts += (rank, ranks, block.start + base, 0)
            rank += ranks
        for token in range(span.start, span.stop, form.token_tile):
            tokens = min(form.token_tile, span.stop - token)
            expand += (token, tokens, len(shrink) // SHRINK_ITEM, scattered, *parts)
            for first in range(0, total, form.rank_tile):
                ranks = min(form.rank_tile, total - first)
                shrink += (token, tokens, first, ranks, total, block.start, scattered, 0)
    return _filled(shrink, bucket.shrink_items(kind) * SHRINK_ITEM), _filled(expand, bucket.tiles * expand_item(kind))


def expand_item(kind: Kind) -> int:
    """Numbers of an item of the expand."""
    return 4 + 4 * len(kind.outs)


def _tiles(span: Span, form: Form) -> int:
    return -(-(span.stop - span.start) // form.token_tile)


def _filled(items: list[int], size: int) -> list[int]:
    assert len(items) <= size
    return items + [0] * (size - len(items))
