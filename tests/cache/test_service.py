"""The cache over the wire, on a real Valkey and on the oldest Redis served, with an engine that obeys."""

from __future__ import annotations

import asyncio
import shutil
import time
from pathlib import Path
from typing import Any

import grpc
import pytest
from safetensors.numpy import load_file

from cache.tiers import ArtifactKey
from loraplex.cache.v1 import residency_pb2
from loraplex.v1 import adapter_pb2 as pb
from servicekit.errors import Code, ServiceError, code_of
from servicekit.status import from_rpc_error
from tests.cache.conftest import Cache, FakeEngine, Store, eventually, make_tensors, serve_cache, write_adapter


async def register(cache: Cache, adapter_id: str = "a", folder: Path | None = None, **fields: Any) -> pb.Adapter:
    folder = folder or write_adapter(cache.root / adapter_id)
    request = pb.RegisterAdapterRequest(adapter_id=adapter_id, source_uri=f"file://{folder}", **fields)
    return (await cache.adapters.RegisterAdapter(request, timeout=20)).adapter


async def get(cache: Cache, adapter_id: str = "a") -> pb.Adapter:
    return (await cache.adapters.GetAdapter(pb.GetAdapterRequest(adapter_id=adapter_id), timeout=20)).adapter


async def refused(call: Any) -> ServiceError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return from_rpc_error(caught.value)


def other(cache: Cache, name: str, seed: int = 1) -> Path:
    return write_adapter(cache.root / name, make_tensors(seed=seed))


def lose(cache: Cache, digest: str) -> None:
    """The file on disk is gone, and the host tier has given it up."""
    key = ArtifactKey(digest, "float32")
    cache.manager.holdings.unstage(key)
    cache.manager.holdings.disk.path(key).unlink()


def tiers(adapter: pb.Adapter) -> set[int]:
    return {residency.tier for residency in adapter.residency}


async def test_a_registered_adapter_is_known_and_in_the_host_tier(cache: Cache, engine: FakeEngine) -> None:
    adapter = await register(cache, weight=2.0)
    assert len(adapter.digest) == 64 and adapter.rank == 4 and adapter.method == "lora" and adapter.weight == 2.0
    assert adapter.base_model == "tiny" and list(adapter.target_modules) == ["q_proj"]
    assert tiers(adapter) == {pb.TIER_DISK, pb.TIER_HOST}
    assert await get(cache) == adapter


async def test_the_same_content_again_is_the_same_version(cache: Cache, engine: FakeEngine) -> None:
    first = await register(cache)
    again = await register(cache)
    assert again == first
    changed = await register(cache, folder=other(cache, "a2"))
    assert changed.digest != first.digest and (await get(cache)).digest == changed.digest


async def test_an_adapter_tells_who_uses_it_when_it_was_used_and_what_is_wrong_with_it(
    cache: Cache, engine: FakeEngine
) -> None:
    adapter = await register(cache)
    assert not adapter.leases and not adapter.HasField("last_use_time") and not adapter.HasField("failure")
    await engine.use(adapter.digest)
    await eventually(lambda: adapter.digest in cache.manager.link.last_use)
    used = await get(cache)
    assert [(lease.node_id, lease.engine_id) for lease in used.leases] == [("node-0", "engine-0")]
    assert abs(used.last_use_time.seconds - time.time()) < 5
    await engine.use()
    # Its file is lost, and its source holds something else by now.
    lose(cache, adapter.digest)
    other(cache, "a", seed=5)
    await engine.use(adapter.digest)
    await engine.want(adapter.digest)
    await eventually(lambda: bool(engine.refusals))
    broken = await get(cache)
    assert broken.state == pb.Adapter.STATE_FAILED and broken.failure.reason == "SOURCE_CHANGED"
    assert 0 < broken.failure.retry_time.ToMilliseconds() / 1000 - time.time() < 5


async def test_an_expected_digest_must_match(cache: Cache, engine: FakeEngine) -> None:
    digest = (await register(cache)).digest
    assert (await register(cache, "b", cache.root / "a", expected_digest=digest)).digest == digest
    error = await refused(register(cache, "c", cache.root / "a", expected_digest="0" * 64))
    assert error.reason == "DIGEST_MISMATCH" and error.metadata["found"] == digest


async def test_without_a_base_nothing_can_be_validated(cache: Cache) -> None:
    for base_model in ("", "tiny"):
        error = await refused(register(cache, base_model=base_model))
        assert (code_of(error), error.reason) == (Code.UNAVAILABLE, "BASE_UNKNOWN")


