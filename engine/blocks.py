"""Paged KV memory: who holds which block.

A block is BLOCK_SIZE consecutive slots of the KV pool, a slot the keys and values of one token in every layer. Block 0
is never given out: its slots stay zero, so that padding can point at them.

    blank      nobody holds it and what is in it means nothing; given out first
    private    one holder, which writes to it
    published  in the prefix index: full, computed, and found by whoever has the same prefix; any number of holders
    idle       published and without holder: kept for the next one, until no block is blank

What keeps sharing safe: a block is published when it is full, and a holder writes only behind its computed tokens, so a
published block is never written again, whoever holds it. Two sequences that go on differently differ in a later block.
That is why nothing is ever copied on write.

A holder of a published block holds all those before it too, and gives them back last first. So in the order of least
recent use no idle block comes before one that goes on from it, and evicting the first never leaves a prefix in the
index that can no longer be reached.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence

from engine.errors import BlocksCorrupt
from engine.prefix import ROOT, PrefixIndex

BLOCK_SIZE = 16
NULL_BLOCK = ROOT


def blocks_for(token_count: int) -> int:
    """Blocks that hold this many tokens."""
    return -(-token_count // BLOCK_SIZE)


class BlockPool:
    """Gives out blocks 1 to `total` and takes them back.

    The most recently freed blank block is given out first, so that a lightly loaded engine touches little memory.

    Attributes:
        evictions: blocks that lost their prefix so far because no block was blank.
    """

    def __init__(self, total: int) -> None:
        self.total = total
        self.evictions = 0
        self._blank = list(range(total, 0, -1))
        self._holders = [0] * (total + 1)
        self._index = PrefixIndex()
        # Least recently used first.
        self._idle: OrderedDict[int, None] = OrderedDict()

    @property
    def free_count(self) -> int:
        """Blocks that can be taken, those that still hold a prefix included."""
        return len(self._blank) + len(self._idle)

    @property
    def published_count(self) -> int:
        """Blocks whose prefix can be found, held or not."""
        return len(self._index)

    def find(self, keys: Sequence[bytes]) -> list[int]:
        """Blocks of the longest known prefix of these keys; `hold` them before anything else is allocated."""
        return self._index.find(keys)

    def can_find(self, key: bytes) -> bool:
        return self._index.get(key) is not None

    def key_of(self, block: int) -> bytes | None:
        """The key a block was published under; None for one that is not published."""
        return self._index.key_of(block)

    def can_allocate(self, count: int, besides: Iterable[int] = ()) -> bool:
        """Whether `count` blocks can be taken after these published ones are held."""
        return count + sum(block in self._idle for block in besides) <= self.free_count

    def allocate(self, count: int) -> list[int]:
        """Takes `count` blocks; ask `can_allocate` first."""
        if not self.can_allocate(count):
            raise BlocksCorrupt(f"{count} blocks were taken where {self.free_count} are free")
        blocks = [self._blank.pop() if self._blank else self._evict() for _ in range(count)]
        for block in blocks:
            self._holders[block] = 1
        return blocks

    def hold(self, blocks: Sequence[int]) -> None:
        """Adds a holder to published blocks."""
        if any(block not in self._index for block in blocks):
            raise BlocksCorrupt(f"{list(blocks)} are not all published")
        for block in blocks:
            self._holders[block] += 1
            self._idle.pop(block, None)

    def publish(self, block: int, key: bytes, parent: int) -> int:
        """Lets the prefix in a full, computed block be found; returns the block its holder has from now on.

        That is another one where the same prefix was published already: equal blocks become one, and the holder's own
        is blank again. Without a published `parent` (the block before it, ROOT for the first) it stays private.
        """
        if parent != ROOT and parent not in self._index:
            return block
        there = self._index.get(key)
        if there is None:
            self._index.add(block, key, parent)
            return block
        self.hold([there])
        self.free([block])
        return there

    def forget(self, blocks: Iterable[int]) -> None:
        """Lets nobody find these blocks any more, nor what goes on from them. Who holds them keeps them."""
        for block in self._index.branch(blocks):
            self._index.remove(block)
            if block in self._idle:
                del self._idle[block]
                self._blank.append(block)

    def free(self, blocks: Sequence[int]) -> None:
        """Gives blocks of one holder back. All or none: one that is not held raises BlocksCorrupt, changing nothing."""
        if len(set(blocks)) != len(blocks) or any(not self._is_held(block) for block in blocks):
            raise BlocksCorrupt(f"{list(blocks)} are not all held")
        for block in reversed(blocks):
            self._holders[block] -= 1
            if self._holders[block]:
                continue
            if block in self._index:
                self._idle[block] = None
            else:
                self._blank.append(block)

    def check_integrity(self, holders: Iterable[Sequence[int]]) -> None:
        """Raises BlocksCorrupt unless every block is blank, idle, or held by exactly those it is counted for."""
        held: Counter[int] = Counter()
        for blocks in holders:
            if len(set(blocks)) != len(blocks):
                raise BlocksCorrupt("a holder has a block twice")
            held.update(blocks)
        for block in held:
            if not self._is_held(block):
                raise BlocksCorrupt(f"a holder has block {block}, which is free")
            if held[block] != self._holders[block]:
                raise BlocksCorrupt(f"block {block} has {held[block]} holders, not {self._holders[block]}")
        free = self._idle.keys() | self._blank
        if held.keys() & free or len(free) != self.free_count or len(held) + len(free) != self.total:
            raise BlocksCorrupt(f"{len(held)} held, {len(self._blank)} blank, {len(self._idle)} idle: not {self.total}")
        self._check_index()

    def _check_index(self) -> None:
        """Every idle block is published, every parent is published, in use with its children, and evicted after them."""
        if any(block not in self._index for block in self._idle) or any(block in self._index for block in self._blank):
            raise BlocksCorrupt("a free block is idle and not published, or published and blank")
        order = {block: place for place, block in enumerate(self._idle)}
        last = len(order)
        for block, parent in self._index.parents():
            if parent != ROOT and (parent not in self._index or order.get(parent, last) < order.get(block, last)):
                raise BlocksCorrupt(f"block {block} would outlive block {parent}, which comes before it")

    def _evict(self) -> int:
        block, _ = self._idle.popitem(last=False)
        self._index.remove(block)
        self.evictions += 1
        return block

    def _is_held(self, block: int) -> bool:
        return 0 < block <= self.total and self._holders[block] > 0
