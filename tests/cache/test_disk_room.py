"""A disk with too little room for all adapters, over the wire: all are served, and nothing goes that could not come back."""

from __future__ import annotations

import asyncio
import ipaddress
import random
import time
from collections.abc import AsyncIterator, Coroutine, Iterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from cache import disk_room
from cache.artifact import digest_of
from cache.builder import Builder, Origin
from cache.holdings import ON_DISK
from cache.residency import Place
from cache.sources import FileSource, Limits, Sources
from cache.sources.download import Downloads
from cache.sources.web import WebSource
from cache.tiers import ArtifactKey
from loraplex.v1 import adapter_pb2 as pb
from tests.cache.conftest import (
    BASE,
    Cache,
    FakeEngine,
    Store,
    binary_of,
    eventually,
    make_tensors,
    serve_cache,
    write_adapter,
)
from tests.cache.stand_ins import Web, serving
from tests.cache.test_service import get, refused, register, tiers

# What an adapter that make_tensors makes takes packed.
SIZE = 1536
WEIGHTS = "adapter_model.safetensors"
LOOPBACK = [ipaddress.ip_network("127.0.0.0/8")]


@pytest.fixture
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    server = Store(binary_of("valkey"), tmp_path_factory.mktemp("s"))
    server.start()
    yield server
    server.kill()


@pytest.fixture
def web() -> Iterator[Web]:
    with serving(Web(token="right")) as server:
        yield server


@asynccontextmanager
async def served(store: Store, folder: Path, room: int, device: int = 2) -> AsyncIterator[tuple[Cache, FakeEngine]]:
    """A cache whose disk has room for so many adapters, as an engine's device has, with file:// and http:// sources."""
    limits = Limits(1, 2, 10, 1 << 24, 4)
    source = WebSource(Downloads(folder / "downloads"), limits, LOOPBACK)
    (folder / "root").mkdir()
    sources = Sources({"file": FileSource([folder / "root"], 1 << 24), "https": source, "http": source}, limits)
    async with serve_cache(store.url, folder, disk_bytes=room * SIZE, source=sources) as cache:
        engine = FakeEngine(cache.residency, budget=device * SIZE)
        await engine.attach()
        yield cache, engine
        engine.leave()
    await sources.close()


def folder_of(cache: Cache, number: int, seed: int | None = None) -> Path:
    return write_adapter(cache.root / f"f{number}", make_tensors(seed=number if seed is None else seed))


async def some(cache: Cache, numbers: range, **fields: Any) -> list[str]:
    """Registers adapters from folders, one after another; returns their digests."""
    made = [await register(cache, f"a{n}", folder_of(cache, n), **fields) for n in numbers]
    return [adapter.digest for adapter in made]


async def from_web(cache: Cache, web: Web, adapter_id: str, at: str, seed: int, token: str = "") -> str:
    folder = write_adapter(cache.folder / adapter_id, make_tensors(seed=seed))
    web.put(folder, at)
    digest = digest_of(FileSource([cache.folder], 1 << 24).read(f"file://{folder}"), BASE)
    request = pb.RegisterAdapterRequest(
        adapter_id=adapter_id,
        source_uri=f"{web.url}{at}",
        expected_digest=digest,
        credentials=pb.SourceCredentials(token=token),
    )
    await cache.adapters.RegisterAdapter(request, timeout=20)
    return digest


async def use(engine: FakeEngine, digest: str) -> None:
    """A sequence uses a version and ends."""
    await engine.use(digest)
    if digest not in engine.resident:
        await engine.want(digest)
    await eventually(lambda: digest in engine.resident)
    assert digest.encode() in Path(engine.resident[digest]).read_bytes()[:4096]  # noqa: ASYNC240
    await engine.use()


def on_disk(cache: Cache, digest: str) -> bool:
    return cache.manager.holdings.disk.path(ArtifactKey(digest, "float32")).exists()