@pytest.mark.parametrize(
    "fields, field",
    [
        ({"adapter_id": ""}, "adapter_id"),
        ({"adapter_id": "../x"}, "adapter_id"),
        ({"adapter_id": "x" * 129}, "adapter_id"),
        ({"weight": 0.0}, "weight"),
        ({"weight": float("nan")}, "weight"),
        ({"weight": 1001.0}, "weight"),
        ({"expected_digest": "xyz"}, "expected_digest"),
        ({"source_uri": "file:///etc"}, "source_uri"),
        ({"source_uri": "hf://owner/name"}, "source_uri"),
    ],
)
async def test_a_wrong_field_is_named(cache: Cache, engine: FakeEngine, fields: dict[str, Any], field: str) -> None:
    folder = write_adapter(cache.root / "a")
    request = pb.RegisterAdapterRequest(**{"adapter_id": "a", "source_uri": f"file://{folder}", **fields})
    error = await refused(cache.adapters.RegisterAdapter(request))
    assert error.metadata["field"] == field
    assert (await register(cache)).adapter_id == "a"


async def test_lists_come_in_pages(cache: Cache, engine: FakeEngine) -> None:
    folder = write_adapter(cache.root / "x")
    for number in range(5):
        await register(cache, f"a{number}", folder)
    seen, token = [], ""
    while True:
        page = await cache.adapters.ListAdapters(pb.ListAdaptersRequest(page_size=2, page_token=token))
        seen += [adapter.adapter_id for adapter in page.adapters]
        if not (token := page.next_page_token):
            break
    assert seen == [f"a{number}" for number in range(5)]
    for request in (
        pb.ListAdaptersRequest(page_size=-1),
        pb.ListAdaptersRequest(page_token="?"),
        pb.ListAdaptersRequest(page_size=1001),
    ):
        assert (await refused(cache.adapters.ListAdapters(request))).metadata["field"].startswith("page_")


async def test_what_is_wanted_is_loaded_from_shared_memory(cache: Cache, engine: FakeEngine) -> None:
    digest = (await register(cache)).digest
    await engine.want(digest)
    await eventually(lambda: digest in engine.resident)
    packed = load_file(engine.resident[digest])
    assert "model.layers.0.self_attn.q_proj.A" in packed
    await eventually(lambda: cache.manager.devices.engines["engine-0"].resident == [digest])
    adapter = await get(cache)
    assert pb.TIER_DEVICE in tiers(adapter)
    assert [r.engine_id for r in adapter.residency if r.tier == pb.TIER_DEVICE] == ["engine-0"]


async def test_two_hundred_prefetches_are_one_load(cache: Cache, engine: FakeEngine) -> None:
    digest = (await register(cache)).digest
    request = residency_pb2.PrefetchRequest(digest=digest, engine_id="engine-0")
    await asyncio.gather(*(cache.residency.Prefetch(request) for _ in range(200)))
    await eventually(lambda: digest in engine.resident)
    assert len(engine.loads) == 1
    assert (
        await refused(cache.residency.Prefetch(residency_pb2.PrefetchRequest(digest="f" * 64)))
    ).reason == "VERSION_NOT_FOUND"


async def test_a_full_device_gives_up_what_was_not_used_for_longest_and_never_what_is_in_use(
    cache: Cache, engine: FakeEngine
) -> None:
    digests = [(await register(cache, f"a{n}", other(cache, f"f{n}", seed=n))).digest for n in range(4)]
    size = (await get(cache, "a0")).size_bytes
    cache.manager.devices.engines["engine-0"].budget_bytes = 2 * size
    # Given two on the device, the older one in use
    for digest in digests[:2]:
        await engine.want(digest)
        await eventually(lambda digest=digest: digest in engine.resident)  # type: ignore[misc]
    await engine.use(digests[0])
    # When a third is wanted, the unused one goes
    await engine.want(digests[2])
    await eventually(lambda: digests[2] in engine.resident)
    assert engine.resident.keys() == {digests[0], digests[2]}
    # And with both in use, the fourth waits until one is free
    await engine.use(digests[0], digests[2])
    await engine.want(digests[3])
    await asyncio.sleep(0.1)
    assert digests[3] not in engine.resident
    await engine.use(digests[2], digests[3])
    await eventually(lambda: digests[3] in engine.resident)
    assert engine.resident.keys() == {digests[2], digests[3]}


