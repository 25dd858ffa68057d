"""What the next step runs.

Three rules about this file. It decides on integers and lists: no tensors, no clock, no text. It is the only one that
moves sequences between loading, waiting and running, and the only one that takes or frees blocks. And a question
(`has_work`, `can_…`) never changes anything.

A step holds, in this order, until `step_tokens` are spent:
1. the one new token of every running sequence in decode; `step_tokens` is at least `max_sequences`, so all fit;
2. the next chunk of every running sequence still in prefill, oldest first;
3. chunks of waiting sequences, oldest first, each admitted with blocks for all the tokens it has (not for those it may
   still produce), while one spare block per running sequence is left over.

A sequence whose adapter is not on the device is in `loading` and holds nothing; nobody waits behind it.

When a running sequence needs a block and none is free, the newest running sequence is preempted: its blocks are freed
and it waits, in its place by age, to be computed again. So the oldest always gets on, and as the pool holds at least
one sequence of full length, every sequence ends.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterator
from dataclasses import dataclass, field

from engine.blocks import BlockPool, blocks_for
from engine.sequence import Event, Sequence, State


@dataclass(frozen=True, slots=True)
class Row:
    """Part of a step: `count` tokens of a sequence, from token `start` on."""

    sequence: Sequence
    start: int
    count: int

    @property
    def yields_token(self) -> bool:
        """Whether the sequence has its next token after this row."""
        return self.start + self.count == len(self.sequence.tokens)

    @property
    def scored(self) -> range:
        """Places of this row whose logits are read for the log probabilities of the prompt."""
        unscored = self.sequence.unscored
        return range(max(self.start, unscored.start), min(self.start + self.count, unscored.stop))


@dataclass(frozen=True, slots=True)
class Step:
    """What runs next, and who lost their blocks for it."""

    rows: list[Row] = field(default_factory=list)
    preempted: list[Sequence] = field(default_factory=list)


class Scheduler:
    """Owns the sequences and their blocks."""

    def __init__(self, blocks: BlockPool, max_sequences: int, step_tokens: int) -> None:
        assert step_tokens >= max_sequences >= 1
        self.blocks = blocks
        self.loading: list[Sequence] = []
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self._max_sequences = max_sequences
        self._step_tokens = step_tokens

    @property
    def has_work(self) -> bool:
        """Whether a step would do something."""
        return bool(self.running or self.waiting)

    def __iter__(self) -> Iterator[Sequence]:
        yield from self.running
        yield from self.waiting
        yield from self.loading

    def add(self, sequence: Sequence) -> None:
        """Takes over a sequence that waits for its adapter, or that is WAITING already."""
        queue = self.loading if sequence.state is State.WAITING_ADAPTER else self.waiting
        insort(queue, sequence, key=_age)

    def adapter_ready(self, sequence: Sequence, generation: int) -> None:
        """Lets a sequence go on whose adapter rows are on the device, promised to it by their generation."""
        sequence.apply(Event.ADAPTER_READY)
        sequence.generation = generation
        self.loading.remove(sequence)
        insort(self.waiting, sequence, key=_age)

    def remove(self, sequence: Sequence) -> None:
        """Ends a sequence, whatever it was doing; its blocks are free at once."""
        queue = {
            State.WAITING_ADAPTER: self.loading,
            State.WAITING: self.waiting,
            State.RUNNING: self.running,
        }.get(sequence.state)
        sequence.apply(Event.ENDED)
        if queue is not None:
            queue.remove(sequence)
        self._release(sequence)

    def schedule(self) -> Step:
        """Decides the next step. Every row must then be `advance`d, or its sequence removed."""
        step = Step(preempted=self._make_room())
        budget = self._step_tokens
        for wanted in (_in_decode, _in_prefill):
            for sequence in filter(wanted, self.running):
                budget -= self._append_row(step, sequence, budget)
        while budget and self._can_admit():
            sequence = self.waiting.pop(0)
            sequence.apply(Event.ADMITTED)
            sequence.blocks = self.blocks.allocate(blocks_for(len(sequence.tokens)))
            insort(self.running, sequence, key=_age)
            budget -= self._append_row(step, sequence, budget)
        return step

    def advance(self, step: Step) -> None:
        """Notes that the tokens of a step have their keys and values now."""
        for row in step.rows:
            row.sequence.computed = row.start + row.count

    def check_integrity(self) -> None:
        """Raises BlocksCorrupt unless every block is free or held by exactly one running sequence."""
        self.blocks.check_integrity(sequence.blocks for sequence in self)

    def _can_admit(self) -> bool:
        if not self.waiting or len(self.running) >= self._max_sequences:
            return False
        return self.blocks.can_allocate(blocks_for(len(self.waiting[0].tokens)) + len(self.running))

    def _append_row(self, step: Step, sequence: Sequence, budget: int) -> int:
        count = min(sequence.pending, budget)
        if count:
            step.rows.append(Row(sequence, sequence.computed, count))
        return count

    def _make_room(self) -> list[Sequence]:
        """Gives every running sequence blocks for the tokens it has, oldest first; returns who had to yield."""
        preempted: list[Sequence] = []
        for sequence in list(self.running):
            if sequence.state is not State.RUNNING:
                continue
            missing = blocks_for(len(sequence.tokens)) - len(sequence.blocks)
            while not self.blocks.can_allocate(missing) and sequence.state is State.RUNNING:
                preempted.append(self._preempt(self.running[-1]))
            if sequence.state is State.RUNNING:
                sequence.blocks += self.blocks.allocate(missing)
        return preempted

    def _preempt(self, sequence: Sequence) -> Sequence:
        sequence.apply(Event.PREEMPTED)
        self.running.remove(sequence)
        self._release(sequence)
        sequence.computed = 0
        sequence.preemptions += 1
        insort(self.waiting, sequence, key=_age)
        return sequence

    def _release(self, sequence: Sequence) -> None:
        self.blocks.free(sequence.blocks)
        sequence.blocks = []


def _age(sequence: Sequence) -> int:
    return sequence.arrival


def _in_decode(sequence: Sequence) -> bool:
    return sequence.pending == 1


def _in_prefill(sequence: Sequence) -> bool:
    return sequence.pending > 1
