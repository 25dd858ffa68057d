"""Ranking gives the order of the policy bit by bit, whatever happened, and does not look at all artifacts for it."""

from __future__ import annotations

import random
from unittest import mock

from hypothesis import given
from hypothesis import strategies as st

from cache import popularity
from cache.plan import Resident
from cache.policies import Value
from cache.ranking import Ranking

NAMES = [f"d{number}" for number in range(8)]
names = st.sampled_from(NAMES)
events = st.lists(
    st.one_of(
        st.tuples(st.just("use"), names, st.integers(1, 30)),
        st.tuples(st.just("enter"), names, st.integers(1, 100)),
        st.tuples(st.just("leave"), names, st.just(0)),
        st.tuples(st.just("read"), names, st.integers(0, 8)),
    ),
    min_size=10,
    max_size=80,
)


def cost(size: int) -> float:
    return 0.5 + size / 10


class Both:
    """A ranking and the policy that sorts everything."""

    def __init__(self) -> None:
        self.now = 0.0
        self.policy = Value()
        self.used: dict[str, float] = {}
        self.sizes: dict[str, int] = {}
        self.ranking = Ranking(self.policy.popularity, cost, lambda name: self.used.get(name, 0.0))

    def use(self, name: str, times: int = 1) -> None:
        self.now += 1
        self.used[name] = self.now
        for _ in range(times):
            self.policy.used(name, 0, 0.0)
        if times % 2:
            # Where this is left out, it is to make no difference.
            self.ranking.used(name)

    def enter(self, name: str, size: int) -> None:
        if name not in self.sizes:
            self.sizes[name] = size
            self.ranking.enter(name, size)

    def leave(self, name: str) -> None:
        self.sizes.pop(name, None)
        self.ranking.leave(name)

    def sorted(self, kept: str) -> list[str]:
        everything = (Resident(n, s, self.used.get(n, 0.0), cost=cost(s)) for n, s in self.sizes.items() if n != kept)
        return [one.digest for one in self.policy.order(everything)]

    def read(self, kept: str, most: int) -> list[str]:
        reader = self.ranking.in_order(lambda name: name != kept)
        found = [name for name, _ in zip(reader, range(most), strict=False)]
        reader.close()
        return found


@given(events, st.sampled_from([0.5, 2.0, 30.0]))
def test_the_order_is_that_of_the_policy_after_any_history(
    history: list[tuple[str, str, int]], half_life: float
) -> None:
    with mock.patch.multiple(popularity, HALF_LIVES=(half_life / 4, half_life, half_life * 3), FORGOTTEN=0.2):
        both = Both()
        for what, name, number in history:
            if what == "read":
                assert both.read(name, number) == both.sorted(name)[:number]
            else:
                getattr(both, what)(*((name,) if what == "leave" else (name, number)))
        assert both.read("", len(NAMES)) == both.sorted("")


def test_of_ten_thousand_only_a_few_are_looked_at() -> None:
    both, rng = Both(), random.Random(3)
    for number in range(10_000):
        both.enter(f"a{number}", rng.choice([20, 40, 80, 160]))
    for _ in range(30_000):
        both.use(f"a{int(10_000 * rng.random() ** 3)}")
    looked: list[str] = []

    def may_go(name: str) -> bool:
        looked.append(name)
        return True

    for _ in range(20):
        reader = both.ranking.in_order(may_go)
        found = [next(reader) for _ in range(3)]
        reader.close()
        assert found == both.sorted("")[:3]
        both.leave(found[0])
        both.use(f"a{int(10_000 * rng.random() ** 3)}")
    assert len(looked) < 20 * 20
