"""Room and who gets it: budgets of all tiers, look-ahead, callers who go away, engines that differ or misbehave."""

from __future__ import annotations

import asyncio
import contextlib
import random
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import ml_dtypes
import pytest
from safetensors.numpy import load_file

from cache.artifact import AdapterFiles
from cache.engines import LOOK_AHEAD_SECONDS
from cache.residency import Place
from cache.sources import FileSource
from cache.tiers import ArtifactKey
from loraplex.cache.v1 import residency_pb2
from loraplex.v1 import adapter_pb2 as pb
from tests.cache.conftest import (
    Cache,
    FakeEngine,
    Store,
    eventually,
    make_tensors,
    serve_cache,
    write_adapter,
)
from tests.cache.test_service import get, refused, register, tiers

SIZE = 2_000


class SlowSource(FileSource):
    """A source that can be held up."""

    def __init__(self, root: Path) -> None:
        super().__init__([root], 1 << 24)
        self.go_on, self.reads = threading.Event(), 0
        self.go_on.set()

    def read(self, source_uri: str) -> AdapterFiles:
        self.reads += 1
        assert self.go_on.wait(10)
        return super().read(source_uri)


@contextlib.asynccontextmanager
async def served(store: Store, folder: Path, **sizes: Any) -> AsyncIterator[tuple[Cache, FakeEngine, SlowSource]]:
    async with serve_cache(store.url, folder, **sizes) as cache:
        slow = cache.manager.builder.source = SlowSource(cache.root)
        engine = FakeEngine(cache.residency)
        await engine.attach()
        yield cache, engine, slow
        slow.go_on.set()
        for adapter_id in list(cache.manager.view.records):
            await cache.adapters.DeleteAdapter(pb.DeleteAdapterRequest(adapter_id=adapter_id, force=True))
        engine.leave()


async def some(cache: Cache, count: int, **fields: Any) -> list[str]:
    folders = [write_adapter(cache.root / f"f{n}", make_tensors(seed=n)) for n in range(count)]
    adapters = await asyncio.gather(*(register(cache, f"a{n}", folder, **fields) for n, folder in enumerate(folders)))
    return [adapter.digest for adapter in adapters]


def device(cache: Cache) -> Any:
    return cache.manager.devices.engines["engine-0"]


async def prefetch(cache: Cache, digest: str, engine_id: str = "engine-0") -> None:
    await cache.residency.Prefetch(residency_pb2.PrefetchRequest(digest=digest, engine_id=engine_id))


async def lose_everywhere(cache: Cache, digest: str) -> None:
    key = ArtifactKey(digest, "float32")
    cache.manager.holdings.unstage(key)
    cache.manager.holdings.disk.path(key).unlink()


async def test_a_caller_who_goes_away_takes_nobodys_load_with_him(module_store: Store, tmp_path: Path) -> None:
    async with served(module_store, tmp_path) as (cache, engine, slow):
        [digest] = await some(cache, 1)
        await lose_everywhere(cache, digest)
        slow.go_on.clear()
        request = pb.PreloadAdapterRequest(adapter_id="a0", tier=pb.TIER_HOST)
        calls = [cache.adapters.PreloadAdapter(request, timeout=10) for _ in range(20)]
        await engine.want(digest)
        await eventually(lambda: slow.reads == 2)
        for call in calls[:10]:
            call.cancel()
        await asyncio.sleep(0.05)
        slow.go_on.set()
        answers = await asyncio.gather(*calls[10:])
        assert all(pb.TIER_HOST in tiers(answer.adapter) for answer in answers)
        await eventually(lambda: digest in engine.resident)
        # Once at registration, once for everybody
        assert slow.reads == 2


async def test_the_host_tier_keeps_its_budget_whatever_is_asked_at_once(module_store: Store, tmp_path: Path) -> None:
    async with served(module_store, tmp_path, host_bytes=5 * SIZE) as (cache, _, _slow):
        folder, worst = cache.manager.holdings.host.folder, 0
        registering = asyncio.ensure_future(some(cache, 24))
        while not registering.done():
            worst = max(worst, sum(path.stat().st_size for path in folder.glob("*.safetensors")))
            await asyncio.sleep(0.001)
        digests = await registering
        assert worst <= 5 * SIZE
        # What was given up is said so, and comes back when it is asked for
        adapters = [await get(cache, f"a{n}") for n in range(24)]
        gone = [adapter for adapter in adapters if pb.TIER_HOST not in tiers(adapter)]
        assert 0 < len(gone) < 24 and len(set(digests)) == 24
        again = pb.PreloadAdapterRequest(adapter_id=gone[0].adapter_id, tier=pb.TIER_HOST)
        assert pb.TIER_HOST in tiers((await cache.adapters.PreloadAdapter(again)).adapter)


