"""gRPC edge for other nodes: the artifacts of this node's tiers, as they are on disk."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Sequence
from typing import Any

import grpc

from cache.artifact import TARGET_DTYPES
from cache.errors import VersionNotFound
from cache.tiers import ArtifactKey, FileTier
from loraplex.cache.v1 import artifact_pb2, artifact_pb2_grpc
from servicekit.errors import Exhausted, InvalidField

CHUNK_BYTES = 1 << 20
READERS = 8
_DIGEST = re.compile(r"[0-9a-f]{64}")

Context = grpc.aio.ServicerContext[Any, Any]


class ArtifactService(artifact_pb2_grpc.ArtifactServiceServicer):
    """Streams artifacts from the first of `tiers` that holds them."""

    def __init__(self, tiers: Sequence[FileTier]) -> None:
        self._tiers = tiers
        self._readers = 0

    async def ReadArtifact(
        self, request: artifact_pb2.ReadArtifactRequest, context: Context
    ) -> AsyncIterator[artifact_pb2.ReadArtifactResponse]:
        # It becomes part of a file's name.
        if not _DIGEST.fullmatch(request.digest) or request.dtype not in TARGET_DTYPES:
            raise InvalidField("digest", "must be 64 lower-case hex digits, with a known dtype", "MALFORMED_DIGEST")
        if self._readers >= READERS:
            message = f"{READERS} artifacts are being read from this node"
            raise Exhausted(message, "TOO_MANY_READERS", retry_after=1.0, limit=READERS)
        self._readers += 1
        try:
            async for part in self._parts(ArtifactKey(request.digest, request.dtype), request.offset):
                yield part
        finally:
            self._readers -= 1

    async def _parts(self, key: ArtifactKey, offset: int) -> AsyncIterator[artifact_pb2.ReadArtifactResponse]:
        found = next((each for tier in self._tiers if (each := tier.open(key)) is not None), None)
        if found is None:
            raise VersionNotFound(key.digest)
        file, size, checksum = found
        with file:
            if not 0 <= offset <= size:
                raise InvalidField("offset", f"{offset} is not within 0 to {size}", "OUT_OF_RANGE", limit=size)
            file.seek(offset)
            header = artifact_pb2.ArtifactHeader(size_bytes=size, sha256=checksum)
            yield artifact_pb2.ReadArtifactResponse(header=header)
            while data := await asyncio.to_thread(file.read, CHUNK_BYTES):
                yield artifact_pb2.ReadArtifactResponse(data=data)
