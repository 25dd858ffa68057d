"""Rows are given out completely, never twice, and never silently to somebody else."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.errors import RowsCorrupt, RowsFull, StaleRows
from engine.rank_rows import RowPool, Rows, RowTable

TOTAL = 40
# Rows to take, or, where negative, which of the allotments to give back.
courses = st.lists(st.integers(-6, 25), max_size=60)


@settings(max_examples=250, deadline=None)
@given(courses)
def test_as_many_rows_as_are_free_are_given_and_nobody_shares_one(course: list[int]) -> None:
    pool = RowPool(TOTAL)
    held: list[Rows] = []
    for change in course:
        if change > 0:
            free = TOTAL - sum(rows.count for rows in held)
            if change <= free:
                held.append(pool.allot(change))
                assert held[-1].count == change == len(held[-1].listed())
            else:
                with pytest.raises(RowsFull) as caught:
                    pool.allot(change)
                assert (caught.value.needed, caught.value.free, caught.value.total) == (change, free, TOTAL)
        elif held:
            pool.release(held.pop(change % len(held)))
        pool.check_integrity()
        taken = [row for rows in held for row in rows.listed()]
        assert len(set(taken)) == len(taken) == TOTAL - pool.free_count
        for rows in held:
            pool.check(rows, "digest")


@settings(max_examples=200, deadline=None)
@given(courses, st.integers(1, TOTAL))
def test_rows_are_side_by_side_where_such_are_free(course: list[int], wanted: int) -> None:
    pool = RowPool(TOTAL)
    held: list[Rows] = []
    for change in course:
        if 0 < change <= pool.free_count:
            held.append(pool.allot(change))
        elif change <= 0 and held:
            pool.release(held.pop(change % len(held)))
    taken = {row for rows in held for row in rows.listed()}
    longest = max(map(len, "".join("x" if row in taken else "." for row in range(TOTAL)).split("x")))
    if wanted <= pool.free_count:
        rows = pool.allot(wanted)
        assert rows.is_scattered == (wanted > longest)


@settings(max_examples=60, deadline=None)
@given(courses)
def test_rows_that_were_given_back_are_stale_whoever_has_them_now(course: list[int]) -> None:
    pool = RowPool(TOTAL)
    old = pool.allot(7)
    pool.release(old)
    with pytest.raises(StaleRows) as caught:
        pool.check(old, "d" * 64)
    assert caught.value.generation == old.generation and caught.value.digest == "d" * 64
    held: list[Rows] = []
    for change in course:
        if 0 < change <= pool.free_count:
            held.append(pool.allot(change))
        elif held:
            pool.release(held.pop())
        with pytest.raises(StaleRows):
            pool.check(old, "d" * 64)
        with pytest.raises(RowsCorrupt):
            pool.release(old)
        pool.check_integrity()


def test_one_row_of_another_generation_is_enough() -> None:
    pool = RowPool(TOTAL)
    rows = pool.allot(9)
    pool._generations[8] += 1
    with pytest.raises(StaleRows):
        pool.check(rows, "digest")
    with pytest.raises(RowsCorrupt):
        pool.release(rows)
    with pytest.raises(RowsCorrupt):
        pool._free.append((0, 3))
        pool.check_integrity()


def test_a_pool_without_rows_gives_none() -> None:
    pool = RowPool(0)
    with pytest.raises(RowsFull):
        pool.allot(1)
    pool.check_integrity()


@settings(max_examples=200, deadline=None)
@given(st.lists(st.lists(st.integers(0, 9), max_size=5), max_size=20))
def test_every_list_a_step_wants_is_where_the_table_says(steps: list[list[int]]) -> None:
    pool = RowPool(TOTAL)
    adapters = [pool.allot(1 + number % 5) for number in range(10)]
    lists = RowTable(TOTAL)
    table = [-1] * TOTAL
    for step in steps:
        wanted = [adapters[number] for number in step]
        for place, rows in lists.place(wanted):
            table[place : place + rows.count] = rows.listed()
        assert len(table) == TOTAL
        for rows in wanted:
            start = lists.start_of(rows)
            assert table[start : start + rows.count] == rows.listed()


def test_a_list_that_is_in_its_place_is_not_written_again() -> None:
    pool, lists = RowPool(TOTAL), RowTable(TOTAL)
    rows = pool.allot(5)
    assert lists.place([rows, rows]) == [(0, rows)]
    assert lists.place([rows]) == []
