"""Keeps this node's view and the registry in Redis in agreement: heartbeats, hints of changes, losing Redis and finding it.

The view is right when its revision is the registry's. A hint that follows on the view's revision is read by itself; after any
gap, and after every reconnection, the whole registry is read again. A lost hint shows with the next heartbeat.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass

from cache.artifact import BaseDescription
from cache.errors import RegistryUnreachable
from cache.registry import AdapterRecord, Hint, Registry, Snapshot
from cache.view import View

_log = logging.getLogger(__name__)

HEARTBEAT_SECONDS = 2.0
RETRY_SECONDS = 0.25

Leases = frozenset[tuple[str, str]]


@dataclass(frozen=True)
class NodeReport:
    """What this node says of itself: digest -> tiers, and the (owner, digest) leases of its engines."""

    residency: Mapping[str, list[str]]
    leases: Leases


class RegistryLink:
    """See the module. All writes of adapters go through here, so that the view learns of them at once.

    Attributes:
        reachable: whether Redis answered last time.
        base: what adapters are validated against; None until an engine has said.
        elsewhere: residency on the other nodes: node_id -> digest -> tiers.
        leases_elsewhere: digests that engines of other nodes use.
    """

    def __init__(
        self,
        registry: Registry,
        view: View,
        node_id: str,
        report: Callable[[], NodeReport],
        changed: Callable[[], None],
    ) -> None:
        self.registry, self.view = registry, view
        self.reachable = False
        self.base: BaseDescription | None = None
        self.elsewhere: Mapping[str, Mapping[str, list[str]]] = {}
        self.leases_elsewhere: frozenset[str] = frozenset()
        self._node_id, self._report, self._changed = node_id, report, changed
        self._epoch = ""
        self._revision = 0
        self._newest_seen = 0
        self._told: Leases = frozenset()
        self._beat = asyncio.Event()
        self._reading = asyncio.Lock()

    async def reconcile(self) -> None:
        """Makes the view the registry's again; a registry that has forgotten something gets it back from the view."""
        async with self._reading:
            snapshot = await self._load()
            self._epoch, self._revision = snapshot.epoch, snapshot.revision
            self._newest_seen = snapshot.revision
            if self.base is None:
                self.base = snapshot.base
            self.view.replace_all(snapshot.records)
        if not self.reachable:
            _log.info("registry in Redis at %s: %d adapters", self.registry.url, len(snapshot.records))
        self.reachable = True
        self._changed()

    async def _load(self) -> Snapshot:
        """A snapshot that holds every change this node has seen."""
        while True:
            seen = self._newest_seen
            snapshot = await self.registry.load()
            # What was seen before the question must be in the answer, or Redis was emptied or went back to an older state.
            if self._epoch and (snapshot.epoch != self._epoch or snapshot.revision < seen):
                await self._restore(snapshot)
                self._epoch, self._newest_seen = snapshot.epoch, 0
            elif snapshot.revision >= self._newest_seen:
                return snapshot

    async def put(self, record: AdapterRecord, replaces: AdapterRecord | None) -> AdapterRecord | None:
        """Writes a record; None when the one there is not `replaces`."""
        revision, stored = await self.registry.put(record, replaces)
        if not revision:
            return None
        self._saw(revision)
        self.view.take(stored)
        self._changed()
        return stored

    async def delete(self, record: AdapterRecord) -> bool:
        """Deletes a record; False when the one there is another."""
        revision = await self.registry.delete(record)
        if revision:
            self._saw(revision)
            self.view.forget(record.adapter_id)
            self._changed()
        return bool(revision)

    async def read(self, adapter_id: str) -> AdapterRecord | None:
        """The record in Redis now."""
        return await self.registry.read(adapter_id)

    async def describe_base(self, base: BaseDescription) -> BaseDescription:
        """Offers a base; returns the one in force."""
        try:
            in_force = await self.registry.describe_base(base)
        except RegistryUnreachable:
            if self.base is None:
                raise
            in_force = self.base
        if in_force.digest == base.digest:
            self.base = base
        return in_force

    def beat_soon(self) -> None:
        """Has the next heartbeat sent now: a lease has ended that someone waits for."""
        self._beat.set()

    async def keep_in_touch(self) -> None:
        """Sends heartbeats for ever, and finds Redis again when it was lost."""
        while True:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._beat.wait(), HEARTBEAT_SECONDS if self.reachable else RETRY_SECONDS)
            self._beat.clear()
            try:
                await self._heartbeat()
            except RegistryUnreachable:
                self._lost()
            except Exception:  # noqa: BLE001 - without heartbeats the others take this node for dead
                _log.exception("the heartbeat failed; trying again")

    async def listen(self) -> None:
        """Takes over what other caches change, for ever."""
        while True:
            try:
                async for hint in self.registry.hints():
                    await self._heed(hint)
            except RegistryUnreachable:
                pass
            except Exception:  # noqa: BLE001 - a hint we cannot read must not end all others
                _log.exception("listening to the registry failed; trying again")
            await asyncio.sleep(RETRY_SECONDS)

    async def _heed(self, hint: Hint | None) -> None:
        if hint is None or hint.revision > self._revision + 1:
            return await self.reconcile()
        if hint.revision <= self._revision:
            return None
        record = await self.registry.read(hint.adapter_id)
        if record is not None:
            self.view.take(record)
        else:
            self.view.forget(hint.adapter_id)
        self._saw(hint.revision)
        self._changed()
        return None

    async def _heartbeat(self) -> None:
        if not self.reachable:
            await self.reconcile()
        report = self._report()
        pulse = await self.registry.heartbeat(
            self._node_id, report.residency, report.leases, self._told - report.leases
        )
        self._told = report.leases
        mine = f"{self._node_id}/"
        self.leases_elsewhere = frozenset(digest for owner, digest in pulse.leases if not owner.startswith(mine))
        before, self.elsewhere = self.elsewhere, {n: held for n, held in pulse.residency.items() if n != self._node_id}
        self.view.residency_changed(_moved_digests(before, self.elsewhere))
        if pulse.epoch != self._epoch or pulse.revision != self._revision:
            await self.reconcile()
        self._changed()

    async def _restore(self, found: Snapshot) -> None:
        """Writes again what Redis has forgotten. A deletion it has forgotten is not known here, and comes undone."""
        lost = [record for record in self.view.records.values() if found.records.get(record.adapter_id) != record]
        _log.warning("Redis has lost changes; restoring %d adapters from this node's view", len(lost))
        if self.base is not None:
            await self.registry.describe_base(self.base)
        for record in lost:
            await self.registry.put(record, found.records.get(record.adapter_id))

    def _saw(self, revision: int) -> None:
        """Notes a change that the view has; with a gap before it, the next heartbeat reads everything."""
        self._newest_seen = max(self._newest_seen, revision)
        if revision == self._revision + 1:
            self._revision = revision

    def _lost(self) -> None:
        if self.reachable:
            _log.warning("Redis does not answer; serving what is known, refusing registrations")
        self.reachable = False
        self._changed()


def _moved_digests(
    before: Mapping[str, Mapping[str, list[str]]], after: Mapping[str, Mapping[str, list[str]]]
) -> set[str]:
    """Digests whose tiers on some node differ."""
    moved: set[str] = set()
    for node in before.keys() | after.keys():
        one, other = before.get(node, {}), after.get(node, {})
        moved |= {digest for digest in one.keys() | other.keys() if one.get(digest) != other.get(digest)}
    return moved
