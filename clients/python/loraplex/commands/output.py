"""What the subcommands share: one-line errors, tables, JSON."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import unicodedata
from collections.abc import Mapping, Sequence
from datetime import datetime
from enum import Enum
from typing import Any, NoReturn

from loraplex.client import Client
from loraplex.errors import LoraplexError, Unavailable

INTERRUPTED = 130
# Counts of the wire are int32.
MOST = 2**31 - 1
# What a shell reports for a program that SIGPIPE ended.
PIPE_CLOSED = 141


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {one_line(message)} (see {self.prog} --help)\n")


def at_least(least: int) -> Any:
    """Type of an argument: a whole number of at least `least`."""

    def number(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
        if not least <= value <= MOST:
            raise argparse.ArgumentTypeError(f"{value} is not between {least} and {MOST}")
        return value

    return number


def connect(options: argparse.Namespace) -> Client:
    """The client the common options ask for."""
    return Client(options.address, tenant=options.tenant, timeout=options.timeout)


def write(text: str) -> None:
    """To standard output, at once."""
    sys.stdout.write(text)
    sys.stdout.flush()


def say(text: str) -> None:
    """One line to standard error."""
    sys.stderr.write(one_line(text) + "\n")


def one_line(text: str) -> str:
    """The text without line breaks and control characters."""
    return " ".join("".join(c if c.isprintable() or c.isspace() else "?" for c in text).split())


def explain(error: LoraplexError, address: str) -> str:
    """An error with everything that helps: status, reason, field, when to retry."""
    if isinstance(error, Unavailable) and not error.reason:
        return f"loraplex: UNAVAILABLE: no server answers at {address}: {error.message}"
    notes = [("reason", error.reason), ("field", error.field)]
    if error.retry_delay is not None:
        notes.append(("retry after", f"{error.retry_delay:g} s"))
    shown = ", ".join(f"{name} {value}" for name, value in notes if value)
    return f"loraplex: {error.status.name}: {error.message}" + (f" ({shown})" if shown else "")


def table(headers: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Columns as wide as their widest cell; numbers to the right."""
    cells = [[str(cell) for cell in row] for row in rows]
    right = [bool(rows) and all(isinstance(row[i], int | float) for row in rows) for i in range(len(headers))]
    widths = [max([width(headers[i]), *(width(row[i]) for row in cells)]) for i in range(len(headers))]

    def line(row: Sequence[str]) -> str:
        padded = [
            " " * (widths[i] - width(cell)) + cell if right[i] else cell + " " * (widths[i] - width(cell))
            for i, cell in enumerate(row)
        ]
        return "  ".join(padded).rstrip() + "\n"

    return "".join([line(list(headers)), line(["-" * w for w in widths]), *map(line, cells)])


def width(text: str) -> int:
    """Columns a text takes on a terminal."""
    return sum(0 if unicodedata.combining(c) else 1 + (unicodedata.east_asian_width(c) in "WF") for c in text)


def as_json(value: object) -> str:
    """One line of JSON."""
    return json.dumps(_plain(value), ensure_ascii=False) + "\n"


def _plain(value: Any) -> Any:
    match value:
        case Enum():
            return value.name
        case datetime():
            return value.isoformat()
        case Mapping():
            return {key: _plain(item) for key, item in value.items()}
        case list() | tuple():
            return [_plain(item) for item in value]
    if dataclasses.is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    return value
