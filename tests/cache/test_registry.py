"""Agreement with Redis: deletions that outlive their caller, lost hints, a frozen Redis, other nodes."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cache import registry_link
from cache.keys import Keys
from cache.registry import AdapterRecord, Beat, NodeState, Registry
from cache.tiers import ArtifactKey
from cache.view import View
from cache.watchers import Change
from loraplex.v1 import adapter_pb2 as pb
from tests.cache.conftest import Cache, FakeEngine, Store, eventually, make_tensors, serve_cache, write_adapter
from tests.cache.test_service import get, refused, register, tiers


def delete(cache: Cache, force: bool = False) -> Any:
    return asyncio.ensure_future(cache.adapters.DeleteAdapter(pb.DeleteAdapterRequest(adapter_id="a", force=force)))


async def in_use(cache: Cache, engine: FakeEngine) -> str:
    digest = (await register(cache)).digest
    await engine.use(digest)
    await engine.want(digest)
    await eventually(lambda: digest in engine.resident)
    return digest


async def draining(cache: Cache) -> None:
    await eventually(lambda: cache.manager.view.records["a"].state == "draining")


async def test_a_deletion_goes_on_when_its_caller_has_gone(cache: Cache, engine: FakeEngine) -> None:
    await in_use(cache, engine)
    deletion = delete(cache)
    await draining(cache)
    deletion.cancel()
    await engine.use()
    await eventually(lambda: not cache.manager.view.records)


async def test_a_deletion_goes_on_after_a_restart(store: Store, tmp_path: Path) -> None:
    async with serve_cache(store.url, tmp_path) as cache:
        engine = FakeEngine(cache.residency)
        await engine.attach()
        await in_use(cache, engine)
        deletion = delete(cache)
        await draining(cache)
        engine.leave()
    await asyncio.gather(deletion, return_exceptions=True)
    async with serve_cache(store.url, tmp_path) as cache:
        await eventually(lambda: not cache.manager.view.records)


async def test_a_change_meanwhile_does_not_stop_a_deletion(cache: Cache, engine: FakeEngine) -> None:
    await in_use(cache, engine)
    deletion = delete(cache)
    await draining(cache)
    await cache.adapters.UpdateAdapter(pb.UpdateAdapterRequest(adapter_id="a", weight=2.0))
    await engine.use()
    await deletion
    assert (await refused(get(cache))).reason == "ADAPTER_NOT_FOUND"


async def test_an_adapter_registered_anew_while_it_is_being_deleted_lives_on(cache: Cache, engine: FakeEngine) -> None:
    await in_use(cache, engine)
    deletion = delete(cache)
    await draining(cache)
    again = await register(cache, folder=write_adapter(cache.root / "new", make_tensors(seed=3)))
    await engine.use()
    await deletion
    found = await get(cache)
    assert found.digest == again.digest and found.state == pb.Adapter.STATE_ACTIVE


async def test_with_force_sequences_that_still_wait_are_ended_too(cache: Cache, engine: FakeEngine) -> None:
    engine.automatic = False
    digest = (await register(cache)).digest
    await engine.use(digest)
    await engine.want(digest)
    await eventually(lambda: bool(engine.loads))
    await delete(cache, force=True)
    await eventually(lambda: bool(engine.evictions))
    assert engine.evictions[0].force and engine.evictions[0].digest == digest
    # The load that was under way ends after all; nobody needs it, and it is given back
    await engine.use()
    await engine.finish(engine.loads[0])
    await eventually(lambda: len(engine.evictions) == 2 and not engine.resident)


async def test_a_deletion_waits_for_sequences_on_other_nodes(store: Store, tmp_path: Path) -> None:
    async with serve_cache(store.url, tmp_path) as one, serve_cache(store.url, tmp_path, "node-1") as two:
        # Engines of the same name on two nodes are two engines
        engines = [FakeEngine(one.residency), FakeEngine(two.residency)]
        for engine in engines:
            await engine.attach()
        digest = (await register(one)).digest
        await eventually(lambda: "a" in two.manager.view.records)
        await engines[1].use(digest)
        await eventually(lambda: digest in one.manager.link.leases_elsewhere)
        deletion = delete(one)
        await eventually(lambda: two.manager.view.records["a"].state == "draining")
        assert not deletion.done()
        await engines[1].use()
        await asyncio.wait_for(deletion, 10)
        await eventually(lambda: not two.manager.view.records)
        for engine in engines:
            engine.leave()


async def test_a_change_without_a_hint_is_noticed_by_the_next_heartbeat(
    cache: Cache, engine: FakeEngine, store: Store
) -> None:
    await register(cache)
    stranger = Registry(store.url, "test")
    record = await stranger.read("a")
    assert record is not None
    keys = stranger._adapter_keys
    changed = replace(record, weight=7.0)
    # Written by hand: the revision counts it, nobody is told
    pipeline = stranger._redis.pipeline(transaction=True)
    pipeline.hset(keys[0], "a", changed.to_json())
    pipeline.incr(keys[1])
    await pipeline.execute()
    await eventually(lambda: cache.manager.view.records["a"].weight == 7.0)
    # And with a hint at once
    again = await stranger.read("a")
    began = time.monotonic()
    assert again is not None and (await stranger.put(replace(again, weight=8.0), again))[0]
    await eventually(lambda: cache.manager.view.records["a"].weight == 8.0)
    assert time.monotonic() - began < 0.5
    await stranger.close()


async def test_a_redis_that_went_back_in_time_gets_what_it_has_forgotten(
    cache: Cache, engine: FakeEngine, store: Store
) -> None:
    await register(cache)
    await register(cache, "b", cache.root / "a")
    stranger = Registry(store.url, "test")
    before = await stranger.read("b")
    assert before is not None
    await cache.adapters.UpdateAdapter(pb.UpdateAdapterRequest(adapter_id="b", weight=5.0))
    # As after a restart from an older snapshot: the registration of a and the change of b never were
    pipeline = stranger._redis.pipeline(transaction=True)
    pipeline.hdel(stranger._adapter_keys[0], "a")
    pipeline.hset(stranger._adapter_keys[0], "b", before.stored)
    pipeline.set(stranger._adapter_keys[1], 1)
    await pipeline.execute()
    await asyncio.sleep(0.5)
    records = (await stranger.load()).records
    assert records.keys() == {"a", "b"} and records["b"].weight == 5.0
    assert set(cache.manager.view.records) == {"a", "b"}
    await eventually(lambda: cache.manager.link.reachable)
    assert await register(cache, "c", cache.root / "a")
    await stranger.close()


async def test_a_record_that_cannot_be_read_harms_no_other(cache: Cache, engine: FakeEngine, store: Store) -> None:
    await register(cache)
    stranger = Registry(store.url, "test")
    for text in ("{", "[]", '{"adapter_id": "x"}'):
        await stranger._redis.hset(stranger._adapter_keys[0], "x", text)
        await stranger._redis.publish(Keys("test").events, "not even JSON")
        await cache.manager.link.reconcile()
        assert set(cache.manager.view.records) == {"a"}
    # A field of tomorrow is kept out of the way
    record = await stranger.read("a")
    assert record is not None
    assert AdapterRecord.from_json(record.stored.replace("{", '{"novelty": 1, ', 1)) == record
    await stranger.close()


async def test_a_write_that_replaces_something_else_is_not_made(store: Store) -> None:
    registry = Registry(store.url, "test")
    record = AdapterRecord("a", "file:///a", "d", "base", "lora", 4, 1, False, 1.0, 0, "", ("q_proj",))
    revision, first = await registry.put(record, None)
    assert revision == 1 and (await registry.put(replace(record, weight=2.0), None))[0] == 0
    assert (await registry.put(replace(record, weight=2.0), first))[0] == 2
    assert await registry.delete(first) == 0
    second = await registry.read("a")
    assert second is not None and second.weight == 2.0 and await registry.delete(second) == 3
    assert (await registry.load()).records == {}
    await registry.close()


def beat(
    node_id: str,
    held: dict[str, list[str]] | None = None,
    renewed: Iterable[tuple[str, str]] = (),
    ended: Iterable[tuple[str, str]] = (),
    used: Iterable[str] = (),
    since_ms: int = 0,
) -> Beat:
    state = NodeState("", "run", 0, held or {})
    return Beat(node_id, state, frozenset(renewed), frozenset(ended), frozenset(used), since_ms)


async def test_leases_end_when_they_are_given_back_and_when_their_owner_is_silent(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cache.registry.NODE_TTL_MS", 300)
    registry = Registry(store.url, "test")
    mine, yours = ("n0/e", "d0"), ("n1/e", "d1")
    await registry.heartbeat(beat("n1", {"d1": ["disk"]}, renewed=[yours], used=["d1"]))
    pulse = await registry.heartbeat(beat("n0", renewed=[mine]))
    assert pulse.leases == {mine, yours} and pulse.nodes["n1"].held == {"d1": ["disk"]}
    assert pulse.last_use.keys() == {"d1"} and 0 <= pulse.now_ms - pulse.last_use["d1"] < 300
    assert (await registry.heartbeat(beat("n0", ended=[mine], since_ms=pulse.now_ms + 1))).leases == {yours}
    await asyncio.sleep(0.4)
    # What the dead held is taken back by the living
    pulse = await registry.heartbeat(beat("n0", renewed=[mine]))
    assert pulse.leases == {mine} and pulse.nodes.keys() == {"n0"}
    await registry.close()


async def test_a_frozen_redis_is_a_lost_one(cache: Cache, engine: FakeEngine, store: Store) -> None:
    digest = (await register(cache)).digest
    assert store.process is not None
    os.kill(store.process.pid, signal.SIGSTOP)
    try:
        began = time.monotonic()
        error = await refused(register(cache, "b"))
        assert error.reason == "REGISTRY_UNREACHABLE" and time.monotonic() - began < 3
        assert (await get(cache)).digest == digest
        await eventually(lambda: not cache.manager.link.reachable)
        began = time.monotonic()
        assert (await refused(register(cache, "b"))).reason == "REGISTRY_UNREACHABLE"
        assert time.monotonic() - began < 0.5
    finally:
        os.kill(store.process.pid, signal.SIGCONT)
    await eventually(lambda: cache.manager.link.reachable, 10)
    assert await register(cache, "b")


async def test_a_watch_goes_on_while_redis_is_away(cache: Cache, engine: FakeEngine, store: Store) -> None:
    digest = (await register(cache)).digest
    call: Any = cache.adapters.WatchAdapters(pb.WatchAdaptersRequest())
    assert [(await call.read()).kind for _ in range(2)] == [
        pb.AdapterEvent.KIND_SNAPSHOT,
        pb.AdapterEvent.KIND_SNAPSHOT_END,
    ]
    store.kill()
    await engine.want(digest)
    event = await call.read()
    while pb.TIER_DEVICE not in tiers(event.adapter):
        event = await call.read()
    store.start()
    await eventually(lambda: cache.manager.link.reachable)
    await register(cache, "b")
    while event.kind != pb.AdapterEvent.KIND_REGISTERED:
        event = await call.read()
    assert event.adapter.adapter_id == "b"
    call.cancel()


async def test_files_of_the_host_tier_are_used_again_and_strays_removed(store: Store, tmp_path: Path) -> None:
    async with serve_cache(store.url, tmp_path) as cache:
        engine = FakeEngine(cache.residency)
        await engine.attach()
        key = ArtifactKey((await register(cache)).digest, "float32")
        path = cache.manager.shelf.host.path(key)
        inode = path.stat().st_ino
        (path.parent / "stray").write_text("x")
        (path.parent / f"{'e' * 64}.float32.safetensors").write_text("half")
        engine.leave()
    async with serve_cache(store.url, tmp_path) as cache:
        assert path.stat().st_ino == inode
        assert {each.name for each in path.parent.iterdir()} == {path.name, f"{path.name}.sha256"}


def test_a_slow_watcher_holds_one_change_per_adapter() -> None:
    view = View()
    watcher = view.watch()
    record = AdapterRecord("a", "file:///a", "d", "base", "lora", 4, 1, False, 1.0, 0, "", ("q_proj",))
    for weight in range(1000):
        view.take(replace(record, weight=float(weight)))
        view.residency_changed(["d"])
    assert [(event.change, event.record.weight) for event in watcher._pending.values() if event.record] == [
        (Change.REGISTERED, 999.0)
    ]
    view.forget("a")
    assert [event.change for event in watcher._pending.values()] == [Change.DELETED]


def test_moved_digests_are_those_whose_tiers_differ() -> None:
    before = {"n0": {"a": ["disk"], "b": ["disk"]}, "n1": {"c": ["host"]}}
    after = {"n0": {"a": ["disk"], "b": ["disk", "host"]}, "n2": {"d": ["disk"]}}
    assert registry_link._moved_digests(before, after) == {"b", "c", "d"}
