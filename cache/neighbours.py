"""Artifacts from node to node: a neighbour's copy is taken before the source is asked again."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator

import grpc

from cache.disk_room import DiskRoom
from cache.errors import NeighbourFailed
from cache.registry_link import RegistryLink
from cache.tiers import ArtifactKey
from loraplex.cache.v1 import artifact_pb2, artifact_pb2_grpc
from servicekit.errors import Code, ServiceError, code_of
from servicekit.status import from_rpc_error

_log = logging.getLogger(__name__)

# Without a byte from a neighbour for so long, the next one is asked.
IDLE_SECONDS = 10.0


class Neighbours:
    """See the module. Called on the event loop; files are written in threads."""

    def __init__(self, link: RegistryLink, room: DiskRoom) -> None:
        self._link, self._room = link, room

    async def fetch(self, key: ArtifactKey, everyone: bool) -> int | None:
        """Copies an artifact to the disk tier; returns its bytes, None when no neighbour has it.

        Asked are the nodes that say they hold it; with `everyone` also the others, who may have got it just now.

        Raises TierFull or TierFailed.
        """
        holders = [node for node, held in self._link.elsewhere.items() if key.digest in held]
        others = [node for node in self._link.addresses if node not in holders]
        for node in [*holders, *(others if everyone else ())]:
            address = self._link.addresses.get(node)
            if address is None:
                continue
            try:
                return await self._copy(node, address, key)
            except NeighbourFailed as error:
                _log.info("no artifact from a neighbour: %s", error.message)
        return None

    async def _copy(self, node: str, address: str, key: ArtifactKey) -> int:
        async with grpc.aio.insecure_channel(address) as channel:
            stub: artifact_pb2_grpc.ArtifactServiceAsyncStub = artifact_pb2_grpc.ArtifactServiceStub(channel)
            request = artifact_pb2.ReadArtifactRequest(digest=key.digest, dtype=key.dtype)
            parts = _lively(node, aiter(stub.ReadArtifact(request)))
            first = await anext(parts, None)
            if first is None or first.WhichOneof("part") != "header":
                raise NeighbourFailed(node, "sent no header")
            incoming = await self._room.receive(key, first.header.size_bytes, first.header.sha256)
            try:
                async for part in parts:
                    await asyncio.to_thread(incoming.add, part.data)
                if not await asyncio.to_thread(incoming.finish):
                    raise NeighbourFailed(node, "sent something else than it said")
            finally:
                incoming.close()
        return int(first.header.size_bytes)


async def _lively(
    node: str, parts: AsyncIterator[artifact_pb2.ReadArtifactResponse]
) -> AsyncIterator[artifact_pb2.ReadArtifactResponse]:
    """The parts of a stream. Raises NeighbourFailed when it breaks, or stays silent."""
    while True:
        try:
            part = await asyncio.wait_for(anext(parts, None), IDLE_SECONDS)
        except TimeoutError:
            raise NeighbourFailed(node, f"was silent for {IDLE_SECONDS:g} seconds") from None
        except grpc.aio.AioRpcError as error:
            said: ServiceError = from_rpc_error(error)
            raise NeighbourFailed(node, f"{Code(code_of(said)).name}: {said.message}") from None
        if part is None:
            return
        yield part