def watching(cache: Cache) -> tuple[asyncio.Task[None], list[int]]:
    """Looks at the disk all the time; the most bytes of artifacts, finished or not, that were there without checksums."""
    worst = [0]

    def size_of(path: Path) -> int:
        with suppress(FileNotFoundError):
            return path.stat().st_size
        return 0

    def is_checksum(size: int) -> bool:
        return size == 64

    async def look() -> None:
        while True:
            sizes = [size_of(path) for path in cache.manager.holdings.disk.folder.iterdir()]
            worst[0] = max(worst[0], sum(size for size in sizes if not is_checksum(size)))
            await asyncio.sleep(0.001)

    return asyncio.create_task(look()), worst


async def test_more_adapters_than_fit_are_all_served_and_the_disk_keeps_its_quota(store: Store, tmp_path: Path) -> None:
    async with served(store, tmp_path, room=5) as (cache, engine):
        looking, worst = watching(cache)
        digests = await some(cache, range(16))
        for digest in digests * 2:
            await use(engine, digest)
        looking.cancel()
        assert not engine.refusals and worst[0] == 5 * SIZE
        # Everyone is told what is where
        listed = [await get(cache, f"a{n}") for n in range(16)]
        assert all((pb.TIER_DISK in tiers(adapter)) == on_disk(cache, adapter.digest) for adapter in listed)
        assert sum(on_disk(cache, digest) for digest in digests) == 5


async def test_what_is_pinned_in_use_or_of_a_callers_own_right_stays(store: Store, tmp_path: Path, web: Web) -> None:
    async with served(store, tmp_path, room=6) as (cache, engine):
        [pinned] = await some(cache, range(100, 101), pinned=True)
        private = await from_web(cache, web, "private", "/private/a", 101, token="right")
        [used] = await some(cache, range(102, 103))
        await engine.use(used)
        await engine.want(used)
        web.asked.clear()
        plain = await some(cache, range(8))
        for adapter_id in ("a0", "a1", "a2"):
            await cache.adapters.PreloadAdapter(pb.PreloadAdapterRequest(adapter_id=adapter_id, tier=pb.TIER_DISK))
        assert all(on_disk(cache, digest) for digest in (pinned, private, used))
        assert not all(on_disk(cache, digest) for digest in plain)
        # Without a right there is nothing to ask
        assert not web.asked


async def test_a_disk_full_of_what_must_stay_refuses_and_goes_on_serving(store: Store, tmp_path: Path) -> None:
    async with served(store, tmp_path, room=3, device=4) as (cache, engine):
        digests = await some(cache, range(3), pinned=True)
        error = await refused(register(cache, "x", folder_of(cache, 9)))
        assert error.reason == "TIER_FULL" and error.metadata["tier"] == "disk"
        for digest in digests:
            assert on_disk(cache, digest)
        await use(engine, digests[2])
        # Only what is not pinned any more makes room
        await cache.adapters.UpdateAdapter(pb.UpdateAdapterRequest(adapter_id="a1", pinned=False))
        assert await register(cache, "x", cache.root / "f9")
        assert [on_disk(cache, digest) for digest in digests] == [True, False, True]


async def test_a_folder_that_holds_something_else_by_now_could_not_come_back(store: Store, tmp_path: Path) -> None:
    async with served(store, tmp_path, room=3) as (cache, engine):
        changed, gone, whole = await some(cache, range(3))
        folder_of(cache, 0, seed=50)
        (cache.root / "f1").rename(cache.root / "away")
        await some(cache, range(3, 6))
        assert on_disk(cache, changed) and on_disk(cache, gone) and not on_disk(cache, whole)
        for digest in (changed, gone):
            await use(engine, digest)
        # It changes after it went: the version is lost, and that is said
        folder_of(cache, 2, seed=51)
        await engine.use(whole)
        await engine.want(whole)
        await eventually(lambda: bool(engine.refusals))
        assert engine.refusals[0].reason == "SOURCE_CHANGED"


