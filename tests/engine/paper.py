"""The scheduler without a model: the KV pool is a dictionary that says what each slot holds.

A paper token is a function of what is read from the pool, so whoever reads a wrong slot answers wrongly.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from engine.batch import build_batch
from engine.blocks import BLOCK_SIZE, BlockPool
from engine.scheduler import Row, Scheduler
from engine.sequence import Sequence, State

STEP_TOKENS = 24


@dataclass
class Paper:
    """Runs steps without a model and checks each of them.

    Attributes:
        slots: what was written where: adapter and all tokens up to that place.
        computed: tokens computed so far.
        cached: tokens found so far.
    """

    scheduler: Scheduler
    slots: dict[int, tuple[str, tuple[int, ...]]] = field(default_factory=dict)
    computed: int = 0
    cached: int = 0

    def step(self) -> list[Sequence]:
        """Runs one step; returns who got a token."""
        step = self.scheduler.schedule()
        self.scheduler.check_integrity()
        assert sum(row.count for row in step.rows) <= STEP_TOKENS
        assert step.rows or not self.scheduler.has_work
        written = build_batch(step.rows).slots
        assert len(set(written)) == len(written)
        for row in step.rows:
            self._check_context(row)
        for row in step.rows:
            self._write(row)
        self.computed += len(written)
        self.cached += step.cached_tokens
        self.scheduler.advance(step)
        self.scheduler.check_integrity()
        yielded = [row.sequence for row in step.rows if row.yields_token]
        for sequence in yielded:
            read = [self.slots[slot] for slot in slots_of(sequence, len(sequence.tokens))]
            sequence.tokens.append(paper_token(*read[-1]))
        return yielded

    def run(self, wanted: int) -> int:
        """Runs until every sequence has `wanted` tokens and is removed; returns the steps it took."""
        for count in range(10_000):
            if not self.scheduler.has_work:
                return count
            for sequence in self.step():
                if sequence.output_length >= wanted:
                    self.scheduler.remove(sequence)
        raise AssertionError("it never ends")

    def _check_context(self, row: Row) -> None:
        tokens = row.sequence.tokens
        for place, slot in enumerate(slots_of(row.sequence, row.start)):
            assert self.slots[slot] == (row.sequence.adapter, tuple(tokens[: place + 1]))

    def _write(self, row: Row) -> None:
        places = slots_of(row.sequence, row.start + row.count)[row.start :]
        for place, slot in enumerate(places, row.start):
            self.slots[slot] = (row.sequence.adapter, tuple(row.sequence.tokens[: place + 1]))


def slots_of(sequence: Sequence, count: int) -> list[int]:
    return [sequence.blocks[place // BLOCK_SIZE] * BLOCK_SIZE + place % BLOCK_SIZE for place in range(count)]


def paper_token(adapter: str, tokens: tuple[int, ...]) -> int:
    """Few tokens, so that answers often begin the same."""
    return (sum(tokens[-3:]) * 7 + len(tokens) // 20 + len(adapter)) % 3


def alone(adapter: str, prompt: list[int], count: int) -> list[int]:
    tokens = list(prompt)
    while len(tokens) < len(prompt) + count:
        tokens.append(paper_token(adapter, tuple(tokens)))
    return tokens


def make(arrival: int, prompt: list[int], adapter: str = "", reuse: bool = True) -> Sequence:
    return Sequence(arrival, adapter, list(prompt), len(prompt), reuse_prefix=reuse, state=State.WAITING)


def paper(blocks: int = 64, max_sequences: int = 6, prefix_cache: bool = True) -> Paper:
    return Paper(Scheduler(BlockPool(blocks), max_sequences, STEP_TOKENS, prefix_cache=prefix_cache))
