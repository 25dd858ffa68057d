"""Who is to blame for a pass that raised, and what to run instead. PURE.

A step that fails is run again without its culprits. An error that names an adapter blames the rows that use it; any
other error blames nobody as long as there are several rows: each half of them is run by itself, until a row fails alone.
So a row that can be computed by itself is computed, whatever sat beside it; and as the retries of a pass are parts of
it that share no row, n rows need 2n - 1 passes at most: also a device that fails at everything ends the step.

To run a row again is harmless: it writes the keys and values of the same tokens to the same slots, and until its
sequence is advanced nobody else reads those.
"""

from __future__ import annotations

from dataclasses import dataclass

from engine.errors import StaleRows
from engine.scheduler import Row


@dataclass(frozen=True, slots=True)
class Verdict:
    """Rows whose sequences must end, and groups of the other rows, each to be run by itself."""

    culprits: list[Row]
    retries: list[list[Row]]


def judge(rows: list[Row], error: Exception) -> Verdict:
    """What to do after a pass over these rows raised this error."""
    if not rows:
        return Verdict([], [])
    named = _named(rows, error)
    if named or len(rows) == 1:
        culprits = named or rows
        others = [row for row in rows if row not in culprits]
        return Verdict(culprits, [others] if others else [])
    middle = len(rows) // 2
    return Verdict([], [rows[:middle], rows[middle:]])


def _named(rows: list[Row], error: Exception) -> list[Row]:
    if not isinstance(error, StaleRows):
        return []
    return [row for row in rows if (row.sequence.adapter, row.sequence.generation) == (error.digest, error.generation)]