async def test_a_web_server_is_asked_before_anything_of_it_goes(store: Store, tmp_path: Path, web: Web) -> None:
    async with served(store, tmp_path, room=3) as (cache, engine):
        there = await from_web(cache, web, "there", "/there", 100)
        gone = await from_web(cache, web, "gone", "/gone", 101)
        other = await from_web(cache, web, "other", "/other", 102)
        del web.files[f"/gone/{WEIGHTS}"]
        web.put(write_adapter(tmp_path / "changed", make_tensors(seed=103)), "/other")
        web.asked.clear()
        await some(cache, range(3))
        assert not on_disk(cache, there) and on_disk(cache, gone) and on_disk(cache, other)
        # Asked, not read
        assert web.asked and not web.bodies()
        await use(engine, there)
        assert len(web.bodies(WEIGHTS)) == 1


async def test_a_web_server_that_hangs_keeps_nobody_waiting_long(
    store: Store, tmp_path: Path, web: Web, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk_room, "CONFIRM_SECONDS", 0.2)
    async with served(store, tmp_path, room=2) as (cache, _):
        silent = await from_web(cache, web, "silent", "/silent", 100)
        [plain] = await some(cache, range(1))
        web.busy = 1000
        await some(cache, range(1, 2))
        assert on_disk(cache, silent) and not on_disk(cache, plain)


async def test_what_is_shared_comes_back_by_whose_right_is_not_needed(store: Store, tmp_path: Path, web: Web) -> None:
    """Two adapters of one version: one registered with its caller's right, the other from where anyone may read."""
    async with served(store, tmp_path, room=2) as (cache, engine):
        digest = await from_web(cache, web, "private", "/private/a", 100, token="right")
        assert await from_web(cache, web, "open", "/a", 100) == digest
        await some(cache, range(3))
        assert not on_disk(cache, digest)
        await use(engine, digest)
        assert cache.manager.holdings.place(ArtifactKey(digest, "float32")) is Place.HOST


async def test_whatever_is_asked_at_once_the_quota_is_kept_and_everyone_is_served(store: Store, tmp_path: Path) -> None:
    dice = random.Random(3)
    async with served(store, tmp_path, room=6, device=3) as (cache, engine):
        pinned = await some(cache, range(100, 102), pinned=True)
        looking, worst = watching(cache)
        digests = await some(cache, range(12))

        async def preload(n: int) -> None:
            tier = dice.choice((pb.TIER_DISK, pb.TIER_HOST))
            await cache.adapters.PreloadAdapter(pb.PreloadAdapterRequest(adapter_id=f"a{n}", tier=tier), timeout=20)

        for _ in range(30):
            calls: list[Coroutine[Any, Any, object]] = [preload(n) for n in dice.sample(range(12), 6)]
            calls += [register(cache, f"a{n}", folder_of(cache, n)) for n in dice.sample(range(12), 1)]
            using = dice.choice(digests)
            await engine.use(using)
            await engine.want(using)
            # Who finds no room waits for those who are on their way.
            await asyncio.gather(*calls)
            await engine.use()
        looking.cancel()
        assert not engine.refusals
        assert worst[0] <= 6 * SIZE and all(on_disk(cache, digest) for digest in pinned)
        assert cache.manager.holdings.disk.sizes().keys() == {key for key, _ in cache.manager.holdings.at(ON_DISK)}


async def test_many_who_wait_for_room_do_not_wait_for_one_question_after_another(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    confirm = Builder.confirm

    async def slowly(builder: Builder, digest: str, origin: Origin) -> None:
        await asyncio.sleep(0.5)
        await confirm(builder, digest, origin)

    monkeypatch.setattr(Builder, "confirm", slowly)
    async with served(store, tmp_path, room=8) as (cache, _):
        await some(cache, range(16))
        away = [n for n in range(16) if pb.TIER_DISK not in tiers(await get(cache, f"a{n}"))]
        calls = [pb.PreloadAdapterRequest(adapter_id=f"a{n}", tier=pb.TIER_DISK) for n in away]
        began = time.monotonic()
        await asyncio.gather(*(cache.adapters.PreloadAdapter(call, timeout=20) for call in calls))
        assert len(calls) == 8 and time.monotonic() - began < 8 * 0.5
