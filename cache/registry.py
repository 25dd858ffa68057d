"""Adapters, bases, residency and leases in Redis: one operation per Lua script, no Redis error gets out."""

from __future__ import annotations

import dataclasses
import json
import logging
import uuid
from collections.abc import AsyncIterator, Collection, Iterable, Mapping
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from redis.exceptions import RedisError

from cache.artifact import BaseDescription
from cache.errors import RegistryUnreachable
from cache.keys import Keys
from cache.redis_url import connect, disconnect, without_password

_log = logging.getLogger(__name__)

SCRIPTS = Path(__file__).parent / "scripts"
# A lost Redis must be noticed within a request's patience. redis-py's own defaults would take seconds.
TIMEOUT_SECONDS = 0.8
NODE_TTL_MS = 10_000
FETCH_TTL_MS = 10_000


@dataclass(frozen=True)
class AdapterRecord:
    """What is known of an adapter for good.

    Attributes:
        create_time_ms: when this version was registered, milliseconds since 1970.
        state: "active" or "draining".
        base_digest: the base it was validated against.
        source_revision: what its source said it was then; see Source.look.
        stored: its text in Redis, by which a change makes sure that it replaces what it was made from.
    """

    adapter_id: str
    source_uri: str
    digest: str
    base_model: str
    method: str
    rank: int
    size_bytes: int
    pinned: bool
    weight: float
    create_time_ms: int
    chat_template: str
    target_modules: tuple[str, ...]
    state: str = "active"
    base_digest: str = ""
    source_revision: str = ""
    stored: str = field(default="", compare=False, repr=False)

    def to_json(self) -> str:
        """The record as it is stored."""
        return json.dumps({**asdict(self), "stored": None}, sort_keys=True)

    @staticmethod
    def from_json(text: str) -> AdapterRecord:
        """A stored record; fields of a newer cache are left alone. Raises ValueError, KeyError or TypeError."""
        known = {each.name for each in dataclasses.fields(AdapterRecord)}
        stored = json.loads(text)
        if not isinstance(stored, dict):
            raise ValueError("not an object")
        fields = {name: value for name, value in stored.items() if name in known}
        return AdapterRecord(**{**fields, "target_modules": tuple(fields["target_modules"]), "stored": text})


@dataclass(frozen=True)
class Snapshot:
    """The whole registry at one point in time.

    Attributes:
        epoch: which registry it is; another one after it was emptied.
        revision: how many changes of adapters there were.
    """

    epoch: str
    revision: int
    bases: tuple[BaseDescription, ...]
    records: Mapping[str, AdapterRecord]


@dataclass(frozen=True)
class NodeState:
    """What a node says of itself.

    Attributes:
        address: where its artifacts are read; "" when it does not say.
        run: its process.
        serial: counts what this process has told.
        held: digest -> tiers.
        bases: digests of the bases that its engines serve.
    """

    address: str = ""
    run: str = ""
    serial: int = 0
    held: Mapping[str, list[str]] = field(default_factory=dict)
    bases: tuple[str, ...] = ()


@dataclass(frozen=True)
class Pulse:
    """What a heartbeat learns.

    Attributes:
        nodes: every living node.
        leases: (owner, digest) that hold.
        last_use: digest -> milliseconds since 1970, of those used since what was asked for.
        now_ms: Redis's clock.
    """

    epoch: str
    revision: int
    nodes: Mapping[str, NodeState]
    leases: frozenset[tuple[str, str]]
    last_use: Mapping[str, int]
    now_ms: int


@dataclass(frozen=True)
class Beat:
    """What a heartbeat tells.

    Attributes:
        renewed, ended: (owner, digest) leases that go on, and that have ended.
        used: digests that were used since the last one.
        since_ms: uses since then are asked for.
    """

    node_id: str
    state: NodeState
    renewed: frozenset[tuple[str, str]]
    ended: frozenset[tuple[str, str]]
    used: frozenset[str]
    since_ms: int


@dataclass(frozen=True)
class Hint:
    """Someone has changed an adapter."""

    revision: int
    adapter_id: str


@dataclass(frozen=True)
class Moved:
    """Versions are in other tiers of a node than before: digest -> all tiers they are in now."""

    node_id: str
    run: str
    serial: int
    held: Mapping[str, list[str]]


