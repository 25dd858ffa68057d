"""Adapters, the base, residency and leases in Redis: one operation per Lua script, no Redis error gets out."""

from __future__ import annotations

import json
import uuid
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import redis.asyncio
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from cache.artifact import BaseDescription
from cache.errors import RegistryUnreachable
from cache.keys import Keys
from servicekit.errors import StartupError

SCRIPTS = Path(__file__).parent / "scripts"
# A lost Redis must be noticed within a request's patience. redis-py's own defaults would take seconds.
TIMEOUT_SECONDS = 1.0
NODE_TTL_MS = 10_000


@dataclass(frozen=True)
class AdapterRecord:
    """What is known of an adapter for good.

    Attributes:
        create_time_ms: when this version was registered, milliseconds since 1970.
        state: "active" or "draining".
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

    def to_json(self) -> str:
        return json.dumps(asdict(self), sort_keys=True)

    @staticmethod
    def from_json(text: str) -> AdapterRecord:
        fields = json.loads(text)
        return AdapterRecord(**{**fields, "target_modules": tuple(fields["target_modules"])})


class Registry:
    """The registry in Redis. Every method raises RegistryUnreachable when Redis does not answer in time."""

    def __init__(self, url: str, name: str) -> None:
        try:
            self._redis: Any = redis.asyncio.Redis.from_url(
                url,
                decode_responses=True,
                socket_timeout=TIMEOUT_SECONDS,
                socket_connect_timeout=TIMEOUT_SECONDS,
                retry=Retry(NoBackoff(), 1),
            )
        except ValueError as error:
            raise StartupError(f"--redis {_without_password(url)}: {error}") from None
        self.url = _without_password(url)
        self._keys = Keys(name)
        self._scripts = {path.stem: self._redis.register_script(path.read_text()) for path in SCRIPTS.glob("*.lua")}

    async def epoch(self) -> str:
        """The registry's identity: the same for as long as nothing emptied it."""
        async with _redis_errors():
            await self._redis.set(self._keys.epoch, uuid.uuid4().hex, nx=True)
            return str(await self._redis.get(self._keys.epoch))

    async def load(self) -> dict[str, AdapterRecord]:
        """All adapters."""
        async with _redis_errors():
            rows = await self._redis.hgetall(self._keys.adapters)
        return {adapter_id: AdapterRecord.from_json(text) for adapter_id, text in rows.items()}

    async def read(self, adapter_id: str) -> AdapterRecord | None:
        """One adapter."""
        async with _redis_errors():
            text = await self._redis.hget(self._keys.adapters, adapter_id)
        return AdapterRecord.from_json(text) if text else None

    async def put(self, record: AdapterRecord, replaces: AdapterRecord | None, kind: str) -> bool:
        """Writes a record; False when the one there is not `replaces`."""
        expected = replaces.to_json() if replaces else ""
        return bool(await self._put(record, expected, kind))

    async def restore(self, record: AdapterRecord) -> None:
        """Writes a record whatever is there: for a registry that was emptied."""
        await self._put(record, "*", "registered")

    async def _put(self, record: AdapterRecord, expected: str, kind: str) -> Any:
        keys = [self._keys.adapters, self._keys.events]
        return await self._run("put_adapter", keys, [record.adapter_id, record.to_json(), expected, kind])

    async def delete(self, record: AdapterRecord) -> bool:
        """Deletes a record; False when the one there is another."""
        keys = [self._keys.adapters, self._keys.events]
        return bool(await self._run("delete_adapter", keys, [record.adapter_id, record.to_json()]))

    async def describe_base(self, base: BaseDescription) -> BaseDescription:
        """Offers a base; returns the one in force, which differs when adapters of another are registered."""
        raw = await self._run("describe_base", [self._keys.base, self._keys.adapters], [json.dumps(asdict(base))])
        return _base_from(raw)

    async def base(self) -> BaseDescription | None:
        """The base in force."""
        async with _redis_errors():
            raw = await self._redis.get(self._keys.base)
        return _base_from(raw) if raw else None

    async def heartbeat(
        self, node_id: str, residency: Mapping[str, Iterable[str]], leases: Iterable[tuple[str, str]]
    ) -> dict[str, dict[str, list[str]]]:
        """Tells that this node lives, what is in which tiers, and which (owner, digest) leases are to be renewed.

        Returns the residency of every living node: node_id -> digest -> tiers.
        """
        keys = [self._keys.nodes, self._keys.residency, self._keys.leases]
        held = json.dumps({digest: list(tiers) for digest, tiers in residency.items()})
        owned = [f"{owner} {digest}" for owner, digest in leases]
        flat = await self._run("heartbeat", keys, [node_id, NODE_TTL_MS, held, *owned])
        return {node: json.loads(text) for node, text in zip(flat[::2], flat[1::2], strict=True)}

    async def events(self) -> AsyncIterator[str | None]:
        """Ids of adapters that someone changed; None when the connection is new, so anything may have changed."""
        async with _redis_errors(), self._redis.pubsub() as channel:
            await channel.subscribe(self._keys.events)
            yield None
            while True:
                message = await channel.get_message(ignore_subscribe_messages=True, timeout=30)
                if message is not None:
                    yield json.loads(message["data"])["adapter_id"]

    async def close(self) -> None:
        """Closes the connections."""
        await self._redis.aclose()

    async def _run(self, script: str, keys: list[str], arguments: list[Any]) -> Any:
        async with _redis_errors():
            return await self._scripts[script](keys=keys, args=arguments)


@asynccontextmanager
async def _redis_errors() -> AsyncIterator[None]:
    try:
        yield
    except (TimeoutError, RedisError, OSError):
        raise RegistryUnreachable from None


def _base_from(raw: str) -> BaseDescription:
    fields = json.loads(raw)
    modules = {name: (widths[0], widths[1]) for name, widths in fields["modules"].items()}
    return BaseDescription(**{**fields, "modules": modules})


def _without_password(url: str) -> str:
    scheme, separator, rest = url.partition("://")
    return f"{scheme}{separator}{rest.rpartition('@')[2]}"
