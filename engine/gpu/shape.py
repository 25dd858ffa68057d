"""Shapes of steps, and where the numbers of a step go. PURE but for arrays.

A decode step is padded to one of a few numbers of rows and of splits, so that few graphs serve all of them. Any other
step has the shape it has.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from engine.batch import Batch
from engine.blocks import BLOCK_SIZE
from engine.gpu.sampling import FIELDS
from engine.gpu.upload import Ints, Layout, Tables
from engine.kernels.attention.launch import SPLIT, splits_for, tiles_of
from engine.sequence import UNKNOWN

# Padded rows cost attention and logits, but not weights: where there are many rows, buckets may be wide.
_STEPS = ((8, 1), (64, 8), (256, 32))
# Where the token is on the host: it comes with the upload.
HERE = -1


def rows_bucket(count: int) -> int:
    """How many rows a decode step of so many has; 1, 2, 4, 8, then in eights to 64, in thirty-twos to 256, and so on."""
    if count <= 8:
        return 1 << (count - 1).bit_length()
    width = next((width for most, width in _STEPS if count <= most), 64)
    return -(-count // width) * width


@dataclass(frozen=True)
class Shape:
    """Sizes of everything a step brings to the device.

    Attributes:
        tokens, singles, kept: tokens, rows of one token, and tokens whose logits are wanted.
        splits: of decode; singles' tables have room for as many.
        chunks, chunk_blocks, tiles: rows of several tokens, blocks of their tables, tiles of prefill.
    """

    tokens: int
    singles: int
    kept: int
    splits: int
    chunks: int = 0
    chunk_blocks: int = 0
    tiles: int = 0

    @property
    def single_blocks(self) -> int:
        return self.splits * SPLIT // BLOCK_SIZE

    @cached_property
    def layout(self) -> Layout:
        """The fields of an upload."""
        return Layout(
            (
                ("tokens", self.tokens),
                ("source", self.tokens),
                ("positions", self.tokens),
                ("slots", self.tokens),
                ("kept", self.kept),
                *((name, size * self.kept) for name, size in FIELDS),
                ("rows", self.singles),
                ("lengths", self.singles),
                ("chunks", self.chunks * 3),
                ("tiles", self.tiles * 2),
                ("tables", self.singles * self.single_blocks),
                ("chunk_tables", self.chunks * self.chunk_blocks),
            )
        )


def decode_shape(batch: Batch) -> Shape | None:
    """The padded shape of a step of nothing but decode; None for any other step."""
    rows = len(batch.singles)
    if batch.chunks or batch.scored or len(batch.sampled) != rows:
        return None
    bucket = rows_bucket(rows)
    return Shape(bucket, bucket, bucket, splits_for(max(single.length for single in batch.singles)))


def exact_shape(batch: Batch, m: int) -> Shape:
    """The shape of any step; prefill in tiles of m tokens."""
    return Shape(
        len(batch.tokens),
        len(batch.singles),
        len(batch.sampled_tokens) + len(batch.scored_tokens),
        splits_for(max((single.length for single in batch.singles), default=1)),
        len(batch.chunks),
        # A multiple of 16, or kernels would be compiled anew for strides that are none.
        -(-max((len(chunk.blocks) for chunk in batch.chunks), default=0) // 16) * 16,
        len(tiles_of([chunk.stop - chunk.start for chunk in batch.chunks], m)),
    )


def write(host: Ints, shape: Shape, batch: Batch, sources: Sequence[int], tables: Tables, m: int) -> None:
    """Fills an upload, but for the fields of sampling.

    Args:
        sources: [tokens of the batch] which of the tokens of the step before each is, or HERE.
    """
    places = shape.layout.places

    def put(name: str, numbers: Sequence[int], rest: int) -> None:
        field = host[places[name]]
        field[: len(numbers)] = numbers
        field[len(numbers) :] = rest

    put("tokens", [max(token, 0) for token in batch.tokens] if UNKNOWN in batch.tokens else batch.tokens, 0)
    put("source", sources, HERE)
    put("positions", batch.positions, 0)
    put("slots", batch.slots, -1)
    put("kept", batch.sampled_tokens + batch.scored_tokens, 0)
    rows = [single.index for single in batch.singles]
    # Padded rows of a decode step stand behind the others.
    put("rows", [*rows, *range(len(rows), shape.singles)], 0)
    put("lengths", [single.length for single in batch.singles], 0)
    put("chunks", [number for chunk in batch.chunks for number in (chunk.start, chunk.stop, chunk.context)], 0)
    counts = [chunk.stop - chunk.start for chunk in batch.chunks]
    put("tiles", [number for tile in tiles_of(counts, m) for number in tile], -1)
    owners = [(single.owner, single.blocks) for single in batch.singles]
    field = host[places["tables"]].reshape(shape.singles, shape.single_blocks)
    for row, blocks in zip(field, tables.rows(owners), strict=False):
        row[: len(blocks)] = blocks
    field = host[places["chunk_tables"]].reshape(shape.chunks, shape.chunk_blocks)
    for row, chunk in zip(field, batch.chunks, strict=True):
        row[: len(chunk.blocks)] = chunk.blocks
