"""The queue is the cache's look-ahead: what waits is said, who has waited longest first, and taken back when it is over."""

from __future__ import annotations

import asyncio

import pytest

from loraplex.cache.v1 import residency_pb2
from router import look_ahead
from tests.router.fakes import FakeEngine, adapter, request, running, until


def heard(said: list[residency_pb2.LookAheadRequest]) -> list[tuple[str, str]] | None:
    return [(one.digest, one.tenant) for one in said[-1].expected] if said else None


async def test_the_cache_hears_what_waits_and_what_waits_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(look_ahead, "RENEW", 0.2)
    names = ["warm", "other", "third"]
    engine = FakeEngine(max_sequences=1)
    async with running(*(adapter(name, engines=("engine-0",)) for name in names), engines=[engine]) as r:
        engine.stepping.clear()
        # Given one request that runs and others behind it, all with adapters that are on the device
        calls = []
        for text, name in (("a", "warm"), ("b", "other"), ("c", "third"), ("d", "other"), ("e", "")):
            calls.append(
                r.generation.Generate(request(text, name), metadata=(("x-loraplex-tenant", text),), timeout=20)
            )
            await until(lambda: len(engine.submitted) + r.router.dispatcher.queued == len(calls))
        expected = [("digest-other", "b"), ("digest-third", "c")]
        await until(lambda: heard(r.cache.look_aheads) == expected)
        said = r.cache.look_aheads[-1]
        assert said.router_id and said.expected[0].waited_ms >= said.expected[1].waited_ms >= 0
        # It is said again before the cache forgets it
        count = len(r.cache.look_aheads)
        await until(lambda: len(r.cache.look_aheads) > count)
        # When all are answered, nothing is expected any more, and that is said once
        engine.stepping.set()
        await asyncio.gather(*calls)
        await until(lambda: heard(r.cache.look_aheads) == [])
        count = len(r.cache.look_aheads)
        await asyncio.sleep(0.3)
        assert len(r.cache.look_aheads) == count
