"""The workload: bursts of requests sent at once, and who asks for which adapter.

Every request is a different prompt of PROMPT_TOKENS tokens with OUTPUT_TOKENS greedy tokens to answer, end of sequence
ignored, so no prefix cache helps and every burst makes the same number of tokens.
"""

from __future__ import annotations

import itertools
import random
import statistics
from dataclasses import dataclass

PROMPT_TOKENS, OUTPUT_TOKENS = 128, 64
POPULARITIES = ("identical", "uniform", "skewed", "distinct")
ZIPF = 1.2


@dataclass(frozen=True)
class Case:
    """One line of the table: how many requests at once, over how many adapters (0: the base), how popular each is."""

    concurrency: int
    adapters: int = 0
    popularity: str = "uniform"

    @property
    def name(self) -> str:
        """As shown."""
        return f"{self.adapters} {self.popularity}" if self.adapters else "base"

    def assign(self, seed: int) -> list[int | None]:
        """The adapter of each request, None for the base."""
        rng = random.Random(seed)
        if not self.adapters:
            return [None] * self.concurrency
        if self.popularity == "identical":
            return [0] * self.concurrency
        if self.popularity == "skewed":
            weights = [1 / (rank + 1) ** ZIPF for rank in range(self.adapters)]
            return list(rng.choices(range(self.adapters), weights, k=self.concurrency))
        if self.popularity == "uniform":
            return [rng.randrange(self.adapters) for _ in range(self.concurrency)]
        return [number % self.adapters for number in range(self.concurrency)]


@dataclass(frozen=True)
class Burst:
    """What one burst took.

    Attributes:
        seconds: from the first request to the last token.
        arrivals: by request, when each of its tokens came, in seconds from the first request.
    """

    seconds: float
    arrivals: list[list[float]]

    @property
    def rate(self) -> float:
        """Output tokens per second."""
        return sum(map(len, self.arrivals)) / self.seconds

    @property
    def first_token_ms(self) -> float:
        """Median time to the first token."""
        return 1e3 * statistics.median(times[0] for times in self.arrivals)

    @property
    def between_tokens_ms(self) -> float:
        """Median time between two tokens of a request."""
        return 1e3 * statistics.median(b - a for times in self.arrivals for a, b in itertools.pairwise(times))

    @property
    def decode_rate(self) -> float:
        """Tokens per second once every request has its first token."""
        begin = max(times[0] for times in self.arrivals)
        tokens = sum(1 for times in self.arrivals for time in times if time > begin)
        return tokens / (max(times[-1] for times in self.arrivals) - begin)


def prompts(count: int, vocab_size: int, seed: int) -> list[list[int]]:
    """Different prompts of PROMPT_TOKENS random token ids; the lowest ids, which may be special, are left out."""
    rng = random.Random(seed)
    return [[rng.randrange(100, vocab_size) for _ in range(PROMPT_TOKENS)] for _ in range(count)]


def cases(concurrency: list[int], adapters: list[int], popularities: list[str]) -> list[Case]:
    """Every combination that says something: one adapter is always identical, the base has no popularity."""
    found: list[Case] = []
    for many in concurrency:
        for count in adapters:
            kinds = popularities if count > 1 else ["identical"]
            found += [Case(many, count, kind) for kind in kinds if count <= 1 or kind != "identical"]
    return found


def median_of(bursts: list[Burst], figure: str) -> float:
    """Median of one figure over the bursts of a case."""
    return float(statistics.median(getattr(burst, figure) for burst in bursts))
