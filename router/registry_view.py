"""The router's own view of the registry: which version an adapter id means, and which engines have it. PURE.

The view is fed with the events of AdapterService.WatchAdapters. A stream begins with the whole registry; until that
has arrived complete, the view before it stays in force. Answers to calls made through this router are applied at once,
so an event may tell old news: one that would bring back an older version is passed over.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import Enum, IntEnum, auto

from router.accounts import Where
from router.errors import AdapterNotFound, RegistryNotLoaded


class Tier(IntEnum):
    """Where an adapter's bytes are, by its number on the wire."""

    REMOTE = 1
    DISK = 2
    HOST = 3
    DEVICE = 4


class Kind(Enum):
    """What an event tells."""

    SNAPSHOT = auto()
    SNAPSHOT_END = auto()
    REGISTERED = auto()
    CHANGED = auto()
    DELETED = auto()


@dataclass(frozen=True, slots=True)
class Adapter:
    """One version of an adapter.

    Attributes:
        tier: the best one it is in.
        engines: ids of the engines that have it on their device.
        created: when this version was registered, nanoseconds.
        size_bytes: of its artifact.
        base_digest: the base it was made for; empty where that is not said.
    """

    adapter_id: str
    digest: str
    weight: float = 1.0
    chat_template: str = ""
    draining: bool = False
    tier: Tier = Tier.REMOTE
    engines: frozenset[str] = frozenset()
    created: int = 0
    size_bytes: int = 0
    base_digest: str = ""

    @property
    def is_base(self) -> bool:
        return not self.digest

    @property
    def tier_name(self) -> str:
        return "" if self.is_base else self.tier.name.lower()


BASE = Adapter(adapter_id="", digest="", tier=Tier.DEVICE)


@dataclass(frozen=True, slots=True)
class Event:
    """A change of registry or residency; only the end of a snapshot has no adapter."""

    kind: Kind
    adapter: Adapter | None = None


@dataclass
class RegistryView:
    """Adapters by id. `loaded` once a whole snapshot has arrived."""

    loaded: bool = False
    _adapters: dict[str, Adapter] = field(default_factory=dict)
    _snapshot: dict[str, Adapter] = field(default_factory=dict)
    # Ids that mean a digest. They share its residency: what one event tells of it holds for all.
    _ids: dict[str, set[str]] = field(default_factory=dict)
    _engines: dict[str, frozenset[str]] = field(default_factory=dict)

    def resolve(self, adapter_id: str) -> Adapter:
        """The version an id means now.

        Raises:
            RegistryNotLoaded: no snapshot has arrived yet.
            AdapterNotFound: the id is not registered, or is being deleted.
        """
        if not adapter_id:
            return BASE
        if not self.loaded:
            raise RegistryNotLoaded(adapter_id)
        adapter = self._adapters.get(adapter_id)
        if adapter is None or adapter.draining:
            raise AdapterNotFound(adapter_id)
        return adapter

    def get(self, adapter_id: str) -> Adapter | None:
        """What is known of an id, whether it may be asked for or not."""
        return self._adapters.get(adapter_id)

    def where(self, digest: str) -> Where:
        """Engines that have a version on their device; None, which is all of them, for the base."""
        return self._engines.get(digest, frozenset()) if digest else None

    def is_on_host(self, digest: str) -> bool:
        """Whether a version can be brought to a device at once."""
        ids = self._ids.get(digest, ())
        return any(self._adapters[adapter_id].tier >= Tier.HOST for adapter_id in ids)

    def begin(self) -> None:
        """A new stream of events begins."""
        self._snapshot = {}

    def apply(self, event: Event) -> set[str]:
        """Takes an event in; returns the digests whose residency it may have changed."""
        if event.kind is Kind.SNAPSHOT_END:
            return self._replace()
        adapter = event.adapter
        if adapter is None:
            return set()
        if event.kind is Kind.SNAPSHOT:
            self._snapshot[adapter.adapter_id] = adapter
            return set()
        known = self._adapters.get(adapter.adapter_id)
        if event.kind is Kind.DELETED:
            return self._remove(known) if known and known.created <= adapter.created else set()
        if known is None:
            # Only a registration makes an id known; a late change of one that was deleted does not.
            return self._put(adapter) if event.kind is Kind.REGISTERED else set()
        if adapter.created < known.created:
            return set()
        return self._remove(known) | self._put(adapter)

    def _replace(self) -> set[str]:
        changed: set[str] = set()
        for adapter in list(self._adapters.values()):
            changed |= self._remove(adapter)
        for adapter in self._snapshot.values():
            changed |= self._put(adapter)
        self._snapshot = {}
        self.loaded = True
        return changed

    def _put(self, adapter: Adapter) -> set[str]:
        self._adapters[adapter.adapter_id] = adapter
        self._ids.setdefault(adapter.digest, set()).add(adapter.adapter_id)
        self._engines[adapter.digest] = adapter.engines
        return {adapter.digest}

    def _remove(self, adapter: Adapter) -> set[str]:
        del self._adapters[adapter.adapter_id]
        ids = self._ids[adapter.digest]
        ids.discard(adapter.adapter_id)
        if not ids:
            del self._ids[adapter.digest]
            del self._engines[adapter.digest]
        return {adapter.digest}


def best_tier(tiers: Iterable[Tier]) -> Tier:
    """The best of the tiers an adapter is in; REMOTE when it is in none."""
    return max(tiers, default=Tier.REMOTE)
