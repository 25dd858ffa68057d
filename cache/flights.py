"""Single flight: who fetches something does so alone, on this node and among all nodes; the others wait and then look again.

Among nodes it is a key in Redis that its owner keeps alive: a node that dies loses it. Without Redis each node goes on alone:
the same bytes twice are better than none.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import random
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from weakref import WeakValueDictionary

from cache.errors import RegistryUnreachable
from cache.registry import FETCH_TTL_MS, Registry

_log = logging.getLogger(__name__)

LOOK_AGAIN_SECONDS = 0.1


class Flights:
    """See the module."""

    def __init__(self, registry: Registry, node_id: str) -> None:
        self._registry = registry
        self._node_id = node_id
        self._here: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    @asynccontextmanager
    async def alone(self, *what: str) -> AsyncIterator[bool]:
        """Runs the block while nobody else does for the same thing; yields whether someone did just before."""
        name = hashlib.sha256("\n".join(what).encode()).hexdigest()
        owner = f"{self._node_id}/{uuid.uuid4().hex}"
        lock = self._here.setdefault(name, asyncio.Lock())
        waited = lock.locked()
        async with lock:
            waited = await self._take(name, owner) or waited
            keeper = asyncio.create_task(self._keep(name, owner))
            try:
                yield waited
            finally:
                keeper.cancel()
                with suppress(RegistryUnreachable):
                    await asyncio.shield(self._registry.unlock_fetch(name, owner))

    async def _take(self, name: str, owner: str) -> bool:
        """Takes the right among all nodes; returns whether another node had it first."""
        waited = False
        with suppress(RegistryUnreachable):
            while not await self._registry.lock_fetch(name, owner):
                waited = True
                await asyncio.sleep(LOOK_AGAIN_SECONDS * random.uniform(0.5, 1.0))
        return waited

    async def _keep(self, name: str, owner: str) -> None:
        while True:
            await asyncio.sleep(FETCH_TTL_MS / 3000)
            try:
                if not await self._registry.lock_fetch(name, owner):
                    _log.warning("another node took over a fetch of ours")
            except RegistryUnreachable:
                continue