class Registry:
    """The registry in Redis. Every method raises RegistryUnreachable when Redis does not answer in time."""

    def __init__(self, url: str, name: str) -> None:
        self._redis: Any = connect(url, TIMEOUT_SECONDS)
        self.url = without_password(url)
        self._keys = Keys(name)
        self._scripts = {path.stem: self._redis.register_script(path.read_text()) for path in SCRIPTS.glob("*.lua")}

    async def load(self) -> Snapshot:
        """The whole registry; made when there is none."""
        names = self._keys
        keys = [names.epoch, names.revision, names.bases, names.base, names.adapters]
        epoch, revision, bases, *rows = await self._run("load", keys, [uuid.uuid4().hex])
        records = {}
        for adapter_id, text in zip(rows[::2], rows[1::2], strict=True):
            record = _record_from(adapter_id, text)
            if record is not None:
                records[adapter_id] = record
        return Snapshot(epoch, int(revision), _bases_from(bases), records)

    async def read(self, adapter_id: str) -> AdapterRecord | None:
        """One adapter."""
        async with _redis_errors():
            text = await self._redis.hget(self._keys.adapters, adapter_id)
        return _record_from(adapter_id, text) if text else None

    async def put(self, record: AdapterRecord, replaces: AdapterRecord | None) -> tuple[int, AdapterRecord]:
        """Writes a record; returns the revision of the change and the record as stored.

        The revision is 0, and nothing was written, when the record there is not `replaces`.
        """
        text = record.to_json()
        expected = replaces.stored if replaces else ""
        revision = await self._run("put_adapter", self._adapter_keys, [record.adapter_id, text, expected])
        return int(revision), dataclasses.replace(record, stored=text)

    async def delete(self, record: AdapterRecord) -> int:
        """Deletes a record; returns the revision of the change, 0 when the record there is another."""
        return int(await self._run("delete_adapter", self._adapter_keys, [record.adapter_id, record.stored]))

    async def describe_base(self, base: BaseDescription) -> None:
        """Keeps the description of a base, in place of an earlier one of the same base."""
        keys = [self._keys.bases, self._keys.base]
        await self._run("describe_base", keys, [base.digest, json.dumps(asdict(base))])

    async def bases(self, but: Collection[str]) -> tuple[BaseDescription, ...]:
        """The bases there are, without those whose digests the caller has."""
        async with _redis_errors():
            missing = [digest for digest in await self._redis.hkeys(self._keys.bases) if digest not in but]
            found = await self._redis.hmget(self._keys.bases, missing) if missing else []
        return _bases_from([each for each in found if each])

    async def heartbeat(self, beat: Beat) -> Pulse:
        """Tells that a node lives; returns what there is to know."""
        names = self._keys
        keys = [names.nodes, names.residency, names.leases, names.epoch, names.revision, names.last_use]
        renewed, ended = ([" ".join(lease) for lease in leases] for leases in (beat.renewed, beat.ended))
        counts = [beat.since_ms, len(renewed), len(beat.used)]
        arguments = [beat.node_id, NODE_TTL_MS, json.dumps(asdict(beat.state)), *counts, *renewed, *beat.used, *ended]
        epoch, revision, nodes, leases, uses, now = await self._run("heartbeat", keys, arguments)
        return Pulse(
            epoch,
            int(revision),
            {node: _node_from(text) for node, text in zip(nodes[::2], nodes[1::2], strict=True)},
            frozenset((owner, digest) for owner, _, digest in (lease.rpartition(" ") for lease in leases)),
            {digest: int(float(at)) for digest, at in zip(uses[::2], uses[1::2], strict=True)},
            int(now),
        )

    async def tell(self, moved: Moved) -> None:
        """Tells all nodes at once what has moved on one; who misses it learns it from a heartbeat."""
        said = {"node": moved.node_id, "run": moved.run, "serial": moved.serial, "moved": moved.held}
        async with _redis_errors():
            await self._redis.publish(self._keys.events, json.dumps(said))

    async def lock_fetch(self, what: str, owner: str) -> bool:
        """Takes or keeps the right to fetch something for FETCH_TTL_MS; False when another has it."""
        return bool(await self._run("lock_fetch", [self._keys.fetch(what)], [owner, FETCH_TTL_MS]))

    async def unlock_fetch(self, what: str, owner: str) -> None:
        """Gives the right to fetch something back."""
        await self._run("unlock_fetch", [self._keys.fetch(what)], [owner])

    async def hints(self) -> AsyncIterator[Hint | Moved | None]:
        """What others have changed; None when the connection is new, so anything may have changed."""
        async with _redis_errors(), self._redis.pubsub() as channel:
            await channel.subscribe(self._keys.events)
            yield None
            while True:
                message = await channel.get_message(ignore_subscribe_messages=True, timeout=30)
                if message is not None:
                    said = json.loads(message["data"])
                    if "moved" in said:
                        yield Moved(said["node"], said["run"], said["serial"], said["moved"])
                    else:
                        yield Hint(said["revision"], said["adapter_id"])

    async def close(self) -> None:
        """Closes the connections."""
        await disconnect(self._redis)

    @property
    def _adapter_keys(self) -> list[str]:
        return [self._keys.adapters, self._keys.revision, self._keys.events]

    async def _run(self, script: str, keys: list[str], arguments: list[Any]) -> Any:
        async with _redis_errors():
            return await self._scripts[script](keys=keys, args=arguments)


@asynccontextmanager
async def _redis_errors() -> AsyncIterator[None]:
    try:
        yield
    except (TimeoutError, RedisError, OSError) as error:
        _log.debug("Redis: %s", error)
        raise RegistryUnreachable from None


def _record_from(adapter_id: str, text: str) -> AdapterRecord | None:
    try:
        return AdapterRecord.from_json(text)
    except (ValueError, KeyError, TypeError):
        _log.error("the record of adapter %s cannot be read, it is left out", adapter_id)
        return None


def _node_from(text: str) -> NodeState:
    """What a node said of itself; nothing when it speaks another version's language."""
    try:
        said = json.loads(text)
        bases = tuple(said.get("bases", ()))
        return NodeState(str(said["address"]), str(said["run"]), int(said["serial"]), said["held"], bases)
    except (ValueError, KeyError, TypeError):
        return NodeState()


def _bases_from(rows: Iterable[str]) -> tuple[BaseDescription, ...]:
    """The descriptions that can be read; an engine of a base that is left out describes it again."""
    bases = []
    for text in rows:
        try:
            fields = json.loads(text)
            known = {each.name: fields[each.name] for each in dataclasses.fields(BaseDescription)}
            modules = {name: (widths[0], widths[1]) for name, widths in known["modules"].items()}
            bases.append(BaseDescription(**{**known, "modules": modules}))
        except (ValueError, KeyError, TypeError):
            _log.error("the description of a base cannot be read, it is left out")
    return tuple(bases)
