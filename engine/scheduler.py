"""What the next step runs.

Three rules about this file. It decides on integers and lists: no tensors, no clock, no text. It is the only one that
moves sequences between loading, waiting and running, and the only one that takes or frees blocks. And a question
(`has_work`, `can_…`) never changes anything.

Waiting sequences join oldest first, as long as there are places, and blocks for all the tokens they have (not for those
they may still produce) with one spare block per running sequence left over. A step of `step_tokens` then holds:
1. the one new token of every running sequence in decode; `step_tokens` is at least `max_sequences`, so all fit, and
   the longest of prompts costs a stream no more than to share its steps;
2. chunks of the sequences in prefill. The oldest is sure of half of what is left, or of what it needs; the others have
   the rest, those with the fewest tokens to go first; what they leave is the oldest's as well.
So a prompt is through after as many steps as half of that goes into its own tokens and those of older prompts, each
rounded up, whatever comes later; and into its own and those of shorter ones, whatever came earlier.
Prompts of urgent sequences have the chunks of a step to themselves, but never those of two steps in a row while others
want some: for the others that makes it twice as many steps, at most.

A sequence in prefill goes on from the longest prefix that is in the pool, whoever computed it, at admission as at every
step after; and it sits out a step that computes its next block for another, which, where half of the tokens fill a
block, costs it no more than one step for each such other. So many that come at once with the same prompt compute it
once. The last token of a sequence is always computed, for its logits.

A sequence whose adapter is not on the device is in `loading` and holds nothing; nobody waits behind it.

When a running sequence needs a block and none is free, the newest running sequence is preempted: its blocks are given
back and it waits, in its place by age, to be computed again, as far as its published blocks are gone by then. So the
oldest always gets on, and as the pool holds at least one sequence of full length, every sequence ends.
"""

from __future__ import annotations

from bisect import insort
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from engine.blocks import BLOCK_SIZE, BlockPool, blocks_for
from engine.errors import BlocksCorrupt
from engine.prefix import ROOT
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
    """What runs next.

    Attributes:
        preempted: who lost their blocks for it.
        cached_tokens: tokens that need not be computed because their keys and values were found.
        evictions: prefixes that were dropped for it, in blocks.
    """

    rows: list[Row] = field(default_factory=list)
    preempted: list[Sequence] = field(default_factory=list)
    cached_tokens: int = 0
    evictions: int = 0

    @property
    def is_urgent(self) -> bool:
        """Whether an urgent prompt is in it."""
        return any(_is_urgent(row.sequence) for row in self.rows)


