"""Tells the cache what waits in the queue: what will be needed soon is kept on devices, and the next is brought there."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable, Sequence

import grpc

from loraplex.cache.v1 import residency_pb2, residency_pb2_grpc
from router.request import Request

_log = logging.getLogger(__name__)

# The queue is looked at so often; an adapter that is not on a device is asked for at once, when its first request arrives.
PERIOD = 0.05
# What has not changed is said again after this time: the cache forgets it after ten seconds.
RENEW = 3.0
# A device holds fewer; those behind are said when they come closer.
MOST = 256
_CALL_SECONDS = 2.0


def first_of_each(queues: Iterable[Iterable[Request]]) -> list[Request]:
    """The request that has waited longest for each adapter, the longest first; at most MOST. The base needs no adapter.

    Args:
        queues: requests that wait for each base, in the order they have waited.
    """
    found: list[Request] = []
    for queue in queues:
        first: dict[str, Request] = {}
        for request in queue:
            digest = request.adapter.digest
            if digest and digest not in first:
                first[digest] = request
                if len(first) == MOST:
                    break
        found += first.values()
    return sorted(found, key=lambda request: request.arrived_at)[:MOST]


class LookAhead:
    """See the module. `queues` gives the requests that wait now, those of each queue in order."""

    def __init__(
        self,
        residency: residency_pb2_grpc.ResidencyServiceAsyncStub,
        router_id: str,
        queues: Callable[[], Iterable[Iterable[Request]]],
    ) -> None:
        self._residency = residency
        self._router_id = router_id
        self._queues = queues

    async def run(self) -> None:
        """Goes on for ever. A cache that is away misses the look-ahead only: engines ask for what their sequences wait for."""
        said: list[str] = []
        said_at = 0.0
        while True:
            await asyncio.sleep(PERIOD)
            queue = first_of_each(self._queues())
            names = [request.request_id for request in queue]
            now = time.monotonic()
            if names == said and not (names and now - said_at > RENEW):
                continue
            if await self._say(queue, now):
                said, said_at = names, now

    async def _say(self, queue: Sequence[Request], now: float) -> bool:
        expected = [
            residency_pb2.ExpectedUse(
                digest=request.adapter.digest,
                waited_ms=max(0, int(1000 * (now - request.arrived_at))),
                tenant=request.tenant,
                traceparent=request.traceparent,
            )
            for request in queue
        ]
        try:
            await self._residency.LookAhead(
                residency_pb2.LookAheadRequest(router_id=self._router_id, expected=expected), timeout=_CALL_SECONDS
            )
        except grpc.aio.AioRpcError as error:
            _log.debug("the look-ahead was not heard: %s", error.details())
            return False
        return True
