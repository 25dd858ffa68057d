"""What the demo shows: answers growing line by line on a terminal, plain lines elsewhere, and tables."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Sequence

from loraplex.commands.output import one_line, table, width

_REDRAW_SECONDS = 0.05
_DEFAULT_COLUMNS = 120


class Screen:
    """One line for each of several answers that grow at the same time."""

    def __init__(self, names: Sequence[str]) -> None:
        self._live = sys.stdout.isatty()
        self._texts = dict.fromkeys(names, "")
        self._widest = max(map(width, names))
        self._drawn_at = 0.0
        if self._live:
            print("\n" * len(names), end="")
            self._draw()

    def grow(self, name: str, text: str) -> None:
        """Shows the answer so far."""
        self._texts[name] = text
        if self._live and time.monotonic() - self._drawn_at > _REDRAW_SECONDS:
            self._draw()

    def end(self, name: str, text: str, note: str) -> None:
        """Shows the whole answer."""
        self._texts[name] = text
        if self._live:
            self._draw()
        else:
            print(f"  {pad(name, self._widest)}  {note}", flush=True)

    def _draw(self) -> None:
        self._drawn_at = time.monotonic()
        room = columns() - self._widest - 5
        lines = [f"\x1b[K  {pad(name, self._widest)}  {tail(text, room)}\n" for name, text in self._texts.items()]
        print(f"\x1b[{len(lines)}A" + "".join(lines), end="", flush=True)


def columns() -> int:
    """Width of the terminal; a fixed one elsewhere."""
    return shutil.get_terminal_size((_DEFAULT_COLUMNS, 24)).columns if sys.stdout.isatty() else _DEFAULT_COLUMNS


def pad(text: str, to: int) -> str:
    """The text, filled up to a width."""
    return text + " " * (to - width(text))


def tail(text: str, room: int) -> str:
    """The end of a text in one line of at most that width."""
    text = one_line(text)
    if width(text) <= room:
        return text
    while width(text) > room - 1:
        text = text[1:]
    return "…" + text


def wrapped_table(headers: Sequence[str], rows: Sequence[Sequence[object]], wide: dict[str, float]) -> str:
    """A table that fits the screen.

    Args:
        wide: columns whose cells are wrapped, with their share of the room that the others leave.
    """
    narrow = [i for i, header in enumerate(headers) if header not in wide]
    taken = sum(max(width(headers[i]), *(width(str(row[i])) for row in rows)) for i in narrow)
    room = max(40, columns() - taken - 2 * (len(headers) - 1))
    rooms = {headers.index(header): int(room * share) for header, share in wide.items()}
    lines: list[list[object]] = []
    for row in rows:
        cells = [wrap(str(cell), rooms[i]) if i in rooms else [str(cell)] for i, cell in enumerate(row)]
        for number in range(max(map(len, cells))):
            lines.append([cell[number] if number < len(cell) else "" for cell in cells])
    return table(headers, lines)


def wrap(text: str, room: int) -> list[str]:
    """A text in lines of at most that width, broken between words where there are any."""
    lines = [""]
    for word in one_line(text).split(" "):
        if lines[-1] and width(lines[-1]) + 1 + width(word) <= room:
            lines[-1] += " " + word
            continue
        if lines[-1]:
            lines.append("")
        for character in word:
            if width(lines[-1]) + width(character) > room:
                lines.append("")
            lines[-1] += character
    return lines
