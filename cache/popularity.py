"""How likely each artifact is the next to be asked for, learned from who was asked for before. No clock: time is uses.

Counts that decay forget at one speed, and no speed is right for all: a steady mix wants a long memory, a burst a short one. So
there are several, each with its own half-life, and they are mixed in proportion to how well each has foretold what came
(Herbster and Warmuth, "Tracking the Best Expert", Machine Learning 32, 1998: fixed share).

What was asked for once is on probation by that: every memory has one use of it, and only a second use tells it from a scan.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field

HALF_LIVES = (32.0, 256.0, 2048.0)
# With this chance per use the best memory changes.
SHARE = 0.005
# A memory is judged as if it gave this part of the chance to all alike. Without it, the tail that a short memory has all but
# forgotten would decide, which no policy keeps anyway.
EVEN = 0.5
# A count below this is as good as none, and forgotten.
FORGOTTEN = 2.0**-10
# So many may be forgotten with one use. More than one, so that they become fewer.
AT_ONCE = 2


@dataclass(slots=True)
class _Counts:
    at: int
    values: list[float] = field(default_factory=lambda: [0.0] * len(HALF_LIVES))


class Popularity:
    """See the module.

    Attributes:
        when_forgotten: is called with each digest that is forgotten.
    """

    def __init__(self) -> None:
        self.when_forgotten: Callable[[str], None] = lambda _: None
        self._uses = 0
        # The one not used for longest first.
        self._counts: OrderedDict[str, _Counts] = OrderedDict()
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
        self._counts.move_to_end(digest)
        self._totals = [total * decay + 1.0 for total, decay in zip(self._totals, self._decays, strict=True)]
        self._forget()

    def chance(self, digest: str) -> float:
        """The chance that this is the next to be asked for; 0 for what was not asked for yet or is forgotten."""
        counts = self._counts.get(digest)
        if counts is None:
            return 0.0
        shares = zip(self._weights, self._now(counts), self._totals, strict=True)
        return sum(weight * value / total for weight, value, total in shares)

    def rank(self, digest: str) -> float:
        """Orders artifacts by what the slowest memory knows of them. It stays while one is not used, and rises with use.

        It is the logarithm of the count, brought back to the time of the very first use of all; minus infinity for none.
        """
        counts = self._counts.get(digest)
        return math.log(counts.values[-1]) - counts.at * math.log(self._decays[-1]) if counts else -math.inf

    def at_least(self, rank: float) -> float:
        """The chance that an artifact of this rank has at least: what the slowest memory alone gives it."""
        if rank == -math.inf:
            return 0.0
        return self._weights[-1] * math.exp(rank + self._uses * math.log(self._decays[-1])) / self._totals[-1]

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

    def _forget(self) -> None:
        """Forgets a few of those not used for longest, as far as hardly anything is left of them."""
        for _ in range(AT_ONCE):
            digest, counts = next(iter(self._counts.items()))
            if self._now(counts)[-1] >= FORGOTTEN:
                return
            del self._counts[digest]
            self.when_forgotten(digest)
