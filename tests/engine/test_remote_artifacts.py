"""An engine whose cache is on another machine gets its artifacts as a stream, from the real service over gRPC."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import grpc
import pytest

from cache.artifact_service import ArtifactService
from cache.tiers import ArtifactKey, FileTier
from engine.cache_link import CacheLink
from engine.errors import BadArtifact
from engine.remote_artifacts import copied
from loraplex.cache.v1 import artifact_pb2_grpc, residency_pb2
from servicekit.errors import ServiceError
from servicekit.server import Server
from tests.engine.harness import reader, tiny_base
from tests.engine.tiny import four_adapters

KEY = ArtifactKey("a" * 64, "float32")


@pytest.fixture
def tier(tmp_path: Path) -> FileTier:
    return FileTier("disk", tmp_path / "tier", 1 << 28)


@pytest.fixture
async def channel(tier: FileTier) -> AsyncIterator[grpc.aio.Channel]:
    server = Server()
    artifact_pb2_grpc.add_ArtifactServiceServicer_to_server(ArtifactService([tier]), server.grpc)
    await server.start("127.0.0.1:0", [])
    async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as opened:
        yield opened
    await server.drain(0)


async def test_the_bytes_arrive_whole_and_are_gone_afterwards(tier: FileTier, channel: grpc.aio.Channel) -> None:
    content = bytes(range(256)) * 20_000
    tier.write(KEY, content)
    async with copied(channel, KEY.digest, KEY.dtype) as path:
        assert path.read_bytes() == content
    assert not path.exists() and not path.parent.exists()


async def test_what_is_not_there_or_damaged_is_refused(tier: FileTier, channel: grpc.aio.Channel) -> None:
    for digest, reason in (("b" * 64, "VERSION_NOT_FOUND"), ("../../etc/passwd", "MALFORMED_DIGEST")):
        with pytest.raises(ServiceError) as refused:
            async with copied(channel, digest, "float32"):
                pass
        assert refused.value.reason == reason
    tier.write(KEY, b"right")
    tier.path(KEY).write_bytes(b"wrong")
    with pytest.raises(BadArtifact):
        async with copied(channel, KEY.digest, KEY.dtype):
            pass


async def test_an_adapter_whose_path_is_of_another_machine_is_streamed_and_the_same(
    tier: FileTier, channel: grpc.aio.Channel, tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = tiny_model("llama")
    base = tiny_base(folder)
    adapter = four_adapters(folder, tmp_path, "llama")[0]
    here = reader(base, tmp_path)
    link = CacheLink("nowhere:1", "engine-1", base, here, 1 << 24)
    link._channel = channel
    key = ArtifactKey("c" * 64, base.dtype)
    tier.write(key, adapter.path.read_bytes())

    async def read(digest: str, path: Any) -> Any:
        return await link._read(residency_pb2.LoadArtifact(digest=digest, path=str(path)))

    local = await read(adapter.digest, adapter.path)
    # The content says which version it is: another one's bytes under this digest are refused.
    with pytest.raises(BadArtifact, match="another version"):
        await read(key.digest, "/of/another/machine")
    tier.write(ArtifactKey(adapter.digest, base.dtype), adapter.path.read_bytes())
    streamed = await read(adapter.digest, "/of/another/machine")
    assert streamed.digest == local.digest and (streamed.size_bytes, streamed.shape) == (local.size_bytes, local.shape)