async def test_a_disk_full_of_what_is_pinned_refuses_the_next_one_and_nobody_else(
    module_store: Store, tmp_path: Path
) -> None:
    async with served(module_store, tmp_path, disk_bytes=2 * SIZE) as (cache, engine, _):
        digests = await some(cache, 2, pinned=True)
        error = await refused(register(cache, "x", write_adapter(cache.root / "x", make_tensors(seed=9))))
        assert error.reason == "TIER_FULL" and error.metadata["tier"] == "disk"
        await engine.want(*digests)
        await eventually(lambda: engine.resident.keys() == set(digests))
        await cache.adapters.DeleteAdapter(pb.DeleteAdapterRequest(adapter_id="a0"))
        await eventually(lambda: len(cache.manager.holdings.disk.sizes()) == 1)
        assert await register(cache, "x", cache.root / "x")


async def test_an_adapter_larger_than_shared_memory_is_refused(module_store: Store, tmp_path: Path) -> None:
    async with served(module_store, tmp_path, host_bytes=100) as (cache, _, _slow):
        error = await refused(register(cache))
        assert error.reason == "ADAPTER_TOO_LARGE" and error.metadata["tier"] == "host"
        await eventually(lambda: not cache.manager.holdings.disk.sizes())


async def test_look_ahead_pushes_out_no_look_ahead_but_a_waiting_sequence_does(
    module_store: Store, tmp_path: Path
) -> None:
    async with served(module_store, tmp_path) as (cache, engine, _):
        digests = await some(cache, 4)
        device(cache).budget_bytes = engine.budget = 2 * (await get(cache, "a0")).size_bytes
        for digest in digests[:2]:
            await prefetch(cache, digest)
        await eventually(lambda: engine.resident.keys() == set(digests[:2]))
        # A third wish waits: the first two were not used yet
        await prefetch(cache, digests[2])
        await asyncio.sleep(0.1)
        assert engine.resident.keys() == set(digests[:2]) and not engine.evictions
        # A sequence does not
        await engine.use(digests[3])
        await engine.want(digests[3])
        await eventually(lambda: digests[3] in engine.resident)
        # It goes, and its place is again for who was first; once that one was used, it is for the third
        await engine.use()
        await eventually(lambda: engine.resident.keys() == set(digests[:2]))
        await engine.use(digests[0])
        await engine.use()
        await eventually(lambda: engine.resident.keys() == set(digests[1:3]))
        assert LOOK_AHEAD_SECONDS > 1


async def test_look_ahead_without_an_engine_goes_half_the_way(module_store: Store, tmp_path: Path) -> None:
    async with served(module_store, tmp_path) as (cache, _, _slow):
        [digest] = await some(cache, 1)
        key = ArtifactKey(digest, "float32")
        cache.manager.holdings.unstage(key)
        await prefetch(cache, digest, "engine-that-is-not-there")
        await eventually(lambda: cache.manager.holdings.place(key) is Place.HOST)


async def test_a_sequence_that_went_away_wants_nothing(module_store: Store, tmp_path: Path) -> None:
    async with served(module_store, tmp_path) as (cache, engine, _):
        digests = await some(cache, 2)
        device(cache).budget_bytes = engine.budget = (await get(cache, "a0")).size_bytes
        await engine.use(digests[0])
        await engine.want(digests[0])
        await eventually(lambda: digests[0] in engine.resident)
        await engine.use(*digests)
        await engine.want(digests[1])
        await engine.use(digests[0])
        await engine.use()
        await eventually(lambda: not device(cache).in_use)
        await asyncio.sleep(0.05)
        assert len(engine.loads) == 1 and not engine.evictions


async def test_what_is_pinned_and_too_large_is_not_refused_over_and_over(module_store: Store, tmp_path: Path) -> None:
    async with served(module_store, tmp_path) as (cache, engine, _):
        device(cache).budget_bytes = 10
        await some(cache, 1, pinned=True)
        for _ in range(10):
            await engine.use()
        error = await refused(
            cache.adapters.PreloadAdapter(pb.PreloadAdapterRequest(adapter_id="a0", tier=pb.TIER_DEVICE), timeout=5)
        )
        assert error.reason == "ADAPTER_TOO_LARGE" and error.metadata["tier"] == "device"
        await eventually(lambda: len(engine.refusals) == 1)


async def test_an_engine_of_another_number_type_gets_its_own_artifact(module_store: Store, tmp_path: Path) -> None:
    async with served(module_store, tmp_path) as (cache, engine, _):
        [digest] = await some(cache, 1)
        half = FakeEngine(cache.residency, engine_id="engine-1", dtype="bfloat16")
        await half.attach()
        for each in (engine, half):
            await each.want(digest)
            await eventually(lambda each=each: digest in each.resident)  # type: ignore[misc]
        assert all(tensor.dtype == ml_dtypes.bfloat16 for tensor in load_file(half.resident[digest]).values())
        assert engine.resident[digest] != half.resident[digest]
        half.leave()


