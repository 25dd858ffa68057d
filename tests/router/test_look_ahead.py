"""The queue is the cache's look-ahead: what waits is said, who has waited longest first, and taken back when it is over."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

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


def test_who_has_waited_longest_is_first_whichever_base_it_waits_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def waiting(arrived_at: float, digest: str) -> Any:
        return SimpleNamespace(arrived_at=arrived_at, adapter=SimpleNamespace(digest=digest))

    one = [waiting(1, "a"), waiting(2, ""), waiting(5, "b"), waiting(6, "a")]
    other = [waiting(0, "c"), waiting(3, "c"), waiting(4, "d")]
    assert [(r.adapter.digest, r.arrived_at) for r in look_ahead.first_of_each([one, other])] == [
        ("c", 0),
        ("a", 1),
        ("d", 4),
        ("b", 5),
    ]
    monkeypatch.setattr(look_ahead, "MOST", 2)
    assert [r.adapter.digest for r in look_ahead.first_of_each([one, other])] == ["c", "a"]
