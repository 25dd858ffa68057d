"""Each policy gives up what its paper says, and what it has learned is not lost or kept for ever."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cache.plan import Policy, Resident
from cache.policies import POLICIES, Gdsf, Lfu, S3Fifo, Sieve, Value
from cache.popularity import Popularity


def here(*digests: str, size: int = 1) -> list[Resident]:
    return [Resident(digest, size, last_used=0.0, cost=1.0) for digest in digests]


def order(policy: Policy, residents: list[Resident]) -> str:
    return "".join(resident.digest for resident in policy.order(residents))


def enter(policy: Policy, digests: str) -> None:
    for digest in digests:
        policy.used(digest, 1, 1.0)
        policy.entered(digest, 1)


def use(policy: Policy, digests: str) -> None:
    for digest in digests:
        policy.used(digest, 1, 1.0)


events = st.lists(
    st.tuples(st.sampled_from(["use", "enter", "leave"]), st.sampled_from("abcdefgh"), st.integers(1, 9)), max_size=60
)


@pytest.mark.parametrize("name", POLICIES)
@given(events, st.sets(st.sampled_from("abcdefgh")))
def test_whatever_happened_an_order_has_every_candidate_once_and_changes_nothing(
    name: str, happened: list[tuple[str, str, int]], candidates: set[str]
) -> None:
    policy = POLICIES[name](20)
    for kind, digest, size in happened:
        match kind:
            case "use":
                policy.used(digest, size, 0.1 * size)
            case "enter":
                policy.entered(digest, size)
            case "leave":
                policy.left(digest)
    residents = here(*sorted(candidates))
    once = order(policy, residents)
    assert sorted(once) == sorted(candidates)
    assert order(policy, residents) == once
    # Giving up the first leaves the rest in order with the next one first, as if it had gone on
    if len(once) > 1 and name in ("lru", "lfu", "gdsf", "value"):
        policy.left(once[0])
        assert order(policy, [r for r in residents if r.digest != once[0]]) == once[1:]


@pytest.mark.parametrize("name", ["sieve", "s3fifo"])
@given(events)
def test_a_queue_gives_up_one_at_a_time_as_it_said_it_would(name: str, happened: list[tuple[str, str, int]]) -> None:
    policy = POLICIES[name](20)
    inside: set[str] = set()
    for kind, digest, size in happened:
        if kind == "leave" and inside:
            first = policy.order(here(*sorted(inside)))[0].digest
            policy.left(first)
            inside.discard(first)
        elif kind == "enter" and digest not in inside:
            policy.entered(digest, size)
            inside.add(digest)
        else:
            policy.used(digest, size, 1.0)
    said = order(policy, here(*sorted(inside)))
    went = ""
    while inside:
        first = policy.order(here(*sorted(inside)))[0].digest
        policy.left(first)
        inside.discard(first)
        went += first
    if name == "sieve":
        assert went == said
    assert sorted(went) == sorted(said) and went[:1] == said[:1]


def test_lfu_counts_uses_and_ages() -> None:
    policy = Lfu()
    enter(policy, "abc")
    use(policy, "aab")
    assert order(policy, here("a", "b", "c")) == "cba"
    # Each newcomer that goes makes the tier older: at last what was popular once is the next to go
    for digest in "defgh":
        enter(policy, digest)
        use(policy, digest)
        policy.left(digest)
    enter(policy, "x")
    assert order(policy, here("a", "x")) == "ax"


def test_gdsf_gives_up_what_is_cheap_per_byte() -> None:
    policy = Gdsf()
    for digest, size, cost in (("l", 100, 2.0), ("s", 10, 1.0)):
        policy.used(digest, size, cost)
        policy.entered(digest, size)
    assert order(policy, here("s", "l")) == "ls"
    # Five uses more, and the large one is worth more
    for _ in range(5):
        policy.used("l", 100, 2.0)
    assert order(policy, here("s", "l")) == "sl"


def test_sieve_follows_the_example_of_its_paper() -> None:
    """Figure 1 of the paper: A, B and G are visited; the hand takes the bits of A and B, and G's later."""
    policy = Sieve()
    for digest in "abcdefg":
        policy.entered(digest, 1)
    use(policy, "abg")
    everything = set("abcdefg")
    gone = []
    for newcomer in "hij":
        first = policy.order(here(*sorted(everything)))[0].digest
        policy.left(first)
        everything.remove(first)
        gone.append(first)
        policy.entered(newcomer, 1)
        everything.add(newcomer)
        if newcomer == "h":
            use(policy, "ad")
    # c goes first; d was used meanwhile and stays, so e and f follow
    assert gone == ["c", "e", "f"]


def test_s3fifo_keeps_one_hit_wonders_from_pushing_out_the_rest() -> None:
    policy = S3Fifo(10)
    enter(policy, "ab")
    use(policy, "aabb")
    everything = {"a", "b"}
    for digest in "cdefghijkl":
        enter(policy, digest)
        everything.add(digest)
        if len(everything) > 5:
            first = policy.order(here(*sorted(everything)))[0].digest
            policy.left(first)
            everything.remove(first)
    assert {"a", "b"} <= everything


def test_s3fifo_remembers_who_comes_back() -> None:
    policy = S3Fifo(10)
    enter(policy, "ab")
    use(policy, "aabb")
    enter(policy, "cd")
    # a and b have passed the probation, c has not
    assert order(policy, here("a", "b", "c", "d"))[0] == "c"
    policy.left("c")
    enter(policy, "c")
    # Back soon, it enters the main queue: the newcomer on probation goes first
    assert order(policy, here("c", "d"))[0] == "d"


def test_value_tells_a_scan_from_what_comes_back() -> None:
    rng, policy = random.Random(3), Value()
    regulars = [f"r{number}" for number in range(8)]
    scanned = []
    for number in range(400):
        policy.used(rng.choice(regulars), 1, 1.0)
        if number > 300:
            policy.used(f"scan{number}", 1, 1.0)
            scanned.append(f"scan{number}")
    # Also the latest of the scan go before the regular that was not used for longest
    decided = [resident.digest for resident in policy.order(here(*regulars, *scanned[-8:]))]
    assert set(decided[:8]) == set(scanned[-8:])


def test_value_weighs_what_it_costs_to_bring_something_back() -> None:
    policy = Value()
    use(policy, "ab")
    near, far = Resident("a", 10, 0.0, cost=0.01), Resident("b", 10, 0.0, cost=1.0)
    assert [resident.digest for resident in policy.order([far, near])] == ["a", "b"]


def test_popularity_follows_a_change_and_forgets() -> None:
    rng, popularity = random.Random(5), Popularity()
    for _ in range(2000):
        popularity.note(rng.choice("ab"))
    for _ in range(200):
        popularity.note(rng.choice("cd"))
    assert min(map(popularity.chance, "cd")) > max(map(popularity.chance, "ab"))
    for number in range(50_000):
        popularity.note(f"n{number}")
    # Flat memory: only what was asked for lately is known
    assert len(popularity) < 32_000 and popularity.chance("a") == 0.0