async def test_what_is_in_use_all_the_time_is_popular_by_each_request(cache: Cache, engine: FakeEngine) -> None:
    digests = [(await register(cache, f"a{n}", other(cache, f"f{n}", seed=n))).digest for n in range(3)]
    busy, rare, third = digests
    cache.manager.devices.engines["engine-0"].budget_bytes = 2 * (await get(cache, "a0")).size_bytes
    for digest in (busy, rare):
        await engine.want(digest)
        await eventually(lambda digest=digest: digest in engine.resident)  # type: ignore[misc]
    # Many requests of one are counted though it comes into use only once
    await engine.use(busy, begun={busy: 1})
    await engine.use(busy, begun={busy: 8})
    await engine.use(rare, begun={rare: 2})
    await engine.use()
    await engine.want(third)
    await eventually(lambda: third in engine.resident)
    assert engine.resident.keys() == {busy, third}


async def test_an_engine_that_miscounts_is_told_so(cache: Cache, engine: FakeEngine) -> None:
    await engine.use(begun={"d": -1})
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await engine.task
    error = from_rpc_error(caught.value)
    assert (code_of(error), error.reason) == (Code.INVALID_ARGUMENT, "OUT_OF_RANGE") and "in_use.begun" in error.message


async def test_an_adapter_too_large_for_the_device_is_refused(cache: Cache, engine: FakeEngine) -> None:
    digest = (await register(cache)).digest
    cache.manager.devices.engines["engine-0"].budget_bytes = 10
    await engine.want(digest)
    await eventually(lambda: bool(engine.refusals))
    assert engine.refusals[0].reason == "ADAPTER_TOO_LARGE"


async def test_a_wanted_version_nobody_knows_is_refused(cache: Cache, engine: FakeEngine) -> None:
    await engine.want("e" * 64)
    await eventually(lambda: bool(engine.refusals))
    assert engine.refusals[0].reason == "VERSION_NOT_FOUND" and engine.refusals[0].code == 5


async def test_pinned_and_preloaded_adapters_come_to_the_device(cache: Cache, engine: FakeEngine) -> None:
    pinned = await register(cache, "p", other(cache, "p"), pinned=True)
    await eventually(lambda: pinned.digest in engine.resident)
    await register(cache, "b", other(cache, "b", seed=5))
    preloaded = await cache.adapters.PreloadAdapter(
        pb.PreloadAdapterRequest(adapter_id="b", tier=pb.TIER_DEVICE), timeout=5
    )
    assert pb.TIER_DEVICE in tiers(preloaded.adapter)
    error = await refused(cache.adapters.PreloadAdapter(pb.PreloadAdapterRequest(adapter_id="b")))
    assert error.metadata["field"] == "tier"


async def test_update_changes_pin_and_weight_but_not_the_version(cache: Cache, engine: FakeEngine) -> None:
    before = await register(cache)
    after = (await cache.adapters.UpdateAdapter(pb.UpdateAdapterRequest(adapter_id="a", weight=3.0))).adapter
    assert after.weight == 3.0 and after.digest == before.digest and after.create_time == before.create_time
    assert (
        await refused(cache.adapters.UpdateAdapter(pb.UpdateAdapterRequest(adapter_id="zz")))
    ).reason == "ADAPTER_NOT_FOUND"


async def test_deletion_waits_for_running_sequences_unless_forced(cache: Cache, engine: FakeEngine) -> None:
    digest = (await register(cache)).digest
    await engine.want(digest)
    await eventually(lambda: digest in engine.resident)
    await engine.use(digest)
    deletion = asyncio.ensure_future(cache.adapters.DeleteAdapter(pb.DeleteAdapterRequest(adapter_id="a")))
    await eventually(lambda: cache.manager.view.records["a"].state == "draining")
    assert (await get(cache)).state == pb.Adapter.STATE_DRAINING
    assert not deletion.done()
    await engine.use()
    await deletion
    assert (await refused(get(cache))).reason == "ADAPTER_NOT_FOUND"
    # Its bytes are given back everywhere
    await eventually(lambda: not engine.resident)
    await eventually(lambda: not cache.manager.holdings.host.sizes() and not cache.manager.holdings.disk.sizes())

    digest = (await register(cache)).digest
    await engine.want(digest)
    await eventually(lambda: digest in engine.resident)
    await engine.use(digest)
    await cache.adapters.DeleteAdapter(pb.DeleteAdapterRequest(adapter_id="a", force=True), timeout=5)
    assert engine.evictions[-1].force


