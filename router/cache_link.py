"""The node's cache: the stream that feeds the view of the registry, and wishes for adapters to be loaded."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable
from dataclasses import dataclass

import grpc

from loraplex.cache.v1 import residency_pb2, residency_pb2_grpc
from loraplex.v1 import adapter_pb2, adapter_pb2_grpc
from router.fleet import CHANNEL_OPTIONS, FIRST_DELAY, LONGEST_DELAY
from router.registry_view import Event, RegistryView
from router.wire import event_from

_log = logging.getLogger(__name__)

_PREFETCH_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class Moved:
    """These adapters may be on other engines than before."""

    digests: frozenset[str]


class CacheLink:
    """Owns the view: it alone changes it. `adapters` and `residency` are stubs for calls of others."""

    def __init__(self, address: str, post: Callable[[Moved], None]) -> None:
        self.address = address
        self.view = RegistryView()
        self._post = post
        self._channel = grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS)
        self.adapters = adapter_pb2_grpc.AdapterServiceStub(self._channel)
        self.residency: residency_pb2_grpc.ResidencyServiceAsyncStub = residency_pb2_grpc.ResidencyServiceStub(
            self._channel
        )
        self._prefetches: dict[tuple[str, str], asyncio.Task[None]] = {}

    def apply(self, event: Event) -> None:
        """Takes a change into the view."""
        moved = self.view.apply(event)
        if moved or not event.adapter:
            self._post(Moved(frozenset(moved)))

    async def follow(self) -> None:
        """Keeps the view up to date for ever. While the cache is away, the view stays as it is."""
        delay = FIRST_DELAY
        while True:
            heard = await self._watch()
            delay = FIRST_DELAY if heard else min(2 * delay, LONGEST_DELAY)
            await asyncio.sleep(delay * random.uniform(0.5, 1.0))

    async def _watch(self) -> bool:
        """Reads one stream until it breaks; returns whether anything was heard on it."""
        self.view.begin()
        heard = False
        try:
            async for message in self.adapters.WatchAdapters(adapter_pb2.WatchAdaptersRequest()):
                heard = True
                event = event_from(message)
                if event:
                    self.apply(event)
        except grpc.aio.AioRpcError as error:
            if heard:
                _log.warning("the watch on the registry broke: %s", error.details())
        return heard

    def prefetch(self, digest: str, engine_id: str, traceparent: str, tenant: str) -> None:
        """Asks for an adapter to be brought to a device, and does not wait. One call for a digest and an engine at a time."""
        asked = digest, engine_id
        if asked in self._prefetches:
            return
        task = asyncio.create_task(self._prefetch(digest, engine_id, traceparent, tenant))
        self._prefetches[asked] = task
        task.add_done_callback(lambda _: self._prefetches.pop(asked))

    async def _prefetch(self, digest: str, engine_id: str, traceparent: str, tenant: str) -> None:
        request = residency_pb2.PrefetchRequest(
            digest=digest, engine_id=engine_id, traceparent=traceparent, tenant=tenant
        )
        try:
            await self.residency.Prefetch(request, timeout=_PREFETCH_SECONDS)
        except grpc.aio.AioRpcError as error:
            # Only a head start is lost: the engine asks for what its sequences wait for.
            _log.debug("prefetch of %s failed: %s", digest, error.details())

    async def close(self) -> None:
        await self._channel.close()
