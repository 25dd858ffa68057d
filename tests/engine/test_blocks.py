"""Blocks and the prefix index, compared with a model that knows what every block should hold."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.blocks import BLOCK_SIZE, NULL_BLOCK, BlockPool, blocks_for
from engine.errors import BlocksCorrupt
from engine.prefix import ROOT, next_key, root_key

Prefix = tuple[str, tuple[int, ...]]


def keys_of(adapter: str, contents: list[int]) -> list[bytes]:
    """Keys of a prefix; a block of equal tokens stands for its token."""
    keys = [root_key(adapter)]
    for token in contents:
        keys.append(next_key(keys[-1], [token] * BLOCK_SIZE))
    return keys[1:]


def published(pool: BlockPool, adapter: str, contents: list[int]) -> list[int]:
    """Blocks of a holder that computed all of a prefix."""
    blocks = pool.allocate(len(contents))
    for place, key in enumerate(keys_of(adapter, contents)):
        blocks[place] = pool.publish(blocks[place], key, blocks[place - 1] if place else ROOT)
    return blocks


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


@dataclass
class Naive:
    """The prefix cache as it is meant, without blocks: prefixes in use, and prefixes that are kept, oldest first."""

    total: int
    used: Counter[Prefix] = field(default_factory=Counter)
    private: int = 0
    kept: list[Prefix] = field(default_factory=list)
    evictions: int = 0

    @property
    def free(self) -> int:
        return self.total - self.private - len(+self.used)

    def hits(self, prefixes: list[Prefix]) -> int:
        known = [prefix in self.kept or self.used[prefix] > 0 for prefix in prefixes]
        return [*known, False].index(False)

    def take(self, prefixes: list[Prefix], tail: int) -> None:
        hits = self.hits(prefixes)
        self.kept = [prefix for prefix in self.kept if prefix not in prefixes[:hits]]
        self.used.update(prefixes[:hits])
        fresh = len(prefixes) - hits + tail
        blank = self.free - len(self.kept)
        gone = max(0, fresh - blank)
        self.evictions += gone
        self.kept = self.kept[gone:]
        self.used.update(prefixes[hits:])
        self.private += tail

    def give_back(self, prefixes: list[Prefix], tail: int) -> None:
        self.private -= tail
        for prefix in reversed(prefixes):
            self.used[prefix] -= 1
            if not self.used[prefix]:
                self.kept.append(prefix)


takes = st.tuples(
    st.just("take"), st.sampled_from(["", "a", "b"]), st.lists(st.integers(0, 1), max_size=6), st.integers(0, 2)
)
gives = st.tuples(st.just("give"), st.integers(0, 100))


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 24), st.lists(st.one_of(takes, gives), max_size=60))
def test_hits_evictions_and_free_blocks_are_those_of_a_naive_model(
    total: int, script: list[tuple[str, str, list[int], int] | tuple[str, int]]
) -> None:
    pool, model = BlockPool(total), Naive(total)
    holders: list[tuple[list[int], list[Prefix], int]] = []
    holds: dict[int, Prefix] = {}
    for action in script:
        if len(action) == 4:
            _, adapter, contents, tail = action
            prefixes = [(adapter, tuple(contents[: end + 1])) for end in range(len(contents))]
            keys = keys_of(adapter, contents)
            found = pool.find(keys)
            # Then what is found is what a naive cache has, and it holds the prefix that was asked for
            assert len(found) == model.hits(prefixes)
            assert [holds[block] for block in found] == prefixes[: len(found)]
            fresh = len(prefixes) - len(found) + tail
            room = fresh <= model.free - sum(prefix in model.kept for prefix in prefixes[: len(found)])
            assert pool.can_allocate(fresh, besides=found) == room
            if not room:
                continue
            pool.hold(found)
            blocks = found + pool.allocate(fresh)
            for place in range(len(found), len(prefixes)):
                parent = blocks[place - 1] if place else ROOT
                assert pool.publish(blocks[place], keys[place], parent) == blocks[place]
                holds[blocks[place]] = prefixes[place]
            model.take(prefixes, tail)
            holders.append((blocks, prefixes, tail))
        elif holders:
            blocks, prefixes, tail = holders.pop(action[1] % len(holders))
            pool.free(blocks)
            model.give_back(prefixes, tail)
        pool.check_integrity(blocks for blocks, _, _ in holders)
        assert (pool.free_count, pool.evictions) == (model.free, model.evictions)
        assert pool.published_count == len(+model.used) + len(model.kept)


def test_what_is_held_is_never_evicted_and_the_rest_goes_least_recently_used_and_last_block_first() -> None:
    pool = BlockPool(6)
    old, new, held = (published(pool, "", [number, number]) for number in (1, 2, 3))
    pool.free(old)
    pool.free(new)
    left = []
    while pool.can_allocate(1):
        pool.allocate(1)
        left.append([len(pool.find(keys_of("", [number, number]))) for number in (1, 2, 3)])
    assert left == [[1, 2, 2], [0, 2, 2], [0, 1, 2], [0, 0, 2]]
    assert pool.find(keys_of("", [3, 3])) == held


def test_a_prefix_found_again_is_kept_longer() -> None:
    pool = BlockPool(3)
    for number in (1, 2, 3):
        pool.free(published(pool, "", [number]))
    again = pool.find(keys_of("", [1]))
    pool.hold(again)
    pool.free(again)
    pool.allocate(2)
    assert [len(pool.find(keys_of("", [number]))) for number in (1, 2, 3)] == [1, 0, 0]


def test_of_two_blocks_with_the_same_prefix_one_is_given_back() -> None:
    pool = BlockPool(6)
    first, second = published(pool, "a", [1, 2]), published(pool, "a", [1, 2])
    assert first == second and pool.free_count == 4
    pool.check_integrity([first, second])
    pool.free(first)
    pool.check_integrity([second])
    assert published(pool, "b", [1, 2]) != second


def test_a_forgotten_prefix_is_found_no_more_and_its_holders_keep_their_blocks() -> None:
    # Given a prefix that two hold, and one that went on from it and is idle
    pool = BlockPool(8)
    first, second = published(pool, "", [1, 2]), published(pool, "", [1, 2])
    pool.free(published(pool, "", [1, 2, 3]))
    pool.free(published(pool, "", [4]))
    # When it is forgotten
    pool.forget(first)
    # Then nothing of it is found, another prefix is, and what goes on from it stays private
    assert pool.find(keys_of("", [1, 2, 3])) == [] and len(pool.find(keys_of("", [4]))) == 1
    assert pool.free_count == 6
    pool.check_integrity([first, second])
    mine = pool.allocate(1)
    assert pool.publish(mine[0], keys_of("", [1, 2, 3])[2], second[1]) == mine[0]
    assert pool.key_of(mine[0]) is None
    # And whoever computes it anew shares nothing with them
    third = published(pool, "", [1, 2])
    assert not set(third) & set(first)
    for holder in (first, [*second, *mine], third):
        pool.free(holder)
    pool.check_integrity([])
    assert pool.free_count == 8 and pool.find(keys_of("", [1, 2])) == third


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


def test_a_private_block_has_no_second_holder() -> None:
    pool = BlockPool(3)
    held = pool.allocate(2)
    with pytest.raises(BlocksCorrupt):
        pool.hold(held)
    pool.check_integrity([held])


@pytest.mark.parametrize("parent", [2, 3])
def test_a_block_after_one_that_cannot_be_found_stays_private(parent: int) -> None:
    pool = BlockPool(3)
    held = pool.allocate(2)
    assert pool.publish(held[1], keys_of("", [1, 2])[1], parent) == held[1]
    assert pool.published_count == 0


def test_integrity_names_wrong_holders_and_leaks() -> None:
    pool = BlockPool(4)
    held = pool.allocate(2)
    with pytest.raises(BlocksCorrupt, match="has 2 holders, not 1"):
        pool.check_integrity([held, held])
    with pytest.raises(BlocksCorrupt, match="twice"):
        pool.check_integrity([held * 2])
    with pytest.raises(BlocksCorrupt, match="not 4"):
        pool.check_integrity([])
    for free in (4, 5, -1, 0):
        with pytest.raises(BlocksCorrupt, match="is free"):
            pool.check_integrity([[*held, free]])
