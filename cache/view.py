"""This node's view of the registry: which adapters there are, and who is told when something changes. No I/O."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Set
from types import MappingProxyType

from cache.registry import AdapterRecord
from cache.watchers import Change, Watcher


class View:
    """Adapters by id and by digest. Lookups answer from here, also while Redis is away."""

    def __init__(self) -> None:
        self._records: dict[str, AdapterRecord] = {}
        self._ids: dict[str, set[str]] = {}
        self._pins: Counter[str] = Counter()
        self._news: set[str] = set()
        self._watchers: set[Watcher] = set()

    @property
    def records(self) -> Mapping[str, AdapterRecord]:
        """adapter_id -> record."""
        return MappingProxyType(self._records)

    @property
    def digests(self) -> Set[str]:
        """The versions that adapters point to."""
        return self._ids.keys()

    @property
    def pinned(self) -> Set[str]:
        """The versions that pinned adapters point to."""
        return self._pins.keys()

    def news(self) -> set[str]:
        """The versions whose adapters have changed since this was asked last."""
        news, self._news = self._news, set()
        return news

    def with_digest(self, digest: str) -> list[AdapterRecord]:
        """The adapters that point to a version."""
        return [self._records[adapter_id] for adapter_id in self._ids.get(digest, ())]

    def take(self, record: AdapterRecord) -> None:
        """Takes a record in, new or changed."""
        before = self._records.get(record.adapter_id)
        if record == before:
            return
        if before is not None:
            self._unlink(before)
        self._records[record.adapter_id] = record
        self._ids.setdefault(record.digest, set()).add(record.adapter_id)
        self._pins.update([record.digest] if record.pinned else [])
        self._news.add(record.digest)
        new = before is None or before.digest != record.digest
        self._tell(Change.REGISTERED if new else Change.UPDATED, record)

    def forget(self, adapter_id: str) -> None:
        """Takes a record out."""
        record = self._records.pop(adapter_id, None)
        if record is not None:
            self._unlink(record)
            self._tell(Change.DELETED, record)

    def replace_all(self, records: Mapping[str, AdapterRecord]) -> None:
        """Makes these the adapters there are."""
        for adapter_id in self._records.keys() - records.keys():
            self.forget(adapter_id)
        for record in records.values():
            self.take(record)

    def residency_changed(self, digests: Iterable[str]) -> None:
        """Tells the watchers that versions are in other places than before."""
        for digest in set(digests):
            for record in self.with_digest(digest):
                self._tell(Change.RESIDENCY, record)

    def watch(self) -> Watcher:
        """A new watcher; `unwatch` it."""
        watcher = Watcher(self._records.values())
        self._watchers.add(watcher)
        return watcher

    def unwatch(self, watcher: Watcher) -> None:
        """Forgets a watcher."""
        self._watchers.discard(watcher)

    def _unlink(self, record: AdapterRecord) -> None:
        ids = self._ids[record.digest]
        ids.discard(record.adapter_id)
        self._news.add(record.digest)
        if not ids:
            del self._ids[record.digest]
        if record.pinned:
            self._pins[record.digest] -= 1
            # Forgets what has reached zero.
            self._pins += Counter()

    def _tell(self, change: Change, record: AdapterRecord) -> None:
        for watcher in self._watchers:
            watcher.notify(change, record)
