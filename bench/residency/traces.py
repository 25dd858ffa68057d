"""The trace suite: who asks for which adapter when. Every trace is made from a seed, so anyone can make it again.

`slora-A` S-LoRA's generator with power-law exponent A (1 is uniform, smaller is more skewed): the adapter is n * x**(1/A)
with x uniform, arrivals are a Gamma process with coefficient of variation 1. Sheng et al., MLSys 2024.
`zipf-S` the adapter of popularity rank k has weight k**-S.
`punica-*` the four popularities of Punica: distinct, every request has an adapter of its own; uniform, over sqrt(requests)
adapters; skewed, each 1.5 times as popular as the next; identical. Chen et al., MLSys 2024.
`bursts` each adapter is asked for in bursts of 1 to 20 requests that come within about a minute, Zipf 0.8 over the adapters.
`scan` Zipf 1.2 of one tenant, and another who asks for each of very many adapters once, a quarter of all requests.
`drift` Zipf 1.2 whose ranking turns over entirely during the trace.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

MIB = 1 << 20
# All linear layers of an 8B model in 16 bits take about 2.6 MiB per rank.
BYTES_PER_RANK = int(2.6 * MIB)
RANKS = (8, 16, 32, 64)
ADAPTERS = 200
TIER_BYTES = 4 << 30
Picker = Callable[[random.Random, int], Iterator[int]]


@dataclass(frozen=True)
class Request:
    """One request: when it comes, in seconds, for which adapter, on whose behalf, and how many tokens it answers with."""

    at: float
    digest: str
    tenant: str
    tokens: int


@dataclass(frozen=True)
class Trace:
    """Requests in the order they come, and what every adapter takes."""

    name: str
    requests: list[Request]
    sizes: dict[str, int]

    @property
    def tier_bytes(self) -> int:
        """The device's room for adapters: TIER_BYTES, and where that would hold nearly all of them, half of them."""
        return max(min(TIER_BYTES, sum(self.sizes.values()) // 2), 2 * BYTES_PER_RANK * max(RANKS))


def _power(alpha: float) -> Picker:
    def pick(rng: random.Random, count: int) -> Iterator[int]:
        for _ in range(count):
            yield min(ADAPTERS - 1, int(ADAPTERS * rng.random() ** (1 / alpha)))

    return pick


def _weighted(weights: list[float]) -> Picker:
    def pick(rng: random.Random, count: int) -> Iterator[int]:
        # Not the most popular first: an adapter's number must tell nothing.
        order = rng.sample(range(len(weights)), len(weights))
        yield from rng.choices(order, weights, k=count)

    return pick


def _zipf(exponent: float) -> list[float]:
    return [(rank + 1) ** -exponent for rank in range(ADAPTERS)]


def _punica(kind: str) -> Picker:
    def pick(rng: random.Random, count: int) -> Iterator[int]:
        some = math.ceil(math.sqrt(count))
        if kind == "distinct":
            yield from range(count)
        elif kind == "identical":
            yield from [0] * count
        elif kind == "uniform":
            yield from (rng.randrange(some) for _ in range(count))
        else:
            yield from rng.choices(range(some), [1.5**-rank for rank in range(some)], k=count)

    return pick


def _bursts(rng: random.Random, count: int) -> Iterator[int]:
    """Forty bursts at a time, in no order; one that ends is followed by another adapter's."""
    begin = _weighted(_zipf(0.8))(rng, count)
    active: list[list[int]] = []
    for _ in range(count):
        while len(active) < 40:
            active.append([next(begin), rng.randint(1, 20)])
        burst = rng.choice(active)
        burst[1] -= 1
        if not burst[1]:
            active.remove(burst)
        yield burst[0]


def _scan(rng: random.Random, count: int) -> Iterator[int]:
    regular, fresh = _weighted(_zipf(1.2))(rng, count), itertools.count(ADAPTERS)
    for _ in range(count):
        yield next(fresh) if rng.random() < 0.25 else next(regular)


def _drift(rng: random.Random, count: int) -> Iterator[int]:
    order, weights = rng.sample(range(ADAPTERS), ADAPTERS), _zipf(1.2)
    for number in range(count):
        if number % max(1, count // ADAPTERS) == 0:
            # The least popular becomes the most popular, and everyone moves down by one.
            order.insert(0, order.pop())
        yield rng.choices(order, weights)[0]


PICKERS: Mapping[str, Picker] = {
    "slora-0.1": _power(0.1),
    "slora-0.3": _power(0.3),
    "slora-0.6": _power(0.6),
    "slora-1": _power(1.0),
    "zipf-0.8": _weighted(_zipf(0.8)),
    "zipf-1.2": _weighted(_zipf(1.2)),
    "punica-distinct": _punica("distinct"),
    "punica-uniform": _punica("uniform"),
    "punica-skewed": _punica("skewed"),
    "punica-identical": _punica("identical"),
    "bursts": _bursts,
    "scan": _scan,
    "drift": _drift,
}


def make(name: str, seed: int, count: int, per_second: float) -> Trace:
    """A trace of so many requests, so many per second on average, with 32 to 224 tokens to answer."""
    rng = random.Random(f"{name} {seed}")
    # Ranks are dealt at random, so that size and popularity have nothing to do with each other.
    numbers = list(PICKERS[name](rng, count))
    digests = {number: f"a{number}" for number in sorted(set(numbers))}
    sizes = {digest: rng.choice(RANKS) * BYTES_PER_RANK for digest in digests.values()}
    at, requests = 0.0, []
    for number in numbers:
        at += rng.expovariate(per_second)
        tenant = "scanner" if name == "scan" and number >= ADAPTERS else "regular"
        requests.append(Request(at, digests[number], tenant, rng.randint(32, 224)))
    return Trace(name, requests, sizes)