async def test_watchers_see_a_snapshot_and_then_every_change(cache: Cache, engine: FakeEngine) -> None:
    await register(cache)
    call: Any = cache.adapters.WatchAdapters(pb.WatchAdaptersRequest())
    kinds = pb.AdapterEvent
    assert (await call.read()).kind == kinds.KIND_SNAPSHOT
    assert (await call.read()).kind == kinds.KIND_SNAPSHOT_END
    changed = await register(cache, folder=other(cache, "a2"))
    event = await call.read()
    assert event.kind == kinds.KIND_REGISTERED and event.adapter.digest == changed.digest
    await engine.want(changed.digest)
    while pb.TIER_DEVICE not in tiers(event.adapter):
        event = await call.read()
        assert event.kind in (kinds.KIND_RESIDENCY, kinds.KIND_REGISTERED)
    await cache.adapters.DeleteAdapter(pb.DeleteAdapterRequest(adapter_id="a"))
    while event.kind != kinds.KIND_DELETED:
        event = await call.read()
    call.cancel()


async def test_an_engine_that_comes_back_keeps_what_it_has(cache: Cache, engine: FakeEngine) -> None:
    digest = (await register(cache)).digest
    await engine.want(digest)
    await eventually(lambda: digest in engine.resident)
    engine.leave()
    await eventually(lambda: not cache.manager.devices.engines)
    assert pb.TIER_DEVICE not in tiers(await get(cache))
    again = FakeEngine(cache.residency, resident=engine.resident)
    await again.attach()
    assert pb.TIER_DEVICE in tiers(await get(cache))
    assert not again.loads
    again.leave()


async def test_redis_killed_serving_goes_on_and_nothing_is_lost(cache: Cache, engine: FakeEngine, store: Store) -> None:
    digest = (await register(cache)).digest
    store.kill()
    # Lookups, watches and loads go on; registrations are refused at once
    assert (await get(cache)).digest == digest
    began = time.monotonic()
    error = await refused(register(cache, "b"))
    assert error.reason == "REGISTRY_UNREACHABLE" and time.monotonic() - began < 2
    await engine.want(digest)
    await eventually(lambda: digest in engine.resident)
    # Back again, with its data
    store.start()
    await eventually(lambda: cache.manager.link.reachable)
    assert (await register(cache, "b")).adapter_id == "b"
    assert (await get(cache)).digest == digest


async def test_a_redis_that_comes_back_empty_gets_the_adapters_back(
    cache: Cache, engine: FakeEngine, store: Store
) -> None:
    digest = (await register(cache)).digest
    store.kill()
    shutil.rmtree(store.folder / "appendonlydir")
    await eventually(lambda: not cache.manager.link.reachable, 10)
    store.start()
    await eventually(lambda: cache.manager.link.reachable)
    record = await cache.manager.link.registry.read("a")
    assert record is not None and record.digest == digest


async def test_a_restarted_cache_finds_adapters_and_files(store: Store, tmp_path: Path) -> None:
    async with serve_cache(store.url, tmp_path) as cache:
        engine = FakeEngine(cache.residency)
        await engine.attach()
        digest = (await register(cache)).digest
        engine.leave()
    shutil.rmtree(tmp_path / "root")
    async with serve_cache(store.url, tmp_path) as cache:
        assert tiers(await get(cache)) == {pb.TIER_DISK, pb.TIER_HOST}
        engine = FakeEngine(cache.residency)
        await engine.attach()
        await engine.want(digest)
        await eventually(lambda: digest in engine.resident)
        engine.leave()


async def test_a_lost_file_is_read_from_its_source_again(cache: Cache, engine: FakeEngine) -> None:
    digest = (await register(cache)).digest
    lose(cache, digest)
    await engine.want(digest)
    await eventually(lambda: digest in engine.resident)


async def test_a_source_that_changed_meanwhile_is_not_taken_for_the_version(cache: Cache, engine: FakeEngine) -> None:
    digest = (await register(cache)).digest
    write_adapter(cache.root / "a", make_tensors(seed=9))
    lose(cache, digest)
    await engine.want(digest)
    await eventually(lambda: bool(engine.refusals))
    assert engine.refusals[0].reason == "SOURCE_CHANGED"


async def test_two_caches_share_one_registry(store: Store, tmp_path: Path) -> None:
    async with serve_cache(store.url, tmp_path) as one, serve_cache(store.url, tmp_path, "node-1") as two:
        engines = [FakeEngine(one.residency), FakeEngine(two.residency, engine_id="engine-1")]
        for engine in engines:
            await engine.attach()
        digest = (await register(one)).digest
        await eventually(lambda: "a" in two.manager.view.records)
        await engines[1].want(digest)
        await eventually(lambda: digest in engines[1].resident)
        await eventually(lambda: any(node == "node-1" for node, *_ in one.manager.residency(digest)))
        await two.adapters.DeleteAdapter(pb.DeleteAdapterRequest(adapter_id="a"))
        await eventually(lambda: "a" not in one.manager.view.records)
        for engine in engines:
            engine.leave()
