"""Paged KV memory: who holds which block.

A block is BLOCK_SIZE consecutive slots of the KV pool, a slot the keys and values of one token in every layer. Block 0
is never given out: its slots stay zero, so that padding can point at them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from engine.errors import BlocksCorrupt

BLOCK_SIZE = 16
NULL_BLOCK = 0


def blocks_for(token_count: int) -> int:
    """Blocks that hold this many tokens."""
    return -(-token_count // BLOCK_SIZE)


class BlockPool:
    """Gives out blocks 1 to `total` and takes them back.

    The most recently freed block is given out first, so that a lightly loaded engine touches little memory.
    """

    def __init__(self, total: int) -> None:
        self.total = total
        self._free = list(range(total, 0, -1))
        self._held = bytearray(total + 1)

    @property
    def free_count(self) -> int:
        return len(self._free)

    def can_allocate(self, count: int) -> bool:
        return count <= len(self._free)

    def allocate(self, count: int) -> list[int]:
        """Takes `count` blocks; ask `can_allocate` first."""
        if not self.can_allocate(count):
            raise BlocksCorrupt(f"{count} blocks were taken where {len(self._free)} are free")
        blocks = [self._free.pop() for _ in range(count)]
        for block in blocks:
            self._held[block] = 1
        return blocks

    def free(self, blocks: Sequence[int]) -> None:
        """Gives blocks back. All or none: a block that is not held raises BlocksCorrupt and changes nothing."""
        if len(set(blocks)) != len(blocks) or any(not self._is_held(block) for block in blocks):
            raise BlocksCorrupt(f"{list(blocks)} are not all held")
        for block in reversed(blocks):
            self._held[block] = 0
            self._free.append(block)

    def check_integrity(self, holders: Iterable[Sequence[int]]) -> None:
        """Raises BlocksCorrupt unless the holders hold exactly the blocks that are not free, each one once."""
        held = [block for blocks in holders for block in blocks]
        if len(set(held)) != len(held):
            raise BlocksCorrupt("a block has two holders")
        if any(not self._is_held(block) for block in held):
            raise BlocksCorrupt("a holder has a block that is free")
        if len(held) + len(self._free) != self.total:
            raise BlocksCorrupt(f"{len(held)} held and {len(self._free)} free are not {self.total}")

    def _is_held(self, block: int) -> bool:
        return 0 < block <= self.total and self._held[block] == 1
