"""Tables and lines of the demo."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from demo.screen import Screen, tail, wrap, wrapped_table
from loraplex.commands.output import one_line, width


@given(st.text(), st.integers(2, 40))
def test_a_wrapped_text_fits_and_loses_nothing(text: str, room: int) -> None:
    lines = wrap(text, room)
    assert all(width(line) <= room for line in lines)
    assert "".join(lines).replace(" ", "") == one_line(text).replace(" ", "")


@given(st.text(), st.integers(2, 40))
def test_a_tail_fits_and_is_the_end(text: str, room: int) -> None:
    shown = tail(text, room)
    assert width(shown) <= room
    assert one_line(text).endswith(shown.removeprefix("…"))


def test_long_cells_go_on_below() -> None:
    rows = [("a", "word " * 30, "1 ms"), ("b", "short", "22 ms")]
    lines = wrapped_table(("adapter", "answer", "first"), rows, {"answer": 0.5}).splitlines()
    assert len(lines) > 4 and lines[2].endswith("1 ms") and lines[-1].startswith("b")
    assert all(width(line) <= 120 for line in lines)


def test_without_a_terminal_only_whole_answers_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    screen = Screen(["a", "long"])
    screen.grow("a", "hal")
    screen.end("a", "half", "2 tokens")
    assert capsys.readouterr().out == "  a     2 tokens\n"