class Scheduler:
    """Owns the sequences and their blocks; without `prefix_cache` no two sequences share one."""

    def __init__(self, blocks: BlockPool, max_sequences: int, step_tokens: int, *, prefix_cache: bool = True) -> None:
        assert step_tokens >= max_sequences >= 1
        self.blocks = blocks
        self.loading: list[Sequence] = []
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self._max_sequences = max_sequences
        self._step_tokens = step_tokens
        self._prefix_cache = prefix_cache
        self._cached_tokens = 0
        # Whether the latest step that ran had an urgent prompt in it.
        self._gave_way = False

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
        cached_tokens, evictions = self._cached_tokens, self.blocks.evictions
        preempted = self._make_room()
        self._admit()
        for sequence in filter(_in_prefill, self.running):
            self._skip_cached(sequence)
        rows = [Row(sequence, sequence.computed, 1) for sequence in filter(_in_decode, self.running)]
        rows += self._chunks(self._step_tokens - len(rows))
        return Step(rows, preempted, self._cached_tokens - cached_tokens, self.blocks.evictions - evictions)

    def advance(self, step: Step) -> None:
        """Notes that the tokens of a step have their keys and values now, and publishes the blocks they filled."""
        self._gave_way = step.is_urgent
        for row in step.rows:
            row.sequence.computed = row.start + row.count
            if self._prefix_cache:
                self._publish(row)

    def forget_prefix(self, sequence: Sequence) -> None:
        """Keeps others from going on from what a sequence computed or took over: its logits say it may be broken."""
        self.blocks.forget(sequence.blocks)

    def check_integrity(self) -> None:
        """Raises BlocksCorrupt unless all blocks are accounted for and no sequence can write to what another may read."""
        self.blocks.check_integrity(sequence.blocks for sequence in self)
        owners = Counter(block for sequence in self for block in sequence.blocks)
        for sequence in self:
            full = sequence.computed // BLOCK_SIZE
            if any(owners[block] > 1 or self.blocks.key_of(block) for block in sequence.blocks[full:]):
                raise BlocksCorrupt("a block that is still written to is shared")
            for block, key in zip(sequence.blocks, sequence.prefix_keys(full), strict=False):
                if self.blocks.key_of(block) not in (key, None):
                    raise BlocksCorrupt(f"block {block} holds another prefix than its sequence's")

    def _admit(self) -> None:
        while self.waiting and len(self.running) < self._max_sequences:
            sequence = self.waiting[0]
            if sequence.awaits_token:  # it was preempted while that was computed; it is known before the next step
                return
            cached = self._find_cached(sequence)
            missing = blocks_for(len(sequence.tokens)) - len(cached)
            if not self.blocks.can_allocate(missing + len(self.running), besides=cached):
                return
            del self.waiting[0]
            sequence.apply(Event.ADMITTED)
            self._take_over(sequence, cached)
            sequence.blocks += self.blocks.allocate(missing)
            insort(self.running, sequence, key=_age)

    def _find_cached(self, sequence: Sequence) -> list[int]:
        """Published blocks of the longest prefix of a sequence that leaves a token to compute."""
        if not (self._prefix_cache and sequence.reuse_prefix):
            return []
        return self.blocks.find(sequence.prefix_keys(_cacheable(sequence)))

    def _skip_cached(self, sequence: Sequence) -> None:
        """Lets a sequence go on behind what others have computed since."""
        key = self._next_key(sequence)
        if key is not None and self.blocks.can_find(key):
            self._take_over(sequence, self._find_cached(sequence))

    def _take_over(self, sequence: Sequence, cached: list[int]) -> None:
        """Puts published blocks in the place of the first ones of a sequence."""
        own = sequence.blocks[: len(cached)]
        self.blocks.hold(cached)
        self.blocks.free(own)
        sequence.blocks[: len(cached)] = cached
        skipped = len(cached) * BLOCK_SIZE - sequence.computed
        sequence.computed += skipped
        self._cached_tokens += skipped
        if not sequence.preemptions:
            sequence.cached_tokens += skipped

    def _next_key(self, sequence: Sequence) -> bytes | None:
        """Key of the block a sequence computes next; None where it must do so itself."""
        place = sequence.computed // BLOCK_SIZE
        if not (self._prefix_cache and sequence.reuse_prefix) or place >= _cacheable(sequence):
            return None
        return sequence.prefix_keys(place + 1)[place]

    def _chunks(self, budget: int) -> list[Row]:
        """Shares the tokens of a step that decode leaves among the sequences in prefill."""
        prefilling = list(filter(_in_prefill, self.running))
        if not prefilling:
            return []
        if not self._gave_way:
            prefilling = list(filter(_is_urgent, prefilling)) or prefilling
        oldest, *others = prefilling
        sure = min(oldest.pending, -(-budget // 2))
        budget -= sure
        rows: list[Row] = []
        computing = _keys_computed(oldest, sure)
        for sequence in sorted(others, key=_pending):
            count = min(sequence.pending, budget)
            if count and self._next_key(sequence) not in computing:
                rows.append(Row(sequence, sequence.computed, count))
                computing |= _keys_computed(sequence, count)
                budget -= count
        return [Row(oldest, oldest.computed, min(oldest.pending, sure + budget)), *rows]

    def _publish(self, row: Row) -> None:
        """Lets others find the blocks a row filled, or takes over theirs where they were first."""
        sequence = row.sequence
        first, full = row.start // BLOCK_SIZE, sequence.computed // BLOCK_SIZE
        for place, key in enumerate(sequence.prefix_keys(full)[first:], first):
            parent = sequence.blocks[place - 1] if place else ROOT
            sequence.blocks[place] = self.blocks.publish(sequence.blocks[place], key, parent)

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


def _pending(sequence: Sequence) -> int:
    return sequence.pending


def _in_decode(sequence: Sequence) -> bool:
    return sequence.pending == 1 and not sequence.is_closing


def _in_prefill(sequence: Sequence) -> bool:
    return sequence.pending > 1


def _is_urgent(sequence: Sequence) -> bool:
    """Whether other prompts wait for its own; it is not urgent any more with its first token."""
    return sequence.is_urgent and _in_prefill(sequence) and not sequence.output_length


def _cacheable(sequence: Sequence) -> int:
    """Blocks that may be taken over: full ones, without the last token."""
    return (len(sequence.tokens) - 1) // BLOCK_SIZE


def _keys_computed(sequence: Sequence, count: int) -> set[bytes]:
    """Keys of the full blocks that the next `count` tokens of a sequence belong to."""
    stop = min(blocks_for(sequence.computed + count), len(sequence.tokens) // BLOCK_SIZE)
    return set(sequence.prefix_keys(stop)[sequence.computed // BLOCK_SIZE : stop])
