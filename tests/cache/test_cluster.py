"""Several caches on one Redis: one fetch for all, rights checked for each caller, and news that travel fast."""

from __future__ import annotations

import asyncio
import ipaddress
import re
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
import redis
from redis.crc import key_slot

from cache import flights
from cache.flights import Flights
from cache.keys import Keys
from cache.redis_url import connect, without_password
from cache.registry import SCRIPTS, Registry
from cache.sources import Limits, Sources
from cache.sources.download import Downloads
from cache.sources.web import WebSource
from cache.tiers import ArtifactKey
from loraplex.v1 import adapter_pb2 as pb
from servicekit.errors import Code, StartupError, code_of
from tests.cache.conftest import (
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
from tests.cache.test_process import free_port
from tests.cache.test_service import refused

WEIGHTS = "adapter_model.safetensors"
LOOPBACK = [ipaddress.ip_network("127.0.0.0/8")]


@pytest.fixture
def web(tmp_path: Path) -> Iterator[Web]:
    with serving(Web(token="right")) as server:
        server.put(write_adapter(tmp_path / "adapter"), "/private/a")
        yield server


@asynccontextmanager
async def node(store: Store, folder: Path, number: int, **sizes: Any) -> AsyncIterator[tuple[Cache, FakeEngine]]:
    limits = Limits(1, 2, 10, 1 << 24, 4)
    web = WebSource(Downloads(folder / f"downloads-{number}"), limits, LOOPBACK)
    sources = Sources({"https": web, "http": web}, limits)
    async with serve_cache(store.url, folder, f"node-{number}", source=sources, **sizes) as cache:
        engine = FakeEngine(cache.residency, f"engine-{number}")
        await engine.attach()
        yield cache, engine
        engine.leave()
    await sources.close()


async def digest_at(web: Web, folder: Path) -> str:
    """The digest that a source's adapter has, asked of a cache that was told another."""
    with tempfile.TemporaryDirectory(prefix="lpx") as short:
        alone = Store(binary_of("valkey"), Path(short))
        alone.start()
        async with node(alone, folder / "alone", 9) as (cache, _):
            with pytest.raises(grpc.aio.AioRpcError) as refusal:
                await register(cache, web, "probe", "0" * 64)
            found = re.search(r"digest is ([0-9a-f]{64})", refusal.value.details() or "")
        alone.kill()
    assert found is not None
    web.asked.clear()
    return found[1]


async def register(cache: Cache, web: Web, adapter_id: str, digest: str, token: str = "right") -> pb.Adapter:
    request = pb.RegisterAdapterRequest(
        adapter_id=adapter_id,
        source_uri=f"{web.url}/private/a",
        expected_digest=digest,
        credentials=pb.SourceCredentials(token=token),
    )
    return (await cache.adapters.RegisterAdapter(request)).adapter


async def test_two_nodes_one_redis_one_registration_one_fetch(store: Store, tmp_path: Path, web: Web) -> None:
    digest = await digest_at(web, tmp_path)
    async with AsyncExitStack() as stack:
        (one, first), (two, second) = [await stack.enter_async_context(node(store, tmp_path, n)) for n in (1, 2)]
        await register(one, web, "poet", digest)
        assert len(web.bodies(WEIGHTS)) == 1
        await eventually(lambda: "poet" in two.manager.view.records and bool(two.manager.link.addresses))
        await asyncio.gather(first.want(digest), second.want(digest))
        await eventually(lambda: digest in first.resident and digest in second.resident)
        # The bytes came from the first node, not from the source.
        assert len(web.bodies(WEIGHTS)) == 1
        files = [cache.manager.holdings.host.path(ArtifactKey(digest, "float32")) for cache in (one, two)]
        assert files[0] != files[1] and files[0].read_bytes() == files[1].read_bytes()


async def test_many_callers_on_two_nodes_read_a_source_once_and_each_is_asked_for_the_right(
    store: Store, tmp_path: Path, web: Web
) -> None:
    digest = await digest_at(web, tmp_path)
    async with AsyncExitStack() as stack:
        caches = [(await stack.enter_async_context(node(store, tmp_path, n)))[0] for n in (1, 2)]
        await eventually(lambda: all(cache.manager.link.addresses for cache in caches))
        callers = [register(caches[n % 2], web, f"poet-{n}", digest) for n in range(20)]
        assert {adapter.digest for adapter in await asyncio.gather(*callers)} == {digest}
        assert len(web.bodies(WEIGHTS)) == 1
        for cache in caches:
            for token in ("", "wrong"):
                error = await refused(register(cache, web, "thief", digest, token))
                assert code_of(error) is Code.PERMISSION_DENIED and error.reason == "SOURCE_FORBIDDEN"
        # Taken away since: the one who had it has it no longer.
        web.token = "another"
        assert (await refused(register(caches[0], web, "late", digest))).reason == "SOURCE_FORBIDDEN"


async def test_no_secret_reaches_redis_the_files_or_a_message(store: Store, tmp_path: Path, web: Web) -> None:
    web.token = "very-s3cret"
    digest = "0" * 64
    async with node(store, tmp_path, 1) as (cache, _):
        with pytest.raises(grpc.aio.AioRpcError) as refusal:
            await register(cache, web, "poet", digest, "very-s3cret")
        assert "very-s3cret" not in str(refusal.value)
    written = [path.read_bytes() for path in [*tmp_path.rglob("*"), *store.folder.rglob("*")] if path.is_file()]  # noqa: ASYNC240
    assert written and not any(b"very-s3cret" in content for content in written)


async def test_a_broken_adapter_is_not_read_again_to_say_the_same(store: Store, tmp_path: Path, web: Web) -> None:
    web.files[f"/private/a/{WEIGHTS}"] = b"not safetensors at all"
    async with node(store, tmp_path, 1) as (cache, _):
        for _ in range(3):
            error = await refused(register(cache, web, "poet", "0" * 64))
            assert code_of(error) is Code.INVALID_ARGUMENT and error.reason == "MALFORMED_SAFETENSORS"
        assert len(web.bodies(WEIGHTS)) == 1
        # Mended at the source, it is another revision.
        web.put(write_adapter(tmp_path / "mended", make_tensors(seed=3)), "/private/a")
        assert (await refused(register(cache, web, "poet", "0" * 64))).reason == "DIGEST_MISMATCH"


async def test_what_moves_on_one_node_is_known_on_the_other_at_once(store: Store, tmp_path: Path) -> None:
    """From the moment a node notes it to the moment a watcher of the other node hears it: p99 below 50 ms."""
    async with AsyncExitStack() as stack:
        one = await stack.enter_async_context(serve_cache(store.url, tmp_path, "node-1"))
        two = await stack.enter_async_context(serve_cache(store.url, tmp_path, "node-2"))
        engine = FakeEngine(one.residency)
        await engine.attach()
        folders = [write_adapter(one.root / f"f{n}", make_tensors(seed=n)) for n in range(4)]
        for n, folder in enumerate(folders):
            asked = pb.RegisterAdapterRequest(adapter_id=f"a{n}", source_uri=f"file://{folder}")
            await one.adapters.RegisterAdapter(asked)
        digests = [one.manager.view.records[f"a{n}"].digest for n in range(4)]
        await eventually(lambda: len(two.manager.view.records) == 4 and bool(two.manager.link.addresses))
        heard: dict[str, asyncio.Event] = {digest: asyncio.Event() for digest in digests}
        watch = two.adapters.WatchAdapters(pb.WatchAdaptersRequest())
        listener = asyncio.create_task(listen(watch, heard))
        p99s = []
        # On a machine that does other things too, a round may be slow; the service is not when one is fast.
        for _ in range(5):
            took = sorted([await time_to_hear(one, digests[turn % 4], heard) for turn in range(100)])
            p99s.append(took[98])
            if p99s[-1] < 0.05:
                break
        listener.cancel()
        engine.leave()
    assert min(p99s) < 0.05, p99s


async def time_to_hear(cache: Cache, digest: str, heard: dict[str, asyncio.Event]) -> float:
    """Seconds from a move on a node until a watcher of another one is told."""
    await asyncio.sleep(0.005)
    heard[digest].clear()
    began = time.perf_counter()
    cache.manager._announce(digest)
    await asyncio.wait_for(heard[digest].wait(), 2)
    return time.perf_counter() - began


async def listen(watch: Any, heard: dict[str, asyncio.Event]) -> None:
    async for event in watch:
        if event.kind == pb.AdapterEvent.KIND_RESIDENCY and event.adapter.digest in heard:
            heard[event.adapter.digest].set()


async def test_a_fetch_of_a_node_that_died_is_taken_over(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cache.registry.FETCH_TTL_MS", 1000)
    monkeypatch.setattr(flights, "FETCH_TTL_MS", 1000)
    registry = Registry(store.url, "test")
    dead, living = Flights(registry, "dead"), Flights(registry, "living")

    async def hold() -> None:
        async with dead.alone("x"):
            await asyncio.Event().wait()

    holder = asyncio.create_task(hold())
    await asyncio.sleep(0.1)
    flight = living.alone("x")
    taken = asyncio.create_task(flight.__aenter__())
    await asyncio.sleep(1.5)
    # Kept alive beyond its time to live.
    assert not taken.done()
    monkeypatch.setattr(Registry, "unlock_fetch", _nothing)
    holder.cancel()
    assert await asyncio.wait_for(taken, 5) is True
    await flight.__aexit__(None, None, None)
    await registry.close()


async def _nothing(*_: Any) -> None:
    """A dead node gives nothing back."""


# Where Redis runs


def test_all_keys_of_a_script_are_in_one_slot() -> None:
    """Of every registry's name, and nothing in a script that is a key and was not declared."""
    for name in ("default", "a b", "x{y"):
        keys = Keys(name)
        properties = [getattr(keys, each) for each in vars(Keys) if isinstance(getattr(Keys, each), property)]
        made = [*properties, keys.fetch("what{ever}")]
        assert len(made) >= 9 and len({key_slot(key.encode()) for key in made}) == 1, made
    for script in SCRIPTS.glob("*.lua"):
        text = script.read_text()
        calls = re.findall(r"redis\.call\('\w+',\s*([^,)]+)", text.replace("redis.call('TIME')", ""))
        assert calls and all(first.startswith("KEYS[") for first in calls), script.name
        assert all(f"KEYS[{n}]" in text.partition("\n\n")[0] for n in range(1, text.count("-- KEYS[") + 1))


@pytest.fixture
def cluster() -> Iterator[str]:
    """A Redis in cluster mode that holds all slots: it refuses scripts whose keys are in several."""
    port = free_port()
    with tempfile.TemporaryDirectory(prefix="lpx") as folder:
        process = subprocess.Popen(
            [
                binary_of("redis"),
                "--port",
                str(port),
                "--cluster-enabled",
                "yes",
                "--cluster-port",
                str(free_port()),
                "--dir",
                folder,
                "--save",
                "",
            ],
            stdout=subprocess.DEVNULL,
        )
        with redis.Redis(port=port) as client:
            until_it_answers(client)
            client.execute_command("CLUSTER", "ADDSLOTSRANGE", 0, 16383)
            while "ok" not in str(client.execute_command("CLUSTER INFO")).partition("cluster_slots")[0]:
                time.sleep(0.02)
        yield f"redis://127.0.0.1:{port}/0"
        process.kill()
        process.wait()


def until_it_answers(client: Any) -> None:
    deadline = time.monotonic() + 10
    while True:
        try:
            client.ping()
            return
        except redis.ConnectionError:
            assert time.monotonic() < deadline
            time.sleep(0.02)


async def test_a_registry_on_a_redis_cluster(cluster: str, tmp_path: Path) -> None:
    async with serve_cache(cluster, tmp_path) as cache:
        engine = FakeEngine(cache.residency)
        await engine.attach()
        folder = write_adapter(cache.root / "a")
        asked = pb.RegisterAdapterRequest(adapter_id="a", source_uri=f"file://{folder}")
        digest = (await cache.adapters.RegisterAdapter(asked)).adapter.digest
        await engine.use(digest)
        await eventually(lambda: any(leased == digest for _, leased in cache.manager.link.leases))
        await engine.use()
        await cache.adapters.DeleteAdapter(pb.DeleteAdapterRequest(adapter_id="a"))
        async with cache.manager.flights.alone("x") as waited:
            assert not waited
        engine.leave()


@pytest.fixture
def sentinel() -> Iterator[str]:
    """A Sentinel that watches a master of its own."""
    with tempfile.TemporaryDirectory(prefix="lpx") as folder:
        port, watching = free_port(), free_port()
        settings = Path(folder) / "sentinel.conf"
        settings.write_text(f"port {watching}\ndir {folder}\nsentinel monitor mine 127.0.0.1 {port} 1\n")
        commands = [["--port", str(port), "--dir", folder, "--save", ""], [str(settings), "--sentinel"]]
        started = []
        for command, listening in zip(commands, (port, watching), strict=True):
            started.append(subprocess.Popen([binary_of("redis"), *command], stdout=subprocess.DEVNULL))
            with redis.Redis(port=listening) as client:
                until_it_answers(client)
        yield f"redis+sentinel://127.0.0.1:{watching}/mine"
        for process in started:
            process.kill()
            process.wait()


async def test_the_master_is_found_through_its_sentinels(sentinel: str, tmp_path: Path) -> None:
    async with serve_cache(sentinel, tmp_path) as cache:
        assert cache.manager.link.reachable


@pytest.mark.parametrize(
    "url", ["redis+sentinel://", "redis+sentinel://host/mine", "redis+sentinel://h:x/m", "nonsense"]
)
def test_a_malformed_address_is_said_without_its_password(url: str) -> None:
    with pytest.raises(StartupError):
        connect(url, 1.0)
    assert without_password("redis+sentinel://u:secret@h:1/m") == "redis+sentinel://h:1/m"
