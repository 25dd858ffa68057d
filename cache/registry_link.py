"""Keeps this node's view and the registry in Redis in agreement: heartbeats, hints of changes, losing Redis and finding it.

The view is right when its revision is the registry's. A hint that follows on the view's revision is read by itself; after any
gap, and after every reconnection, the whole registry is read again. A lost hint shows with the next heartbeat.
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import Callable, Iterable, Mapping, Set
from contextlib import suppress
from dataclasses import dataclass

from cache.artifact import BaseDescription
from cache.bases import Bases
from cache.errors import RegistryUnreachable
from cache.registry import AdapterRecord, Beat, Hint, Moved, NodeState, Pulse, Registry, Snapshot
from cache.view import View

_log = logging.getLogger(__name__)

HEARTBEAT_SECONDS = 2.0
RETRY_SECONDS = 0.25
# Moves within so short a time are told in one message.
GATHER_SECONDS = 0.003

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
        bases: what adapters are validated against, as engines have described it.
        elsewhere: residency on the other nodes: node_id -> digest -> tiers.
        addresses: where the artifacts of the other nodes are read: node_id -> address.
        leases_elsewhere: digests that engines of other nodes use.
        leases: (node/engine, digest) of all nodes, as of the last heartbeat.
        last_use: digest -> when it was last used on any node, milliseconds since 1970.
    """

    def __init__(
        self,
        registry: Registry,
        view: View,
        node_id: str,
        report: Callable[[], NodeReport],
        held: Callable[[str], list[str]],
        served: Callable[[], frozenset[str]],
        changed: Callable[[], None],
    ) -> None:
        self.registry, self.view = registry, view
        self.address = ""
        self.reachable = False
        self.bases = Bases(self._bases_in_service)
        self._bases_elsewhere: frozenset[str] = frozenset()
        self.elsewhere: dict[str, dict[str, list[str]]] = {}
        self.addresses: Mapping[str, str] = {}
        self.leases_elsewhere: frozenset[str] = frozenset()
        self.leases: Leases = frozenset()
        self.last_use: dict[str, int] = {}
        self._node_id, self._report, self._held, self._changed = node_id, report, held, changed
        self._served = served
        self._run, self._serial = uuid.uuid4().hex, 0
        # Of each other node: which process was heard, and the newest it has told.
        self._heard: dict[str, tuple[str, int]] = {}
        self._moved: set[str] = set()
        self._move = asyncio.Event()
        self._used: set[str] = set()
        self._uses_since = 0
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
            self.bases.take(base for base in snapshot.bases if base.digest not in self.bases)
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
        try:
            revision, stored = await self.registry.put(record, replaces)
        except RegistryUnreachable:
            # It may have been written all the same: the registry is read again before anything is given up.
            self._lost()
            raise
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

    async def describe_base(self, base: BaseDescription) -> None:
        """Makes a base known. Raises RegistryUnreachable when it is not known yet and Redis does not answer."""
        try:
            await self.registry.describe_base(base)
        except RegistryUnreachable:
            if base.digest not in self.bases:
                raise
        self.bases.take([base])

    async def learn_bases(self) -> None:
        """Takes over the bases that others have described."""
        self.bases.take(await self.registry.bases(but=self.bases.known))

    def _bases_in_service(self) -> Set[str]:
        registered = {record.base_digest for record in self.view.records.values()}
        return registered | self._served() | self._bases_elsewhere

    def moved(self, digests: Iterable[str]) -> None:
        """Versions are in other tiers of this node than before: the other nodes are told at once."""
        self._moved.update(digests)
        self._move.set()

    def used(self, digests: Iterable[str]) -> None:
        """Sequences of this node use versions: the next heartbeat says so."""
        self._used.update(digests)

    async def tell_moves(self) -> None:
        """Tells the other nodes what moves here, for ever; many moves within a moment are told together."""
        while True:
            await self._move.wait()
            await asyncio.sleep(GATHER_SECONDS)
            self._move.clear()
            moved, self._moved = self._moved, set()
            if not self.reachable:
                # The heartbeat that finds Redis again tells everything.
                continue
            self._serial += 1
            held = {digest: self._held(digest) for digest in moved}
            with suppress(RegistryUnreachable):
                await self.registry.tell(Moved(self._node_id, self._run, self._serial, held))

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

    async def _heed(self, hint: Hint | Moved | None) -> None:
        if isinstance(hint, Moved):
            return self._hear(hint)
        if hint is None or hint.revision > self._revision + 1:
            return await self.reconcile()
        if hint.revision <= self._revision:
            return None
        record = await self.registry.read(hint.adapter_id)
        if record is not None:
            if record.base_digest and record.base_digest not in self.bases:
                await self.learn_bases()
            self.view.take(record)
        else:
            self.view.forget(hint.adapter_id)
        self._saw(hint.revision)
        self._changed()
        return None

    async def _heartbeat(self) -> None:
        if not self.reachable:
            await self.reconcile()
        report, used = self._report(), self._used
        self._used = set()
        state = NodeState(self.address, self._run, self._serial, report.residency, tuple(sorted(self._served())))
        ended = self._told - report.leases
        beat = Beat(self._node_id, state, report.leases, ended, frozenset(used), self._uses_since)
        try:
            pulse = await self.registry.heartbeat(beat)
        except RegistryUnreachable:
            self._used |= used
            raise
        self._told = report.leases
        self._take(pulse)
        if not self._bases_elsewhere <= self.bases.known.keys():
            await self.learn_bases()
        if pulse.epoch != self._epoch or pulse.revision != self._revision:
            await self.reconcile()
        self._changed()

    def _take(self, pulse: Pulse) -> None:
        """Takes over what a heartbeat has learned of the other nodes."""
        mine = f"{self._node_id}/"
        self.leases = pulse.leases
        self.leases_elsewhere = frozenset(digest for owner, digest in pulse.leases if not owner.startswith(mine))
        self.last_use.update(pulse.last_use)
        # A little earlier than now: what was used in the same millisecond is told twice rather than never.
        self._uses_since = pulse.now_ms - 1000
        others = {node: state for node, state in pulse.nodes.items() if node != self._node_id}
        self._bases_elsewhere = frozenset(digest for state in others.values() for digest in state.bases)
        self.addresses = {node: state.address for node, state in others.items() if state.address}
        before = self.elsewhere
        self.elsewhere = {node: self._newest(node, state) for node, state in others.items()}
        self._heard = {node: heard for node, heard in self._heard.items() if node in others}
        self.view.residency_changed(_moved_digests(before, self.elsewhere))

    def _newest(self, node: str, state: NodeState) -> dict[str, list[str]]:
        """What a node holds: as the heartbeat says, unless the node itself has told something newer since."""
        run, serial = self._heard.get(node, ("", 0))
        if run == state.run and serial > state.serial and node in self.elsewhere:
            return self.elsewhere[node]
        self._heard[node] = (state.run, state.serial)
        return dict(state.held)

    def _hear(self, moved: Moved) -> None:
        """Takes over what a node has told of itself."""
        if moved.node_id == self._node_id:
            return
        self._heard[moved.node_id] = (moved.run, moved.serial)
        held = self.elsewhere.setdefault(moved.node_id, {})
        for digest, tiers in moved.held.items():
            held[digest] = tiers
            if not tiers:
                del held[digest]
        self.view.residency_changed(moved.held)
        self._changed()

    async def _restore(self, found: Snapshot) -> None:
        """Writes again what Redis has forgotten. A deletion it has forgotten is not known here, and comes undone."""
        lost = [record for record in self.view.records.values() if found.records.get(record.adapter_id) != record]
        _log.warning("Redis has lost changes; restoring %d adapters from this node's view", len(lost))
        for base in self.bases:
            await self.registry.describe_base(base)
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