async def test_an_engine_that_cannot_run_the_rank_is_not_sent_it(module_store: Store, tmp_path: Path) -> None:
    async with served(module_store, tmp_path) as (cache, _, _slow):
        [digest] = await some(cache, 1)
        small = FakeEngine(cache.residency, engine_id="engine-1", max_rank=2)
        await small.attach()
        await small.want(digest)
        await eventually(lambda: bool(small.refusals))
        assert small.refusals[0].reason == "RANK_TOO_LARGE" and not small.loads
        small.leave()


async def test_two_engines_of_one_name_cannot_be_attached(module_store: Store, tmp_path: Path) -> None:
    async with served(module_store, tmp_path) as (cache, _, _slow):
        error = await refused(FakeEngine(cache.residency).attach())
        assert error.reason == "ENGINE_ATTACHED"
        assert list(cache.manager.devices.engines) == ["engine-0"]


async def test_an_engine_that_says_nonsense_is_told_so_and_forgotten(module_store: Store, tmp_path: Path) -> None:
    async with served(module_store, tmp_path) as (cache, engine, _):
        await engine.say(description=residency_pb2.EngineDescription(engine_id="engine-0"))
        with pytest.raises(grpc.aio.AioRpcError) as ended:
            await engine.task
        assert ended.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        await eventually(lambda: not cache.manager.devices.engines)
        await engine.attach()


async def test_an_engine_is_believed_about_its_device(module_store: Store, tmp_path: Path) -> None:
    async with served(module_store, tmp_path) as (cache, engine, _):
        [digest] = await some(cache, 1)
        # Begun for a cache that has gone: nobody asked this one
        await engine.say(loaded=residency_pb2.ArtifactLoaded(digest=digest, device_bytes=SIZE))
        await eventually(lambda: device(cache).resident == [digest])
        await engine.say(loaded=residency_pb2.ArtifactLoaded(digest=digest, device_bytes=SIZE))
        await engine.say(evicted=residency_pb2.ArtifactEvicted(digest=digest, evicted=True))
        await eventually(lambda: not device(cache).resident)
        await engine.say(evicted=residency_pb2.ArtifactEvicted(digest=digest, evicted=False))
        await engine.want(digest)
        await eventually(lambda: digest in engine.resident)


async def test_a_load_that_fails_is_refused_with_its_reason_and_tried_again_later(
    module_store: Store, tmp_path: Path
) -> None:
    async with served(module_store, tmp_path) as (cache, engine, _):
        engine.automatic = False
        [digest] = await some(cache, 1)
        await engine.use(digest)
        await engine.want(digest)
        await eventually(lambda: bool(engine.loads))
        failed = residency_pb2.ArtifactLoadFailed(digest=digest, reason="OUT_OF_MEMORY", message="no room")
        await engine.say(load_failed=failed)
        await eventually(lambda: bool(engine.refusals))
        assert engine.refusals[0].reason == "OUT_OF_MEMORY"
        # At once it is refused again, without another load
        await engine.want(digest)
        await eventually(lambda: len(engine.refusals) == 2)
        assert len(engine.loads) == 1
        engine.automatic = True
        await asyncio.sleep(1.3)
        await engine.want(digest)
        await eventually(lambda: digest in engine.resident)


async def test_whatever_happens_nothing_is_loaded_that_is_not_there_or_does_not_fit(
    module_store: Store, tmp_path: Path
) -> None:
    """The fake engine asserts that every file it is told to load is whole, and that its device is never overcommitted."""
    dice = random.Random(7)
    async with served(module_store, tmp_path, host_bytes=6 * SIZE) as (cache, engine, _):
        digests = await some(cache, 12)
        device(cache).budget_bytes = engine.budget = 4 * (await get(cache, "a0")).size_bytes
        for _ in range(150):
            match dice.randrange(4):
                case 0:
                    await prefetch(cache, dice.choice(digests))
                case 1:
                    waiting = dice.sample(digests, dice.randint(1, 3))
                    await engine.use(*waiting)
                    await engine.want(*(digest for digest in waiting if digest not in engine.resident))
                case 2:
                    await engine.use()
                case 3:
                    await asyncio.sleep(dice.choice((0, 0.005)))
        await engine.use(digests[0])
        await engine.want(digests[0])
        await eventually(lambda: digests[0] in engine.resident)
        # Both agree about the device once everything is said
        await eventually(lambda: set(device(cache).resident) == engine.resident.keys())
        assert not engine.task.done()
