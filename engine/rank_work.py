"""The work of one step for the LoRA kernels: items, counted in sizes that graphs can be captured for. PURE but for arrays.

Each segment is cut into tiles of tokens. The expand has one item for each of them; the shrink has one for each tile and
each `rank_tile` of the adapter's ranks, those of a tile one after the other. So there are no programs for what does not
exist, whatever ranks sit beside each other; only up to the size of a bucket, which ends at once.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import numpy.typing as npt

from engine.kernels.lora.form import Form, Table
from engine.rank_layout import Kind

SHRINK_ITEM = 8

Ints = npt.NDArray[np.int32]


class Block:
    """Where an adapter's block of one kind is: logical row n is row start + n, or where the table says so at that place.

    Attributes:
        ranks: by target of the kind.
        expand: int32 [4 + 4 · targets], its item of the expand without the tokens.
    """

    def __init__(self, kind: Kind, width: int, start: int, scattered: bool, ranks: Sequence[int]) -> None:
        self.start, self.scattered, self.ranks = start, scattered, tuple(ranks)
        self.total = sum(ranks)
        parts = [0, 0, 0, int(scattered)]
        first = 0
        for rank, base in zip(ranks, kind.bases(ranks, width), strict=True):
            parts += (first, rank, start + base, 0)
            first += rank
        self.expand: Ints = np.array(parts, dtype=np.int32)
        self._shrinks: dict[int, Ints] = {}

    def shrink(self, rank_tile: int) -> Ints:
        """Int32 [items, 8], its items of the shrink without the tokens."""
        if rank_tile not in self._shrinks:
            firsts = range(0, self.total, rank_tile)
            items = [
                (0, 0, first, min(rank_tile, self.total - first), self.total, self.start, int(self.scattered), 0)
                for first in firsts
            ]
            self._shrinks[rank_tile] = np.array(items, dtype=np.int32).reshape(-1, SHRINK_ITEM)
        return self._shrinks[rank_tile]


@dataclass(frozen=True, slots=True)
class Span:
    """Tokens `start` to `stop` of a step, and the block of their adapter in each kind; None where it has none."""

    start: int
    stop: int
    blocks: Sequence[Block | None]


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


def bucket_of(tokens: Sequence[int], totals: Sequence[Sequence[int]], kinds: Sequence[Kind], table: Table) -> Bucket:
    """The smallest bucket for a step with at least one segment.

    Args:
        tokens: of each segment.
        totals: for each segment, by kind, the ranks of its adapter over all targets.
    """
    form = table.choose(max(tokens), len(tokens))
    tiles = [-(-count // form.token_tile) for count in tokens]
    most = shrinks = 0
    touched = []
    for number, kind in enumerate(kinds):
        held = [(count, total) for count, its in zip(tiles, totals, strict=True) if count and (total := its[number])]
        touched.append(bool(held))
        most = max(most, sum(count for count, _ in held))
        needed = sum(count * -(-total // form.rank_tile) for count, total in held)
        shrinks = max(shrinks, -(-needed // len(kind.outs)))
    return Bucket(form, rounded(most), rounded(shrinks), tuple(touched))


def fits(inner: Bucket, outer: Bucket) -> bool:
    """Whether a step of bucket `inner` may run as one of bucket `outer`."""
    no_more = inner.tiles <= outer.tiles and inner.shrinks <= outer.shrinks
    touched = all(ours or not theirs for ours, theirs in zip(outer.touched, inner.touched, strict=True))
    return inner.form == outer.form and no_more and touched


def rounded(count: int) -> int:
    """The next of 1, 2, 3, 4, 6, 8, 12, 16, …: at most a third of a bucket is empty."""
    power = 1 << max(0, count - 1).bit_length()
    return power * 3 // 4 if power > 2 and count <= power * 3 // 4 else power


def items_of(number: int, kind: Kind, spans: Iterable[Span], bucket: Bucket) -> tuple[Ints, Ints]:
    """Items of shrink and expand of one kind, filled up with zeros to the bucket's size; see kernels/lora.

    Returns int32 [bucket.shrink_items(kind), 8] and [bucket.tiles, 4 + 4 · targets].
    """
    form = bucket.form
    held = [(span, block) for span in spans if (block := span.blocks[number]) is not None and span.stop > span.start]
    shrink = np.zeros((bucket.shrink_items(kind), SHRINK_ITEM), dtype=np.int32)
    expand = np.zeros((bucket.tiles, expand_item(kind)), dtype=np.int32)
    if not held:
        return shrink, expand
    starts = [range(span.start, span.stop, form.token_tile) for span, _ in held]
    counts = [len(its) for its in starts]
    tokens = np.fromiter(chain.from_iterable(starts), np.int32, sum(counts))
    left = np.repeat(np.array([span.stop for span, _ in held], dtype=np.int32), counts) - tokens
    parts = [block.shrink(form.rank_tile) for _, block in held]
    lengths = np.repeat(np.array([len(part) for part in parts], dtype=np.int32), counts)
    ends = np.cumsum(lengths, dtype=np.int32)

    mine = expand[: len(tokens)]
    mine[:] = np.repeat(np.stack([block.expand for _, block in held]), counts, axis=0)
    mine[:, 0], mine[:, 1], mine[:, 2] = tokens, np.minimum(left, form.token_tile), ends - lengths
    every = shrink[: int(ends[-1])]
    every[:] = np.concatenate([part for part, count in zip(parts, counts, strict=True) for _ in range(count)])
    every[:, :2] = np.repeat(mine[:, :2], lengths, axis=0)
    return shrink, expand


def expand_item(kind: Kind) -> int:
    """Numbers of an item of the expand."""
    return 4 + 4 * len(kind.outs)
