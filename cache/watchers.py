"""Streams of changes: each watcher has room for one pending change per adapter, so a slow one costs no more than that."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass
from enum import IntEnum

from cache.registry import AdapterRecord


class Change(IntEnum):
    """What happened to an adapter; a larger one says more and stays when two are merged."""

    RESIDENCY = 1
    UPDATED = 2
    REGISTERED = 3
    DELETED = 4


@dataclass(frozen=True)
class Event:
    """A change, to be sent with the adapter's residency at the time of sending. No record: the snapshot is complete."""

    change: Change | None
    record: AdapterRecord | None


class Watcher:
    """One stream of changes, begun with a snapshot."""

    def __init__(self, snapshot: Iterable[AdapterRecord]) -> None:
        self._snapshot = list(snapshot)
        self._pending: dict[str, Event] = {}
        self._wake = asyncio.Event()

    def notify(self, change: Change, record: AdapterRecord) -> None:
        """Adds a change."""
        before = self._pending.pop(record.adapter_id, None)
        if before is not None and before.change is not None and before.change is not Change.DELETED:
            change = max(change, before.change)
        self._pending[record.adapter_id] = Event(change, record)
        self._wake.set()

    async def events(self) -> AsyncIterator[Event]:
        """The snapshot, its end, then changes as they come."""
        for record in self._snapshot:
            yield Event(None, record)
        self._snapshot.clear()
        yield Event(None, None)
        while True:
            await self._wake.wait()
            self._wake.clear()
            while self._pending:
                yield self._pending.pop(next(iter(self._pending)))
