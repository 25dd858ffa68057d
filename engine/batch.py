"""A step as index lists: one flat run of tokens, sorted so that each adapter is one segment.

    rows      base, base │ adapter A │ adapter B, adapter B          (rows of one adapter keep their order)
    tokens    t t        │ t         │ t t t t t t t                 (a decode row is one token, a prefill row a chunk)
    segments               A: 2..3     B: 3..10                      (base tokens belong to no segment)

Rows of one token attend together, each to all tokens of its sequence; longer rows attend one by one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from engine.blocks import BLOCK_SIZE
from engine.scheduler import Row


@dataclass(frozen=True, slots=True)
class Segment:
    """Tokens `start` to `stop` of a batch use one adapter's rows of one generation."""

    adapter: str
    generation: int
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Single:
    """A row of one token: where it is in the batch, its sequence's blocks, and how many tokens those hold with it.

    Attributes:
        owner: the sequence's place in the order of arrival, which no other ever has.
    """

    owner: int
    index: int
    blocks: list[int]
    length: int

    def slots(self, count: int) -> list[int]:
        """Where the keys and values of its first `count` tokens are."""
        return list(_slots(self.blocks, 0, count))


@dataclass(frozen=True, slots=True)
class Chunk:
    """A row of several tokens: `start` to `stop` in the batch, after `context` earlier tokens of its sequence."""

    start: int
    stop: int
    context: int
    blocks: list[int]


@dataclass(frozen=True, slots=True)
class Batch:
    """One step, ready to become tensors.

    Attributes:
        tokens: token ids, flat.
        positions: place of each token in its sequence.
        slots: where the keys and values of each token go in the KV pool.
        segments: runs of tokens that use an adapter.
        singles: rows that attend together.
        chunks: rows that attend one by one.
        sampled: rows that yield a token, in the order of `sampled_tokens`.
        sampled_tokens: index of the last token of each of those rows.
        scored: rows with prompt tokens whose logits are to be read as well.
        scored_tokens: index of each of those tokens, row by row.
    """

    tokens: list[int]
    positions: list[int]
    slots: list[int]
    segments: list[Segment]
    singles: list[Single]
    chunks: list[Chunk]
    sampled: list[Row]
    sampled_tokens: list[int]
    scored: list[Row]
    scored_tokens: list[int]


def build_batch(rows: list[Row]) -> Batch:
    """Lays out the rows of a step; every row needs blocks up to its last token."""
    batch = Batch([], [], [], [], [], [], [], [], [], [])
    for row in sorted(rows, key=lambda row: row.sequence.adapter):
        sequence, start, stop = row.sequence, row.start, row.start + row.count
        first = len(batch.tokens)
        batch.tokens.extend(sequence.tokens[start:stop])
        batch.positions.extend(range(start, stop))
        batch.slots.extend(_slots(sequence.blocks, start, stop))
        last = len(batch.tokens)
        if row.count == 1:
            batch.singles.append(Single(sequence.arrival, first, sequence.blocks, stop))
        else:
            batch.chunks.append(Chunk(first, last, start, sequence.blocks))
        if sequence.adapter:
            _extend_segment(batch.segments, Segment(sequence.adapter, sequence.generation, first, last))
        if row.yields_token:
            batch.sampled.append(row)
            batch.sampled_tokens.append(last - 1)
        if row.scored:
            batch.scored.append(row)
            batch.scored_tokens.extend(place - start + first for place in row.scored)
    return batch


def _slots(blocks: list[int], start: int, stop: int) -> Iterator[int]:
    for position in range(start, stop):
        yield blocks[position // BLOCK_SIZE] * BLOCK_SIZE + position % BLOCK_SIZE


def _extend_segment(segments: list[Segment], tail: Segment) -> None:
    if segments and (segments[-1].adapter, segments[-1].generation) == (tail.adapter, tail.generation):
        segments[-1] = Segment(tail.adapter, tail.generation, segments[-1].start, tail.stop)
    else:
        segments.append(tail)
