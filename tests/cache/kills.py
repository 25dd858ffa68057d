"""kill -9 of cache, engine or store by chance while adapters are registered and loaded; after each, what must hold is checked.

    python -m tests.cache.kills --kills 200 --seed 1

One cache, one engine, one store, each a process; adapters come from a folder and from a slow web server. After every restart:
nothing that was confirmed is lost, no file in a tier is half a file, no lease lives longer than its time, and what the cache
says is on the device is what the engine has there.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import redis

from cache.artifact import AdapterFiles, build_artifact
from cache.keys import Keys
from cache.registry import NODE_TTL_MS
from loraplex.v1 import adapter_pb2 as pb
from loraplex.v1 import adapter_pb2_grpc
from tests.cache.conftest import BASE, Store, binary_of, make_tensors, write_adapter
from tests.cache.stand_ins import Web, serving
from tests.cache.test_process import free_port, start, wait_until_serving

VICTIMS = ("cache", "engine", "store")
HEARTBEATS_MS = 5000


def check_files(folder: Path) -> set[str]:
    """Every artifact in a tier is what was written; returns their digests."""
    found = set()
    for path in folder.glob("*.safetensors"):
        try:
            content, checksum = path.read_bytes(), path.with_name(f"{path.name}.sha256").read_text()
        except FileNotFoundError:
            # Given up at this moment.
            continue
        assert checksum == hashlib.sha256(content).hexdigest(), path
        found.add(path.name.partition(".")[0])
    return found


@dataclass
class World:
    """The processes, and what they have confirmed."""

    folder: Path
    store: Store
    web: Web
    dice: random.Random
    port: int = field(default_factory=free_port)
    # adapter_id -> the digests it may have; "" is none. One when it was confirmed.
    possible: dict[str, set[str]] = field(default_factory=dict)
    processes: dict[str, subprocess.Popen[str] | None] = field(default_factory=dict)
    registered: int = 0

    @property
    def confirmed(self) -> int:
        """How many adapters are known to be there."""
        return sum(len(digests) == 1 for digests in self.possible.values())

    @property
    def root(self) -> Path:
        return self.folder / "root"

    def start_missing(self) -> None:
        """Starts what is not running."""
        if self.store.process is None:
            self.store.start()
        if self.processes.get("cache") is None:
            flags = ["--adapter-roots", str(self.root), "--source-networks", "127.0.0.0/8", "--host-mib", "1"]
            self.processes["cache"] = start(self.folder / "data", self.store.url, self.port, *flags)
            wait_until_serving(self.port)
        if self.processes.get("engine") is None:
            (self.folder / "device").unlink(missing_ok=True)
            command = [sys.executable, "-m", "tests.cache.engine_stand_in", f"127.0.0.1:{self.port}", str(self.folder)]
            self.processes["engine"] = subprocess.Popen(command, text=True, stderr=subprocess.PIPE)

    def kill(self, victim: str) -> None:
        if victim == "store":
            return self.store.kill()
        process = self.processes.get(victim)
        if process is None:
            return None
        assert process.poll() is None, f"{victim} ended by itself: {process.communicate()[1][-2000:]}"
        process.kill()
        process.communicate()
        self.processes[victim] = None
        return None

    def make(self) -> tuple[pb.RegisterAdapterRequest, str]:
        """A new adapter and what its digest must be; some come under an id that there is already."""
        number = self.registered = self.registered + 1
        adapter_id = f"a{self.dice.randrange(number)}" if self.dice.random() < 0.3 else f"a{number}"
        tensors = make_tensors(("q_proj", "v_proj", "up_proj"), rank=48, seed=number)
        folder = write_adapter(self.root / f"f{number}", tensors, r=48)
        config, weights = (folder / f"adapter_{name}" for name in ("config.json", "model.safetensors"))
        files = AdapterFiles(config.read_bytes(), weights.read_bytes())
        digest = build_artifact(files, BASE).digest
        uri = f"file://{folder}"
        if self.dice.random() < 0.5:
            self.web.put(folder, f"/{number}")
            uri = f"{self.web.url}/{number}"
        return pb.RegisterAdapterRequest(adapter_id=adapter_id, source_uri=uri, expected_digest=digest), digest

    async def register_some(self, stub: adapter_pb2_grpc.AdapterServiceAsyncStub) -> None:
        while True:
            request, digest = await asyncio.to_thread(self.make)
            # Until it answers it may or may not have happened.
            before = self.possible.get(request.adapter_id, {""})
            self.possible[request.adapter_id] = before | {digest}
            try:
                adapter = (await stub.RegisterAdapter(request, timeout=20)).adapter
            except grpc.aio.AioRpcError as error:
                codes = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)
                assert error.code() in codes or "no room" in (error.details() or ""), error
                return
            assert adapter.digest == digest
            self.possible[request.adapter_id] = {digest}
            await asyncio.sleep(0.02)

    async def check(self, stub: adapter_pb2_grpc.AdapterServiceAsyncStub) -> None:
        """What must hold after every restart."""
        (self.folder / "pause").touch()
        adapters: dict[str, pb.Adapter] = {}

        async def list_all() -> None:
            with suppress(grpc.aio.AioRpcError):
                page = await stub.ListAdapters(pb.ListAdaptersRequest(page_size=1000), timeout=5)
                adapters.clear()
                adapters.update((each.adapter_id, each) for each in page.adapters)

        def kept() -> bool:
            found = {name: adapters[name].digest if name in adapters else "" for name in self.possible}
            return all(digest in self.possible[name] for name, digest in found.items())

        await until(list_all, kept, "a confirmed adapter is lost, or another than was confirmed")
        await until(list_all, lambda: on_device(adapters) == self.truth(adapters), "a device's entry is not true")

        def all_on_disk() -> bool:
            on_disk = check_files(self.folder / "data" / "artifacts")
            return on_disk >= {each.digest for each in adapters.values()}

        # More than once: a registry that is read again just now may point to other versions than were listed.
        await until(list_all, all_on_disk, "an artifact is lost")
        await asyncio.to_thread(check_files, Path(f"{self.folder}/data-host"))
        await until(None, self.leases_end, "a lease outlives its time")
        (self.folder / "pause").unlink()

    def truth(self, adapters: dict[str, pb.Adapter]) -> set[str] | None:
        """What the engine has on its device of the versions that adapters point to; None while it starts."""
        with suppress(FileNotFoundError):
            held = set((self.folder / "device").read_text().split())
            return held & {each.digest for each in adapters.values()}
        return None

    def leases_end(self) -> bool:
        with suppress(redis.RedisError), redis.Redis(unix_socket_path=f"{self.store.folder}/s") as client:
            seconds, micros = client.time()
            now = seconds * 1000 + micros // 1000
            ends = [end for _, end in client.zrange(Keys("default").leases, 0, -1, withscores=True)]
            return all(now - HEARTBEATS_MS < end <= now + NODE_TTL_MS for end in ends)
        return False


def on_device(adapters: dict[str, pb.Adapter]) -> set[str]:
    return {a.digest for a in adapters.values() if any(place.tier == pb.TIER_DEVICE for place in a.residency)}


async def until(
    refresh: Callable[[], object] | None, holds: Callable[[], bool], otherwise: str, seconds: float = 20.0
) -> None:
    deadline = time.monotonic() + seconds
    while True:
        if refresh is not None:
            await refresh()  # type: ignore[misc]
        if await asyncio.to_thread(holds):
            return
        assert time.monotonic() < deadline, otherwise
        await asyncio.sleep(0.05)


async def run(kills: int, seed: int, folder: Path, progress: Callable[[str], None] = lambda _: None) -> Counter[str]:
    """Kills so many times; returns whom how often. Raises AssertionError naming the seed and the kill."""
    dice, done = random.Random(seed), Counter[str]()
    (folder / "root").mkdir(parents=True)
    async with AsyncExitStack() as stack:
        short = stack.enter_context(tempfile.TemporaryDirectory(prefix="lpx"))
        web = stack.enter_context(serving(Web(hang=0.03)))
        world = World(folder, Store(binary_of("valkey"), Path(short)), web, dice)
        stack.callback(world.store.kill)
        stack.callback(world.kill, "cache")
        stack.callback(world.kill, "engine")
        for number in range(kills + 1):
            await asyncio.to_thread(world.start_missing)
            async with grpc.aio.insecure_channel(f"127.0.0.1:{world.port}") as channel:
                stub: adapter_pb2_grpc.AdapterServiceAsyncStub = adapter_pb2_grpc.AdapterServiceStub(channel)
                try:
                    await world.check(stub)
                except AssertionError as error:
                    raise AssertionError(f"after kill {number} of seed {seed}: {error}") from error
                if number == kills:
                    break
                work = asyncio.create_task(world.register_some(stub))
                await asyncio.sleep(dice.uniform(0.0, 0.4))
                victim = dice.choice(VICTIMS)
                await asyncio.to_thread(world.kill, victim)
                done[victim] += 1
                if victim == "engine":
                    work.cancel()
                await asyncio.wait([work], timeout=5)
                if not work.done():
                    work.cancel()
                with suppress(asyncio.CancelledError):
                    await work
                progress(f"{number + 1}: {victim}, {world.confirmed} adapters confirmed")
        done["adapters"] = world.confirmed
    return done


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="lpx") as folder:
        done = asyncio.run(run(options.kills, options.seed, Path(folder) / "w", lambda line: print(line, flush=True)))  # noqa: T201
    print(dict(done), f"{time.monotonic() - began:.0f} s")  # noqa: T201


if __name__ == "__main__":
    main()
