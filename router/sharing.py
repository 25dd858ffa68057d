"""Charges shared with other routers through Redis. Without Redis each goes on by itself, and tells later what it served."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from router.ledger import Begun, Elsewhere, Ledger, Name
from servicekit.errors import StartupError

_log = logging.getLogger(__name__)

_SCRIPT = Path(__file__).parent / "scripts" / "exchange.lua"
_INTERVAL = 0.1
_LONGEST_DELAY = 5.0
_TIMEOUT = 2.0
# A lead is a few answers' worth: after an hour without any service there is none.
_TTL = 3600
_MOST_FLOWS = 100_000


@dataclass
class _Party:
    """The flows of one base: their ledger, how far each is ahead, and where news of others goes."""

    base: str
    ledger: Ledger
    lead: Callable[[Name], tuple[int, int]]
    post: Callable[[Elsewhere | Begun], None]
    known: int = field(default=-1, init=False)


class Sharing:
    """Tells and asks for all parties, ten times a second."""

    def __init__(self, url: str, name: str) -> None:
        try:
            self._redis: Any = Redis.from_url(
                url, socket_timeout=_TIMEOUT, socket_connect_timeout=_TIMEOUT, retry=Retry(NoBackoff(), 0)
            )
        except ValueError as error:
            raise StartupError(f"--redis: {error}") from None
        self._script = self._redis.register_script(_SCRIPT.read_text(encoding="utf-8"))
        self._name = name
        self._parties: list[_Party] = []
        self._stopped = asyncio.Event()
        self.reachable = True

    def add(
        self,
        base: str,
        ledger: Ledger,
        lead: Callable[[Name], tuple[int, int]],
        post: Callable[[Elsewhere | Begun], None],
    ) -> None:
        """Shares the charges of the flows of a base from now on: `lead` tells how far one is ahead, `post` takes the news."""
        self._parties.append(_Party(base, ledger, lead, post))

    async def run(self) -> None:
        """Goes on until it is stopped; the last is told by `close`."""
        delay = _INTERVAL
        while not self._stopped.is_set():
            try:
                for party in self._parties:
                    await self._exchange(party)
            except (RedisError, OSError) as error:
                if self.reachable:
                    _log.warning("charges are not shared: %s", error)
                self.reachable = False
                delay = min(2 * delay, _LONGEST_DELAY)
            else:
                if not self.reachable:
                    _log.info("charges are shared again")
                self.reachable = True
                delay = _INTERVAL
            with suppress(TimeoutError):
                await asyncio.wait_for(self._stopped.wait(), delay)

    def stop(self) -> None:
        """Ends `run` soon. Cancelling it may not: a cancellation can get lost in the client's own timeouts."""
        self._stopped.set()

    async def close(self) -> None:
        """Tells what is left, if it can be told."""
        try:
            for party in self._parties:
                await self._exchange(party, all_of_it=True)
        except (RedisError, OSError) as error:
            _log.warning("the last charges were not shared: %s", error)
        await self._redis.aclose()

    async def _exchange(self, party: _Party, *, all_of_it: bool = False) -> None:
        told = {} if party.known < 0 else party.ledger.take(all_of_it=all_of_it)
        arguments = [part for name, tokens in told.items() for part in (_field(name), tokens, _lead(party, name))]
        try:
            number, served, leads = await self._script(
                keys=self._keys(party.base), args=[party.known, _TTL, _MOST_FLOWS, *arguments]
            )
        except BaseException:
            party.ledger.put_back(told)
            raise
        if party.known < 0:
            party.ledger.begin(_read(served))
            party.post(Begun({name: _pair(lead) for name, lead in _pairs(leads)}))
        elif number < party.known:
            # Redis has forgotten everything; what was told is gone for the others, and nothing else.
            party.ledger.begin(_read(served))
        elif news := party.ledger.learn(_read(served), told):
            party.post(Elsewhere(news))
        party.known = number

    def _keys(self, base: str) -> list[str]:
        """One hash tag, so that the script may touch them all on a cluster."""
        stem = f"loraplex:{{{self._name}}}:router:{base}"
        return [f"{stem}:{what}" for what in ("served", "changes", "leads", "number")]


def _field(name: Name) -> str:
    """No tenant has a line break in its name, and no digest."""
    return "\n".join(name)


def _lead(party: _Party, name: Name) -> str:
    return " ".join(map(str, party.lead(name)))


def _pair(lead: bytes) -> tuple[int, int]:
    of_flow, of_tenant = lead.split()
    return int(of_flow), int(of_tenant)


def _pairs(flat: Iterable[bytes]) -> Iterator[tuple[Name, bytes]]:
    parts = iter(flat)
    for flow, value in zip(parts, parts, strict=True):
        tenant, _, digest = flow.decode().partition("\n")
        yield (tenant, digest), value


def _read(flat: Iterable[bytes]) -> Mapping[Name, int]:
    return {name: int(number) for name, number in _pairs(flat)}
