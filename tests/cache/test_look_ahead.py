"""Look-ahead over the wire: queued adapters stay, leases end, tenants keep to their share, one cold adapter loads once."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from cache import wire
from cache.metrics import FETCHES, LOADS
from loraplex.cache.v1 import residency_pb2
from loraplex.v1 import adapter_pb2 as pb
from tests.cache.conftest import Cache, FakeEngine, Store, eventually
from tests.cache.test_loads import device, lose_everywhere, prefetch, served, some
from tests.cache.test_service import get, refused


async def look_ahead(cache: Cache, *digests: str, router_id: str = "router-0", tenant: str = "") -> None:
    expected = [
        residency_pb2.ExpectedUse(digest=digest, waited_ms=1000 - number, tenant=tenant)
        for number, digest in enumerate(digests)
    ]
    await cache.residency.LookAhead(residency_pb2.LookAheadRequest(router_id=router_id, expected=expected))


async def room_for(cache: Cache, engine: FakeEngine, count: int) -> None:
    size = count * (await get(cache, "a0")).size_bytes
    device(cache).budget_bytes = engine.budget = size


async def test_what_waits_in_a_queue_is_kept_however_long_ago_it_was_used(module_store: Store, tmp_path: Path) -> None:
    async with served(module_store, tmp_path) as (cache, engine, _):
        digests = await some(cache, 4)
        await room_for(cache, engine, 2)
        for digest in digests[:2]:
            await engine.use(digest)
            await engine.want(digest)
            await eventually(lambda digest=digest: digest in engine.resident)  # type: ignore[misc]
        # The older one waits in a queue: the newer goes
        await look_ahead(cache, digests[0], "f" * 64)
        await engine.use(digests[2])
        await engine.want(digests[2])
        await eventually(lambda: engine.resident.keys() == {digests[0], digests[2]})
        # Used and still queued, it is kept; queued no more, it is like any other
        await engine.use(digests[0], digests[2])
        await engine.use(digests[2])
        await engine.use()
        await engine.use(digests[3])
        await engine.want(digests[3])
        await eventually(lambda: engine.resident.keys() == {digests[0], digests[3]})
        await look_ahead(cache)
        await engine.use(digests[3], digests[1])
        await engine.want(digests[1])
        await eventually(lambda: engine.resident.keys() == {digests[1], digests[3]})


async def test_a_lease_of_a_router_that_is_gone_ends(
    module_store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with served(module_store, tmp_path) as (cache, engine, _):
        digests = await some(cache, 2)
        await room_for(cache, engine, 1)
        monkeypatch.setattr(wire, "LOOK_AHEAD_SECONDS", 0.2)
        await look_ahead(cache, digests[0])
        await eventually(lambda: digests[0] in engine.resident)
        await asyncio.sleep(0.3)
        monkeypatch.undo()
        await look_ahead(cache, digests[1], router_id="router-1")
        await eventually(lambda: engine.resident.keys() == {digests[1]})
        assert device(cache).expected.keys() == {digests[1]}


async def test_a_router_must_say_who_it_is(module_store: Store, tmp_path: Path) -> None:
    async with served(module_store, tmp_path) as (cache, _, _slow):
        error = await refused(cache.residency.LookAhead(residency_pb2.LookAheadRequest()))
        assert error.metadata["field"] == "router_id"


async def test_a_tenant_beyond_its_share_pushes_out_its_own_adapters(module_store: Store, tmp_path: Path) -> None:
    async with served(module_store, tmp_path) as (cache, engine, _):
        digests = await some(cache, 6)
        await room_for(cache, engine, 4)
        device(cache).tenant_share = 0.5
        await look_ahead(cache, digests[0], tenant="small")
        await eventually(lambda: digests[0] in engine.resident)
        # A tenant goes through many adapters, each once
        for digest in digests[1:]:
            await look_ahead(cache, digest, tenant="large")
            await eventually(lambda digest=digest: digest in engine.resident)  # type: ignore[misc]
            await engine.use(digest)
            await engine.use()
        assert digests[0] in engine.resident and len(engine.evictions) == 2


async def test_a_thousand_who_want_one_cold_adapter_are_one_fetch_and_one_load(
    module_store: Store, tmp_path: Path
) -> None:
    async with served(module_store, tmp_path) as (cache, engine, slow):
        [digest] = await some(cache, 1)
        await lose_everywhere(cache, digest)
        fetches, loads = FETCHES.labels("ok")._value.get(), LOADS._value.get()
        reads = slow.reads
        slow.go_on.clear()
        preload = pb.PreloadAdapterRequest(adapter_id="a0", tier=pb.TIER_DEVICE)
        calls = [cache.adapters.PreloadAdapter(preload, timeout=30) for _ in range(500)]
        asking = asyncio.gather(*(prefetch(cache, digest) for _ in range(500)))
        await engine.use(digest)
        await engine.want(digest)
        await asking
        slow.go_on.set()
        answers = await asyncio.gather(*calls)
        assert all(any(r.tier == pb.TIER_DEVICE for r in answer.adapter.residency) for answer in answers)
        assert slow.reads == reads + 1 and len(engine.loads) == 1
        assert LOADS._value.get() == loads + 1
        assert FETCHES.labels("ok")._value.get() == fetches + 1


async def test_what_was_preloaded_and_deleted_is_not_loaded_again(module_store: Store, tmp_path: Path) -> None:
    async with served(module_store, tmp_path) as (cache, engine, _):
        [digest] = await some(cache, 1)
        await cache.adapters.PreloadAdapter(pb.PreloadAdapterRequest(adapter_id="a0", tier=pb.TIER_DEVICE))
        await cache.adapters.DeleteAdapter(pb.DeleteAdapterRequest(adapter_id="a0"))
        await eventually(lambda: digest not in engine.resident and digest not in device(cache).device)
        await asyncio.sleep(0.3)
        assert [load.digest for load in engine.loads] == [digest]
        assert device(cache).expected == {}


async def test_a_version_that_requests_queue_for_outlives_its_adapter(module_store: Store, tmp_path: Path) -> None:
    async with served(module_store, tmp_path) as (cache, engine, _):
        [digest] = await some(cache, 1)
        await look_ahead(cache, digest)
        await eventually(lambda: digest in engine.resident)
        await cache.adapters.DeleteAdapter(pb.DeleteAdapterRequest(adapter_id="a0"))
        await asyncio.sleep(0.3)
        assert digest in engine.resident and len(engine.loads) == 1
        # Its requests have gone: so may it
        await look_ahead(cache)
        await eventually(lambda: digest not in engine.resident)
        assert len(engine.loads) == 1
