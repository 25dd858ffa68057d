"""How the LoRA kernels cut their work up, and the measured table that says which cut for which step. PURE.

What is best depends on how many tokens an adapter has in a step, on how many adapters there are, and on the device; so
it is measured and looked up. `tables/default.json` holds estimates for a card of the H100 class; a measured table lies
beside it under the device's name, in lower case with dashes.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path

TABLES = Path(__file__).parent / "tables"
NO_LIMIT = 1 << 30


@dataclass(frozen=True, slots=True)
class Form:
    """One way to cut up a step. All numbers but the stages are powers of two.

    Attributes:
        token_tile: tokens of one program; 1 multiplies without matrix units (GEMV), 16 and more with them (GEMM).
        rank_tile: ranks of one program of the shrink, at least 16.
        k_tile: input features that a program of the shrink reads at a time.
        splits: planes of the shrink, each the sum over a part of the input features.
        column_tile: columns of one program of the expand.
    """

    token_tile: int
    rank_tile: int
    k_tile: int
    splits: int
    column_tile: int
    shrink_warps: int
    shrink_stages: int
    expand_warps: int
    expand_stages: int

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            power = value > 0 and value & (value - 1) == 0
            if value < 1 or not (power or field.name.endswith("stages")):
                raise ValueError(f"{field.name} is {value}, not a power of two")
        if self.token_tile != 1 and self.token_tile < 16:
            raise ValueError(f"token_tile is {self.token_tile}; matrix units take 16 and more")
        if min(self.rank_tile, self.k_tile, self.column_tile) < 16:
            raise ValueError("rank_tile, k_tile and column_tile are at least 16")


@dataclass(frozen=True, slots=True)
class Entry:
    """A form for steps in which no adapter has more tokens than `tokens`, and no more than `segments` take part."""

    tokens: int
    segments: int
    form: Form


@dataclass(frozen=True, slots=True)
class Table:
    """Forms in the order they are tried; the last one takes every step."""

    entries: tuple[Entry, ...]

    def __post_init__(self) -> None:
        if not self.entries or (self.entries[-1].tokens, self.entries[-1].segments) != (NO_LIMIT, NO_LIMIT):
            raise ValueError("the last form of a table has no limits, so that every step finds one")

    def choose(self, tokens: int, segments: int) -> Form:
        """The first form whose limits hold.

        Args:
            tokens: most tokens of one segment.
            segments: how many segments.
        """
        return next(e.form for e in self.entries if tokens <= e.tokens and segments <= e.segments)


def table_from_json(text: str) -> Table:
    """A table as `tables/` holds them: {"forms": [{"tokens": limit or null, "segments": limit or null, ...form}]}."""
    entries = []
    for given in json.loads(text)["forms"]:
        limits = [given.pop(name) for name in ("tokens", "segments")]
        tokens, segments = (NO_LIMIT if limit is None else limit for limit in limits)
        entries.append(Entry(tokens, segments, Form(**given)))
    return Table(tuple(entries))


@cache
def table_for(device_name: str) -> Table:
    """The table measured for a device of this name, or the default."""
    path = TABLES / f"{'-'.join(device_name.lower().split())}.json"
    if not path.is_file():
        path = TABLES / "default.json"
    return table_from_json(path.read_text())
