"""Several bases in one registry: which base an adapter is for, who loads it, and what other nodes and processes know of it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import redis.asyncio
from hypothesis import given
from hypothesis import strategies as st

from cache.artifact import BaseDescription
from cache.bases import Bases
from cache.errors import AmbiguousBase, BaseUnknown, NoSuchBase
from loraplex.cache.v1 import residency_pb2
from loraplex.v1 import adapter_pb2 as pb
from servicekit.errors import Code, code_of
from tests.cache.conftest import BASE, Cache, FakeEngine, Store, eventually, serve_cache, write_adapter
from tests.cache.test_service import refused, register

ONE, TWO = "1" * 64, "2" * 64


def base(name: str, digest: str) -> BaseDescription:
    return replace(BASE, name=name, digest=digest)


def bases(*known: BaseDescription, in_service: frozenset[str] = frozenset()) -> Bases:
    made = Bases(lambda: in_service)
    made.take(known)
    return made


# Which base


def test_a_base_is_named_by_name_by_the_last_part_of_it_or_by_digest() -> None:
    known = bases(base("org/small", ONE), base("large", TWO))
    for name, digest in (("org/small", ONE), ("small", ONE), ("/models/large/", TWO), (TWO, TWO), (ONE[:12], ONE)):
        found = known.named(name)
        assert found is not None and found.digest == digest, name
    for name in ("smal", ONE[:11], "other", "/", "org/"):
        with pytest.raises(NoSuchBase) as error:
            known.named(name)
        assert error.value.metadata["known_bases"] == f"large ({TWO[:12]}), org/small ({ONE[:12]})"


def test_a_misspelt_base_is_told_what_was_probably_meant_and_what_there_is() -> None:
    known = bases(base("org/small", ONE), base("large", TWO))
    for asked, close in (("org/smal", "org/small"), ("Large", "large"), ("nothing-like-it", None)):
        with pytest.raises(NoSuchBase) as error:
            known.named(asked)
        assert f"large ({TWO[:12]}), org/small ({ONE[:12]})" in error.value.message
        assert (f"did you mean '{close}'?" in error.value.message) == (close is not None)
    # While nothing is known it says nothing about the name
    for asked in ("org/small", ""):
        with pytest.raises(BaseUnknown):
            bases().named(asked)


def test_a_whole_name_is_meant_before_a_part_of_one() -> None:
    known = bases(base("org/small", ONE), base("small", TWO))
    assert known.for_adapter("small").digest == TWO
    assert known.for_adapter("org/small").digest == ONE
    with pytest.raises(AmbiguousBase):
        known.for_adapter("elsewhere/small")


def test_of_bases_of_one_name_the_one_in_service_is_meant() -> None:
    known = base("small", ONE), base("small", TWO)
    with pytest.raises(AmbiguousBase) as error:
        bases(*known, in_service=frozenset({ONE, TWO})).named("small")
    assert error.value.metadata["known_bases"] == f"small ({ONE[:12]}), small ({TWO[:12]})"
    found = bases(*known, in_service=frozenset({TWO})).named("small")
    assert found is not None and found.digest == TWO


def test_an_adapter_that_names_no_base_here_is_for_the_only_one_in_service() -> None:
    known = base("small", ONE), base("large", TWO)
    assert bases(*known, in_service=frozenset({TWO})).for_adapter("").digest == TWO
    for in_service in (frozenset[str](), frozenset({ONE, TWO})):
        for own in ("", "unheard"):
            with pytest.raises(AmbiguousBase, match="base_model: there are several bases"):
                bases(*known, in_service=in_service).for_adapter(own)


NAMES = st.sampled_from(["", "a", "b", "x/a", "y/a", "x/b", "/models/b"])


@given(
    st.dictionaries(st.sampled_from("123456"), NAMES.filter(bool)),
    st.sets(st.sampled_from("123456")),
    NAMES,
)
def test_a_choice_is_never_a_guess(known: dict[str, str], in_service: set[str], name: str) -> None:
    """Whatever is chosen has the name asked for, or no base has and it alone could be meant."""
    made = bases(*(base(n, d * 64) for d, n in known.items()), in_service=frozenset(d * 64 for d in in_service))
    if not known:
        return
    alike = [d for d, n in known.items() if name and n.split("/")[-1] == name.split("/")[-1]]
    meant = [d for d in alike if known[d] == name] or alike or list(known)
    alive = [d for d in meant if d in in_service]
    try:
        found = made.for_adapter(name).digest[0]
    except AmbiguousBase:
        assert len(meant) > 1 and len(alive) != 1
    else:
        assert meant == [found] or alive == [found]


# Over the wire


@pytest.fixture
async def two(cache: Cache) -> AsyncIterator[tuple[FakeEngine, FakeEngine]]:
    engines = engine_of(cache, "one", ONE), engine_of(cache, "two", TWO)
    for engine in engines:
        await engine.attach()
    yield engines
    for engine in engines:
        engine.leave()


def engine_of(cache: Cache, name: str, digest: str, **fields: Any) -> FakeEngine:
    return FakeEngine(cache.residency, engine_id=f"engine-{name}", base_digest=digest, base_model=name, **fields)


async def preload(cache: Cache, adapter_id: str, tier: pb.Tier.ValueType = pb.TIER_DEVICE) -> None:
    await cache.adapters.PreloadAdapter(pb.PreloadAdapterRequest(adapter_id=adapter_id, tier=tier), timeout=10)


async def test_the_same_files_are_an_adapter_of_each_base(cache: Cache, two: tuple[FakeEngine, FakeEngine]) -> None:
    folder = write_adapter(cache.root / "a")
    ours = await register(cache, "ours", folder, base_model="one")
    theirs = await register(cache, "theirs", folder, base_model=TWO)
    assert (ours.base_digest, ours.base_name, ours.base_model) == (ONE, "one", "tiny")
    assert (theirs.base_digest, theirs.base_name) == (TWO, "two")
    assert ours.digest != theirs.digest
    for adapter_id in ("ours", "theirs"):
        await preload(cache, adapter_id)
    assert [list(engine.resident) for engine in two] == [[ours.digest], [theirs.digest]]


async def test_an_adapter_that_names_its_base_needs_no_other_word(
    cache: Cache, two: tuple[FakeEngine, FakeEngine]
) -> None:
    for own, digest in (("one", ONE), ("org/two", TWO)):
        folder = write_adapter(cache.root / own, base_model_name_or_path=own)
        assert (await register(cache, digest[0], folder)).base_digest == digest
        # Once more, from what is known of the source
        assert (await register(cache, f"again-{digest[0]}", folder)).base_digest == digest
        # What the caller says goes before
        other = TWO if digest == ONE else ONE
        assert (await register(cache, f"other-{digest[0]}", folder, base_model=other)).base_digest == other


async def test_bases_that_may_be_meant_or_are_unknown_are_named(
    cache: Cache, two: tuple[FakeEngine, FakeEngine]
) -> None:
    known = f"one ({ONE[:12]}), two ({TWO[:12]})"
    for _ in range(2):
        error = await refused(register(cache))
        assert (code_of(error), error.reason) == (Code.INVALID_ARGUMENT, "AMBIGUOUS_BASE")
        assert error.metadata == {"field": "base_model", "known_bases": known}
    error = await refused(register(cache, base_model="three"))
    assert (code_of(error), error.reason) == (Code.INVALID_ARGUMENT, "NO_SUCH_BASE")
    assert error.metadata == {"field": "base_model", "base_model": "three", "known_bases": known}
    assert not (await cache.adapters.ListAdapters(pb.ListAdaptersRequest())).adapters
    # What was refused for its choice is taken once there is one
    two[0].leave()
    await eventually(lambda: len(cache.manager.devices.engines) == 1)
    assert (await register(cache)).base_digest == TWO


async def test_an_engine_is_never_told_to_load_an_adapter_of_another_base(
    cache: Cache, two: tuple[FakeEngine, FakeEngine]
) -> None:
    one, other = two
    folder = write_adapter(cache.root / "a")
    ours = await register(cache, "ours", folder, base_model="one", pinned=True)
    theirs = await register(cache, "theirs", folder, base_model="two")
    await eventually(lambda: ours.digest in one.resident)
    # A wish without an engine finds the right one, however much room another has
    ask = residency_pb2.PrefetchRequest(digest=theirs.digest)
    await cache.residency.Prefetch(ask)
    await eventually(lambda: theirs.digest in other.resident)
    ask = residency_pb2.PrefetchRequest(digest=ours.digest, engine_id="engine-two")
    error = await refused(cache.residency.Prefetch(ask))
    assert error.reason == "BASE_MISMATCH" and error.metadata == {"registered": ONE, "engine": TWO}
    queue = [residency_pb2.ExpectedUse(digest=ours.digest, engine_id="engine-two")]
    await cache.residency.LookAhead(residency_pb2.LookAheadRequest(router_id="r", expected=queue))
    await other.want(ours.digest)
    await eventually(lambda: bool(other.refusals))
    assert [refusal.reason for refusal in other.refusals] == ["BASE_MISMATCH"]
    assert [load.digest for load in other.loads] == [theirs.digest] and list(one.resident) == [ours.digest]


async def test_preloading_waits_for_engines_of_the_adapters_base_only(
    cache: Cache, two: tuple[FakeEngine, FakeEngine]
) -> None:
    one, other = two
    other.automatic = False
    ours = await register(cache, "ours", base_model="one")
    await preload(cache, "ours")
    assert list(one.resident) == [ours.digest] and not other.loads
    one.leave()
    await eventually(lambda: len(cache.manager.devices.engines) == 1)
    assert (await refused(preload(cache, "ours"))).reason == "NO_ENGINE"
    # Without an engine of its base, half of the way can be gone
    await preload(cache, "ours", pb.TIER_HOST)
    await cache.residency.Prefetch(residency_pb2.PrefetchRequest(digest=ours.digest))
    assert not other.loads and not other.refusals


async def test_two_number_types_of_a_base_and_another_base_live_side_by_side(cache: Cache) -> None:
    engines = [
        engine_of(cache, "one", ONE),
        FakeEngine(cache.residency, "engine-half", base_digest=ONE, base_model="one", dtype="bfloat16"),
        engine_of(cache, "two", TWO, dtype="bfloat16"),
    ]
    for engine in engines:
        await engine.attach()
    ours, theirs = [await register(cache, name, base_model=name) for name in ("one", "two")]
    for adapter_id in ("one", "two"):
        await preload(cache, adapter_id)
    assert [list(engine.resident) for engine in engines] == [[ours.digest], [ours.digest], [theirs.digest]]
    for engine in engines:
        engine.leave()


async def test_bases_are_known_after_a_restart_and_on_other_nodes(store: Store, tmp_path: Path) -> None:
    async with serve_cache(store.url, tmp_path / "a", "node-0") as first:
        engine = engine_of(first, "one", ONE)
        await engine.attach()
        async with serve_cache(store.url, tmp_path / "b", "node-1") as second:
            # The other node has no engine, and hears of a base when it is first asked for
            late = engine_of(first, "two", TWO)
            await late.attach()
            folder = write_adapter(second.root / "a")
            assert (await register(second, "theirs", folder, base_model="two")).base_digest == TWO
            await eventually(lambda: "theirs" in first.manager.view.records)
            error = await refused(register(second, "unsaid", folder))
            assert error.reason == "AMBIGUOUS_BASE"
            late.leave()
        engine.leave()
    async with serve_cache(store.url, tmp_path / "a", "node-0") as cache:
        assert {each.name for each in cache.manager.link.bases} == {"one", "two"}
        adapter = (await cache.adapters.GetAdapter(pb.GetAdapterRequest(adapter_id="theirs"))).adapter
        assert (adapter.base_digest, adapter.base_name) == (TWO, "two")


async def test_what_engines_of_other_nodes_serve_decides_as_well(store: Store, tmp_path: Path) -> None:
    async with serve_cache(store.url, tmp_path / "a", "node-0") as first:
        one, two = engine_of(first, "one", ONE), engine_of(first, "two", TWO)
        async with serve_cache(store.url, tmp_path / "b", "node-1") as second:
            await one.attach()
            await two.attach()
            link = second.manager.link
            await eventually(lambda: link.bases.state().endswith(f"in service: {ONE} {TWO}"))
            assert (await refused(register(second))).reason == "AMBIGUOUS_BASE"
            one.leave()
            await eventually(lambda: link.bases.state().endswith(f"in service: {TWO}"))
            assert (await register(second)).base_digest == TWO
            two.leave()


async def test_a_base_that_nobody_uses_any_more_is_not_in_the_way(cache: Cache) -> None:
    for name, digest in (("one", ONE), ("two", TWO)):
        engine = engine_of(cache, name, digest)
        await engine.attach()
        if name == "one":
            engine.leave()
            await eventually(lambda: not cache.manager.devices.engines)
    assert (await register(cache, "a")).base_digest == TWO
    # But it can be named
    assert (await register(cache, "b", base_model="one")).base_digest == ONE
    # And with an adapter of its own it is one of those that may be meant
    assert (await refused(register(cache, "c"))).reason == "AMBIGUOUS_BASE"
    engine.leave()


async def test_a_registry_of_one_base_goes_on_working(store: Store, tmp_path: Path) -> None:
    """What a cache wrote that could keep one base only: the key `base`, and records with or without its digest."""
    async with serve_cache(store.url, tmp_path) as cache:
        engine = engine_of(cache, "one", ONE)
        await engine.attach()
        digests = [(await register(cache, name)).digest for name in ("said", "unsaid")]
        engine.leave()
    raw: Any = redis.asyncio.Redis.from_url(store.url, decode_responses=True)
    former = base("one", ONE)
    unsaid = json.loads(await raw.hget("loraplex:{test}:adapters", "unsaid"))
    del unsaid["base_digest"]
    await raw.hset("loraplex:{test}:adapters", "unsaid", json.dumps(unsaid))
    await raw.delete("loraplex:{test}:bases")
    await raw.set("loraplex:{test}:base", json.dumps(asdict(former)))
    async with serve_cache(store.url, tmp_path) as cache:
        assert [each.digest for each in cache.manager.link.bases] == [ONE]
        engine = engine_of(cache, "one", ONE)
        await engine.attach()
        for name, digest in zip(("said", "unsaid"), digests, strict=True):
            await preload(cache, name)
            assert digest in engine.resident
        assert (await register(cache, "new")).base_digest == ONE
        other = engine_of(cache, "two", TWO)
        await other.attach()
        assert not await raw.exists("loraplex:{test}:base")
        assert set(await raw.hkeys("loraplex:{test}:bases")) == {ONE, TWO}
        engine.leave()
        other.leave()
    await raw.aclose()


async def test_while_redis_is_away_only_engines_of_known_bases_attach(store: Store, tmp_path: Path) -> None:
    async with serve_cache(store.url, tmp_path) as cache:
        known = engine_of(cache, "one", ONE)
        await known.attach()
        known.leave()
        await eventually(lambda: not cache.manager.devices.engines)
        store.kill()
        await engine_of(cache, "one", ONE).attach()
        assert (await refused(engine_of(cache, "two", TWO).attach())).reason == "REGISTRY_UNREACHABLE"
        await asyncio.to_thread(store.start)
        await eventually(lambda: cache.manager.link.reachable, 10)
        await engine_of(cache, "two", TWO).attach()
