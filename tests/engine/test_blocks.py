from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.blocks import BLOCK_SIZE, NULL_BLOCK, BlockPool, blocks_for
from engine.errors import BlocksCorrupt


@given(st.integers(0, 10_000))
def test_blocks_for_holds_the_tokens_and_not_a_block_more(tokens: int) -> None:
    assert (blocks_for(tokens) - 1) * BLOCK_SIZE < tokens <= blocks_for(tokens) * BLOCK_SIZE or tokens == 0


@given(st.integers(1, 40), st.lists(st.tuples(st.booleans(), st.integers(0, 12)), max_size=60))
def test_blocks_are_never_lost_nor_given_twice(total: int, script: list[tuple[bool, int]]) -> None:
    pool = BlockPool(total)
    held: list[list[int]] = []
    for takes, count in script:
        if takes and pool.can_allocate(count):
            held.append(pool.allocate(count))
        elif held and not takes:
            pool.free(held.pop(count % len(held)))
        pool.check_integrity(held)
        assert pool.free_count == total - sum(map(len, held))
        assert NULL_BLOCK not in [block for blocks in held for block in blocks]


def test_taking_more_than_is_free_changes_nothing() -> None:
    pool = BlockPool(3)
    with pytest.raises(BlocksCorrupt):
        pool.allocate(4)
    assert pool.free_count == 3


@pytest.mark.parametrize("blocks", [[1, 1], [3], [0], [-1], [99], [1, 3]])
def test_freeing_what_is_not_held_changes_nothing(blocks: list[int]) -> None:
    pool = BlockPool(3)
    held = pool.allocate(2)
    with pytest.raises(BlocksCorrupt):
        pool.free(blocks)
    pool.check_integrity([held])


def test_integrity_names_two_holders_and_leaks() -> None:
    pool = BlockPool(4)
    held = pool.allocate(2)
    with pytest.raises(BlocksCorrupt, match="two holders"):
        pool.check_integrity([held, held])
    with pytest.raises(BlocksCorrupt, match="are not 4"):
        pool.check_integrity([])
    with pytest.raises(BlocksCorrupt, match="is free"):
        pool.check_integrity([[*held, 4]])
