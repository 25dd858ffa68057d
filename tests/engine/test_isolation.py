from __future__ import annotations

from collections.abc import Callable

from hypothesis import given
from hypothesis import strategies as st

from engine.errors import StaleRows
from engine.isolation import judge
from engine.scheduler import Row
from engine.sequence import Sequence


def rows(count: int, adapters: int = 3) -> list[Row]:
    return [
        Row(Sequence(i, f"a{i % adapters}", [1], 1, generation=10 + i % adapters), i, 1 + i % 4) for i in range(count)
    ]


def play(all_rows: list[Row], run: Callable[[list[Row]], None]) -> tuple[list[Row], list[Row], int]:
    """What the loop does: rows that were computed, rows that were ended, and how many passes that took."""
    attempts, done, ended, passes = [all_rows], list[Row](), list[Row](), 0
    while attempts:
        group = attempts.pop()
        passes += 1
        try:
            run(group)
            done += group
        except (RuntimeError, StaleRows) as error:
            verdict = judge(group, error)
            ended += verdict.culprits
            attempts += verdict.retries
    assert len(done) + len(ended) == len(all_rows) and {*done, *ended} == set(all_rows)
    assert passes <= 2 * len(all_rows) - 1
    return done, ended, passes


@given(st.integers(1, 70), st.data())
def test_exactly_the_rows_that_fail_are_ended(count: int, data: st.DataObject) -> None:
    culprits = data.draw(st.sets(st.integers(0, count - 1)))

    def run(group: list[Row]) -> None:
        if any(row.start in culprits for row in group):
            raise RuntimeError

    _, ended, passes = play(rows(count), run)
    assert {row.start for row in ended} == culprits
    if len(culprits) == 1:
        assert passes <= 1 + 2 * (count - 1).bit_length()


@given(st.integers(1, 70), st.integers(4, 40))
def test_rows_that_are_only_too_many_together_are_all_computed(count: int, most: int) -> None:
    def run(group: list[Row]) -> None:
        if sum(row.count for row in group) > most:
            raise RuntimeError("out of memory")

    assert not play(rows(count), run)[1]


@given(st.integers(2, 70), st.data())
def test_a_failure_that_does_not_come_again_ends_nobody(count: int, data: st.DataObject) -> None:
    failing = iter([True])

    def run(group: list[Row]) -> None:
        if next(failing, False):
            raise RuntimeError

    assert not play(rows(count), run)[1]


@given(st.integers(1, 300))
def test_a_device_that_fails_at_everything_ends_the_step(count: int) -> None:
    def run(group: list[Row]) -> None:
        raise RuntimeError

    done, _, passes = play(rows(count), run)
    assert not done and passes == 2 * count - 1


@given(st.integers(1, 70), st.sets(st.integers(0, 2)))
def test_an_error_that_names_an_adapter_ends_its_rows_at_once(count: int, gone: set[int]) -> None:
    def run(group: list[Row]) -> None:
        for row in group:
            if row.start % 3 in gone:
                raise StaleRows(row.sequence.adapter, row.sequence.generation, None)

    _, ended, passes = play(rows(count), run)
    assert {row.start for row in ended} == {i for i in range(count) if i % 3 in gone}
    assert passes <= 1 + len(gone)


def test_an_error_that_names_somebody_else_blames_nobody_by_name() -> None:
    group = rows(4)
    for error in (StaleRows("other", 10, 11), StaleRows("a0", 99, 10)):
        verdict = judge(group, error)
        assert not verdict.culprits and verdict.retries == [group[:2], group[2:]]
