"""kill -9 at random moments while adapters are registered: what was confirmed is there, and no file is half a file."""

from __future__ import annotations

import asyncio
import hashlib
import random
from contextlib import suppress
from pathlib import Path

import grpc

from loraplex.cache.v1 import residency_pb2_grpc
from loraplex.v1 import adapter_pb2 as pb
from loraplex.v1 import adapter_pb2_grpc
from tests.cache.conftest import FakeEngine, Store, make_tensors, write_adapter
from tests.cache.test_process import free_port, start, wait_until_serving

KILLS = 4


async def register_many(channel: grpc.aio.Channel, root: Path, run: int, confirmed: dict[str, str]) -> None:
    stub = adapter_pb2_grpc.AdapterServiceStub(channel)
    for number in range(1000):
        adapter_id = f"a{run}-{number}"
        folder = write_adapter(root / adapter_id, make_tensors(seed=1000 * run + number))
        request = pb.RegisterAdapterRequest(adapter_id=adapter_id, source_uri=f"file://{folder}")
        confirmed[adapter_id] = (await stub.RegisterAdapter(request, timeout=20)).adapter.digest


async def listed(channel: grpc.aio.Channel) -> dict[str, pb.Adapter]:
    stub = adapter_pb2_grpc.AdapterServiceStub(channel)
    page = await stub.ListAdapters(pb.ListAdaptersRequest(page_size=1000), timeout=20)
    return {adapter.adapter_id: adapter for adapter in page.adapters}


def check_files(folder: Path) -> set[str]:
    """Every artifact in a tier is what was written; returns their digests."""
    found = set()
    for path in folder.glob("*.safetensors"):
        assert path.with_name(f"{path.name}.sha256").read_text() == hashlib.sha256(path.read_bytes()).hexdigest()
        found.add(path.name.partition(".")[0])
    return found


async def test_nothing_confirmed_is_lost_and_nothing_half_written_is_kept(store: Store, tmp_path: Path) -> None:
    dice, confirmed = random.Random(3), dict[str, str]()
    root, data, port = tmp_path / "root", tmp_path / "data", free_port()
    root.mkdir()
    for run in range(KILLS + 1):
        process = await asyncio.to_thread(start, data, store.url, port, "--adapter-roots", str(root))
        try:
            await asyncio.to_thread(wait_until_serving, port)
            async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
                adapters = await listed(channel)
                assert {name: adapters[name].digest for name in confirmed} == confirmed
                on_disk = check_files(data / "artifacts")
                assert on_disk >= set(confirmed.values())
                assert check_files(Path(f"{data}-host")) <= on_disk
                if run < KILLS:
                    engine = FakeEngine(residency_pb2_grpc.ResidencyServiceStub(channel))
                    await engine.attach()
                    with suppress(TimeoutError):
                        work = register_many(channel, root, run, confirmed)
                        await asyncio.wait_for(work, dice.uniform(0.05, 0.6))
                    process.kill()
                    engine.leave()
        finally:
            process.kill()
            await asyncio.to_thread(process.communicate)
    assert confirmed
