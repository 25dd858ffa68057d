"""Room for one more: what goes is enough, no more than needed, nothing that is kept, and the least worth."""

from __future__ import annotations

import asyncio

from hypothesis import assume, given
from hypothesis import strategies as st

from cache.demand import demand_of
from cache.engines import Engine, Expected, OnDevice
from cache.plan import Policy, Resident, Wanted, make_room, plan
from cache.policies import POLICIES, Lru
from cache.residency import DevicePlace
from tests.cache.conftest import BASE
from tests.cache.test_plan import DIGESTS, made, residents

soons = st.lists(st.sampled_from(DIGESTS), unique=True)
policies = st.sampled_from(sorted(POLICIES))
free_bytes = st.integers(0, 60)


def room_made(here: list[Resident], size: int, soon: list[str], free: int, policy: Policy) -> tuple[str, ...]:
    by_digest = {one.digest: one for one in here if not one.kept}
    unasked = policy.order(one for digest, one in by_digest.items() if digest not in soon)
    return make_room(unasked, [by_digest[digest] for digest in soon if digest in by_digest], size, free)


def total(here: list[Resident]) -> int:
    return sum(resident.size_bytes for resident in here)


def horizon(here: list[Resident], size: int, soon: list[str], free: int) -> set[str]:
    """What is needed soon and fits beside the newcomer and all that is kept, the soonest first; said anew, for the tests."""
    by_digest = {resident.digest: resident for resident in here if not resident.kept}
    left = free + total(list(by_digest.values())) - size
    near: set[str] = set()
    for digest in soon:
        if digest in by_digest and by_digest[digest].size_bytes <= left:
            left -= by_digest[digest].size_bytes
            near.add(digest)
    return near


@given(residents, st.integers(1, 150), soons, free_bytes, policies)
def test_what_goes_makes_the_room_and_nothing_goes_in_vain(
    here: list[Resident], size: int, soon: list[str], free: int, name: str
) -> None:
    gone = set(room_made(here, size, soon, free, made(name, here)))
    may_go = [resident for resident in here if not resident.kept]
    if size <= free or size > free + total(may_go):
        # There is room, or there cannot be
        assert not gone
        return
    leaving = [resident for resident in here if resident.digest in gone]
    assert len(leaving) == len(gone) and not any(resident.kept for resident in leaving)
    assert not gone & horizon(here, size, soon, free)
    assert free + total(leaving) >= size
    # Without any one of them there would be too little
    assert all(free + total(leaving) - each.size_bytes < size for each in leaving)


@given(residents, st.integers(1, 150), soons, free_bytes, policies)
def test_it_is_what_a_plan_that_looks_at_everything_says(
    here: list[Resident], size: int, soon: list[str], free: int, name: str
) -> None:
    sizes = {one.digest: one.size_bytes for one in here}
    wanted = [Wanted("", size, urgent=True), *(Wanted(digest, sizes[digest]) for digest in soon if digest in sizes)]
    decided = plan(here, wanted, free + total(here), made(name, here))
    assert room_made(here, size, soon, free, made(name, here)) == decided.evictions


@given(residents, st.integers(1, 150), soons, free_bytes)
def test_what_is_worth_least_goes_first(here: list[Resident], size: int, soon: list[str], free: int) -> None:
    gone = set(room_made(here, size, soon, free, Lru()))
    assume(gone)
    order = [one.digest for one in Lru().order(one for one in here if not one.kept and one.digest not in soon)]
    order += [digest for digest in reversed(soon) if digest in {one.digest for one in here if not one.kept}]
    sizes = {one.digest: one.size_bytes for one in here}
    last = max(order.index(digest) for digest in gone)
    # What came before the last one and stays would not have been enough in its place
    assert free + sum(sizes[digest] for digest in order[:last]) < size


def test_what_is_needed_soon_goes_after_everything_else_and_the_last_needed_first() -> None:
    here = [Resident(name, 10, at) for at, name in enumerate(("soon", "later", "plain", "kept"))]
    here[3] = Resident("kept", 10, 0.0, kept=True)
    soon = ["soon", "later"]
    assert room_made(here, 10, soon, 0, Lru()) == ("plain",)
    assert room_made(here, 20, soon, 0, Lru()) == ("plain", "later")
    assert room_made(here, 30, soon, 0, Lru()) == ("plain", "later", "soon")
    assert room_made(here, 31, soon, 0, Lru()) == ()
    assert room_made(here, 31, soon, 1, Lru()) == ("plain", "later", "soon")


def test_a_demand_is_what_all_engines_say() -> None:
    async def engines() -> list[Engine]:
        return [Engine(f"engine-{n}", BASE, 100) for n in range(2)]

    one, two = asyncio.run(engines())
    one.want("wanted")
    one.in_use = frozenset({"used"})
    one.device = {"used": OnDevice(DevicePlace.DEVICE, 1, 1.0), "old": OnDevice(DevicePlace.DEVICE, 1, 2.0)}
    two.device = {"old": OnDevice(DevicePlace.DEVICE, 1, 5.0), "coming": OnDevice(DevicePlace.LOADING, 1, 4.0)}
    one.expected = {"second": Expected("", 9.0, since=3.0), "first": Expected("", 9.0, since=2.0)}
    two.expected = {"second": Expected("", 9.0, since=1.0), "old": Expected("", 9.0, since=4.0)}
    demand = demand_of([one, two], {"pinned"}, {"pinned", "passing"})
    assert demand.kept == {"wanted", "used", "coming", "pinned"} and demand.passing == {"passing"}
    assert demand.soon == ("second", "first", "old", "coming", "used")
