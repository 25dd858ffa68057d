"""Artifacts of a cache on another machine: where its host tier cannot be mapped, the bytes come as a stream."""

from __future__ import annotations

import asyncio
import hashlib
import os
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import grpc

from engine.errors import BadArtifact
from loraplex.cache.v1 import artifact_pb2, artifact_pb2_grpc
from servicekit.status import from_rpc_error

# Without a byte for so long, the cache counts as gone.
IDLE_SECONDS = 10.0
_SHARED_MEMORY = "/dev/shm"


@asynccontextmanager
async def copied(channel: grpc.aio.Channel, digest: str, dtype: str) -> AsyncIterator[Path]:
    """Streams an artifact into a folder of its own, which is gone after the block.

    Raises:
        BadArtifact: what came is not what was announced.
        ServiceError: as the cache says, or that it cannot be reached.
    """
    stub: artifact_pb2_grpc.ArtifactServiceAsyncStub = artifact_pb2_grpc.ArtifactServiceStub(channel)
    memory = _SHARED_MEMORY if os.access(_SHARED_MEMORY, os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="loraplex-", dir=memory) as folder:
        path = Path(folder) / f"{digest}.safetensors"
        try:
            await _receive(stub.ReadArtifact(artifact_pb2.ReadArtifactRequest(digest=digest, dtype=dtype)), path)
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error) from None
        except TimeoutError:
            raise BadArtifact(f"the cache sent nothing for {IDLE_SECONDS:g} seconds", digest=digest) from None
        yield path


async def _receive(call: grpc.aio.UnaryStreamCall[artifact_pb2.ReadArtifactRequest, artifact_pb2.ReadArtifactResponse],
                   path: Path) -> None:  # fmt: skip
    parts, total, size = aiter(call), hashlib.sha256(), 0
    first = await asyncio.wait_for(anext(parts, None), IDLE_SECONDS)
    header = first.header if first is not None else artifact_pb2.ArtifactHeader()
    with path.open("wb") as file:
        while (part := await asyncio.wait_for(anext(parts, None), IDLE_SECONDS)) is not None:
            size += len(part.data)
            if size > header.size_bytes:
                break
            total.update(part.data)
            await asyncio.to_thread(file.write, part.data)
    if size != header.size_bytes or total.hexdigest() != header.sha256:
        raise BadArtifact("the artifact arrived other than the cache said it is", path=path.name)
