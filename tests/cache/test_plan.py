"""The plan: what must never happen, on hundreds of random states, under every policy."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cache.plan import EAGER, Plan, Policy, Resident, Wanted, plan
from cache.policies import POLICIES, Lru

DIGESTS = [f"d{number}" for number in range(12)]
sizes = st.integers(1, 50)
residents = st.lists(
    st.builds(
        Resident,
        st.sampled_from(DIGESTS),
        sizes,
        st.integers(0, 9),
        kept=st.booleans(),
        cost=st.floats(0, 1),
        tenant=st.sampled_from(["", "a", "b"]),
    ),
    unique_by=lambda resident: resident.digest,
)
needs = st.lists(st.builds(Wanted, st.sampled_from(DIGESTS), sizes, st.booleans()), unique_by=lambda want: want.digest)
policies = st.sampled_from(sorted(POLICIES))
shares = st.sampled_from([0.3, 1.0])


def made(name: str, here: list[Resident]) -> Policy:
    policy = POLICIES[name](100)
    for resident in here:
        policy.used(resident.digest, resident.size_bytes, resident.cost)
        policy.entered(resident.digest, resident.size_bytes)
    return policy


def horizon(here: list[Resident], wanted: list[Wanted], budget: int) -> set[str]:
    """What fits together beside the leases, in the order it is needed; said anew, for the tests."""
    sizes_here = {resident.digest: resident.size_bytes for resident in here}
    taken = {resident.digest for resident in here if resident.kept}
    for want in wanted:
        together = taken | {want.digest}
        wanted_sizes = {each.digest: each.size_bytes for each in wanted}
        if sum(sizes_here.get(digest) or wanted_sizes[digest] for digest in together) <= budget:
            taken = together
    return taken


@given(residents, needs, st.integers(0, 200), policies, shares)
def test_a_plan_keeps_what_is_leased_and_queued_and_fits_the_budget(
    here: list[Resident], wanted: list[Wanted], spare: int, name: str, share: float
) -> None:
    budget = sum(resident.size_bytes for resident in here) + spare
    decided = plan(here, wanted, budget, made(name, here), tenant_share=share)
    by_digest = {resident.digest: resident for resident in here}
    want_sizes = {want.digest: want.size_bytes for want in wanted}
    # Nothing leased and nothing within the horizon is evicted, nothing twice
    assert not horizon(here, wanted, budget).intersection(decided.evictions)
    assert len(set(decided.evictions)) == len(decided.evictions)
    # Something that is queued, but too far back, goes only when all that no one asked for would not be enough
    if any(digest in want_sizes for digest in decided.evictions):
        unasked = sum(r.size_bytes for r in here if not r.kept and r.digest not in want_sizes)
        near = horizon(here, wanted, budget) - by_digest.keys()
        assert spare + unasked < sum(want_sizes[digest] for digest in near)
    # Loads fit into what is free now, before any eviction is done
    assert sum(want_sizes[digest] for digest in decided.loads) <= spare
    # Every wish not there yet is answered in exactly one way
    answers = [*decided.loads, *decided.waiting, *decided.hopeless]
    assert sorted(answers) == sorted(want_sizes.keys() - by_digest.keys())
    assert all((want_sizes[digest] > budget) == (digest in decided.hopeless) for digest in answers)
    # Evictions are for someone, and leave no one there who need not go
    freed = sum(by_digest[digest].size_bytes for digest in decided.evictions)
    assert not decided.evictions or freed <= sum(want_sizes[digest] for digest in decided.waiting) + max(
        by_digest[digest].size_bytes for digest in decided.evictions
    )


@given(residents, needs, st.integers(0, 200), policies)
def test_following_plans_ends_with_everything_loaded_that_can_be(
    here: list[Resident], wanted: list[Wanted], spare: int, name: str
) -> None:
    budget = sum(resident.size_bytes for resident in here) + spare
    policy = made(name, here)
    state = {resident.digest: resident for resident in here}
    want_sizes = {want.digest: want.size_bytes for want in wanted}
    for _ in range(50):
        decided = plan(list(state.values()), wanted, budget, policy)
        for digest in decided.evictions:
            policy.left(digest)
            del state[digest]
        for digest in decided.loads:
            policy.entered(digest, want_sizes[digest])
            state[digest] = Resident(digest, want_sizes[digest], 0)
        assert sum(resident.size_bytes for resident in state.values()) <= budget
        if not decided.evictions and not decided.loads:
            break
    else:
        pytest.fail("evicts and loads for ever")
    # Of the horizon there is all that is waited for, and the next of the look-ahead
    near = horizon(list(state.values()), wanted, budget)
    ahead = [want for want in wanted if not want.urgent][:1]
    assert near & {want.digest for want in [*(want for want in wanted if want.urgent), *ahead]} <= state.keys()


@given(residents, needs, st.integers(0, 200), policies)
def test_what_is_leaving_is_not_evicted_for_twice(
    here: list[Resident], wanted: list[Wanted], spare: int, name: str
) -> None:
    """A plan made before the evictions of the one before were done asks for no more of them."""
    budget = sum(resident.size_bytes for resident in here) + spare
    policy = made(name, here)
    first = plan(here, wanted, budget, policy)
    loads = {digest: next(want.size_bytes for want in wanted if want.digest == digest) for digest in first.loads}
    between = [
        Resident(r.digest, r.size_bytes, r.last_used, r.kept, leaving=r.digest in first.evictions) for r in here
    ] + [Resident(digest, size, 9, kept=True) for digest, size in loads.items()]
    again = plan(between, wanted, budget, policy)
    assert again.evictions == () and again.loads == ()


def test_the_least_recently_used_goes_first() -> None:
    here = [Resident("new", 10, 9.0), Resident("old", 10, 1.0), Resident("kept", 10, 0.0, kept=True)]
    assert plan(here, [Wanted("x", 10)], 30, Lru()).evictions == ("old",)


def test_look_ahead_pushes_out_no_look_ahead_but_what_is_needed_sooner_does() -> None:
    here = [Resident("ahead", 10, 1.0), Resident("plain", 10, 9.0)]
    ahead, first, large = Wanted("ahead", 10), Wanted("x", 10, urgent=True), Wanted("x", 20, urgent=True)
    assert plan(here, [ahead, Wanted("x", 20)], 20, Lru()).evictions == ()
    assert plan(here, [ahead, Wanted("x", 10)], 20, Lru()).evictions == ("plain",)
    assert plan(here, [first, ahead], 20, Lru()).evictions == ("plain",)
    assert plan(here, [large, ahead], 20, Lru()).evictions == ("plain", "ahead")


def test_of_what_is_queued_too_far_back_the_last_needed_goes_first() -> None:
    here = [Resident("soon", 10, 1.0), Resident("later", 10, 2.0)]
    wanted = [Wanted("now", 10, urgent=True), Wanted("soon", 10), Wanted("later", 10)]
    assert plan(here, wanted, 20, Lru()).evictions == ("later",)


def test_room_is_made_for_the_next_of_the_look_ahead_only() -> None:
    here = [Resident(f"r{n}", 1, n) for n in range(20)]
    wanted = [Wanted(f"w{n}", 1) for n in range(20)]
    assert len(plan(here, wanted, 20, Lru()).evictions) == EAGER
    # Where there is room for all of it, all of it is loaded
    assert len(plan([], wanted, 20, Lru()).loads) == 20


def test_only_the_first_of_the_look_ahead_pushes_out_what_is_queued_further_back() -> None:
    here = [Resident("late", 10, 1.0), Resident("later", 10, 2.0), Resident("run", 10, 3.0, kept=True)]
    queue = [Wanted(digest, 10) for digest in ("first", "second", "late", "later")]
    assert plan(here, queue, 30, Lru()).evictions == ("later",)
    # What nobody asked for goes for the second too
    here.append(Resident("plain", 10, 9.0))
    assert plan(here, queue, 40, Lru()).evictions == ("plain",)
    here.append(Resident("simple", 10, 9.5))
    assert plan(here, queue, 50, Lru()).evictions == ("plain", "simple")


def test_a_wish_repeated_counts_once_where_it_was_first() -> None:
    decided = plan([], [Wanted("a", 5), Wanted("b", 5), Wanted("a", 5)], 10, Lru())
    assert decided.loads == ("a", "b")
    # A sequence waits for it, whatever else waits for it too
    behind = [Wanted(f"w{n}", 1) for n in range(9)]
    assert plan([], [Wanted("a", 5, urgent=True), *behind, Wanted("a", 5)], 10, Lru()).loads[0] == "a"


def test_room_being_made_is_not_taken_by_those_behind() -> None:
    here = [Resident("old", 10, 1.0)]
    decided = plan(here, [Wanted("large", 12), Wanted("small", 1)], 13, Lru())
    assert decided == Plan(loads=(), evictions=("old",), waiting=("large", "small"), hopeless=())


def test_what_makes_room_alone_goes_alone() -> None:
    here = [Resident("small", 1, 1.0), Resident("large", 10, 2.0)]
    assert plan(here, [Wanted("x", 10)], 11, Lru()).evictions == ("large",)


def test_a_tenant_over_its_share_gives_up_its_own_first() -> None:
    here = [Resident(f"a{n}", 10, 5.0 + n, tenant="a") for n in range(3)] + [Resident("b", 10, 1.0, tenant="b")]
    wanted = [Wanted("x", 10)]
    assert plan(here, wanted, 40, Lru(), tenant_share=0.5).evictions == ("a0",)
    # Within its share it is like anyone
    assert plan(here, wanted, 40, Lru(), tenant_share=0.75).evictions == ("b",)
