"""Which block holds which prefix, so that nobody computes it again.

Three rules about this file. A key is a chain of hashes that starts at the adapter's digest, so it stands for the adapter
and for every token up to the end of its block: two adapters, or two versions of one, never meet. The blocks in the
index are trees: the block before each of them in a sequence is in the index too, and nothing is taken out before what
goes on from it. And it knows no holders: which blocks are in use, and which may go, is the pool's account.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import sha256

from engine.errors import BlocksCorrupt

# Stands for the block before the first one of a sequence.
ROOT = 0


def root_key(adapter: str) -> bytes:
    """Where the chain of an adapter's digest starts; the base is the empty digest."""
    return sha256(adapter.encode()).digest()


def next_key(parent: bytes, tokens: Sequence[int]) -> bytes:
    """Key of the block of these tokens that comes after the one of key `parent`."""
    return sha256(parent + array("I", tokens).tobytes()).digest()


@dataclass(frozen=True, slots=True)
class _Node:
    key: bytes
    parent: int


class PrefixIndex:
    """Finds blocks by the keys of a prefix."""

    def __init__(self) -> None:
        self._blocks: dict[bytes, int] = {}
        # In the order they came in: a parent before its children.
        self._nodes: dict[int, _Node] = {}

    def __len__(self) -> int:
        return len(self._nodes)

    def __contains__(self, block: int) -> bool:
        return block in self._nodes

    def get(self, key: bytes) -> int | None:
        """The block of this key, if there is one."""
        return self._blocks.get(key)

    def key_of(self, block: int) -> bytes | None:
        """The key this block is found by; None for one that is not in the index."""
        node = self._nodes.get(block)
        return None if node is None else node.key

    def find(self, keys: Iterable[bytes]) -> list[int]:
        """Blocks of the longest run of these keys, from the first on, that are there."""
        found: list[int] = []
        for key in keys:
            block = self._blocks.get(key)
            if block is None:
                break
            found.append(block)
        return found

    def add(self, block: int, key: bytes, parent: int) -> None:
        """Lets a block be found; its parent must be in the index, and neither it nor its key may be."""
        if block in self._nodes or key in self._blocks or (parent != ROOT and parent not in self._nodes):
            raise BlocksCorrupt(f"block {block} cannot enter the prefix index after block {parent}")
        self._blocks[key] = block
        self._nodes[block] = _Node(key, parent)

    def remove(self, block: int) -> None:
        """Takes out a block from which nothing goes on; the caller sees to that."""
        del self._blocks[self._nodes.pop(block).key]

    def branch(self, blocks: Iterable[int]) -> list[int]:
        """Those of these blocks that are in the index and all that goes on from them, children before parents."""
        wanted = set(blocks)
        branch: list[int] = []
        for block, node in self._nodes.items():
            if block in wanted or node.parent in wanted:
                wanted.add(block)
                branch.append(block)
        return branch[::-1]

    def parents(self) -> Iterable[tuple[int, int]]:
        """Every block with the one before it, or ROOT."""
        return ((block, node.parent) for block, node in self._nodes.items())
