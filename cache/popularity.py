"""How likely each artifact is the next to be asked for, learned from who was asked for before. No clock: time is uses.

Counts that decay forget at one speed, and no speed is right for all: a steady mix wants a long memory, a burst a short one. So
there are several, each with its own half-life, and they are mixed in proportion to how well each has foretold what came
(Herbster and Warmuth, "Tracking the Best Expert", Machine Learning 32, 1998: fixed share).

What was asked for once is on probation by that: every memory has one use of it, and only a second use tells it from a scan.
"""

from __future__ import annotations

from dataclasses import dataclass, field

HALF_LIVES = (32.0, 256.0, 2048.0)
# With this chance per use the best memory changes.
SHARE = 0.005
# A memory is judged as if it gave this part of the chance to all alike. Without it, the tail that a short memory has all but
# forgotten would decide, which no policy keeps anyway.
EVEN = 0.5
# A count below this is as good as none, and forgotten.
FORGOTTEN = 2.0**-10
# How often what is forgotten is looked for, in uses.
SWEEP = 4096


@dataclass(slots=True)
class _Counts:
    at: int
    values: list[float] = field(default_factory=lambda: [0.0] * len(HALF_LIVES))


class Popularity:
    """See the module."""

    def __init__(self) -> None:
        self._uses = 0
        self._counts: dict[str, _Counts] = {}
        self._decays = [2.0 ** (-1.0 / half_life) for half_life in HALF_LIVES]
        self._totals = [0.0] * len(HALF_LIVES)
        self._weights = [1.0 / len(HALF_LIVES)] * len(HALF_LIVES)

    def __len__(self) -> int:
        return len(self._counts)

    def note(self, digest: str) -> None:
        """One use."""
        counts = self._counts.get(digest)
        if counts is None:
            # Nobody could foretell it, so it says nothing about the memories.
            counts = self._counts[digest] = _Counts(self._uses)
        else:
            self._judge(self._now(counts))
        self._uses += 1
        counts.values = [value + 1.0 for value in self._now(counts)]
        counts.at = self._uses
        self._totals = [total * decay + 1.0 for total, decay in zip(self._totals, self._decays, strict=True)]
        if self._uses % SWEEP == 0:
            self._sweep()

    def chance(self, digest: str) -> float:
        """The chance that this is the next to be asked for; 0 for what was not asked for yet or is forgotten."""
        counts = self._counts.get(digest)
        if counts is None:
            return 0.0
        shares = zip(self._weights, self._now(counts), self._totals, strict=True)
        return sum(weight * value / total for weight, value, total in shares)

    def _now(self, counts: _Counts) -> list[float]:
        age = self._uses - counts.at
        return [value * decay**age for value, decay in zip(counts.values, self._decays, strict=True)]

    def _judge(self, values: list[float]) -> None:
        """Weighs the memories by the chance each had given to what has come."""
        chances = [value / total for value, total in zip(values, self._totals, strict=True)]
        floor = EVEN / len(self._counts)
        told = [weight * ((1 - EVEN) * chance + floor) for weight, chance in zip(self._weights, chances, strict=True)]
        total = sum(told) or 1.0
        even = SHARE / len(told)
        self._weights = [(1.0 - SHARE) * weight / total + even for weight in told]

    def _sweep(self) -> None:
        for digest in [digest for digest, counts in self._counts.items() if max(self._now(counts)) < FORGOTTEN]:
            del self._counts[digest]
