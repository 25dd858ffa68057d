"""What a client is written, and when."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import pytest

import router.outbox
from router.errors import ClientTooSlow
from router.messages import Delta
from router.outbox import LOADED, Outbox, Pulse
from tests.router.fakes import FakeEngine, request, running, until
from tests.router.test_answers import collect, failure


def piece(number: int) -> Delta:
    return Delta(f"{number} ", [number], [], [])


async def reader(outbox: Outbox, seen: list[list[int]]) -> None:
    while isinstance(delta := await outbox.next(), Delta):
        assert delta.text == "".join(f"{token} " for token in delta.token_ids)
        seen.append(list(delta.token_ids))


async def test_with_little_to_do_every_piece_goes_at_once() -> None:
    outbox, seen = Outbox(Pulse(), 1 << 20), list[list[int]]()
    task = asyncio.create_task(reader(outbox, seen))
    for number in range(5):
        await asyncio.sleep(0.001)
        outbox.put(piece(number))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert seen == [[n] for n in range(number + 1)]
    task.cancel()


async def test_under_load_the_first_piece_goes_at_once_and_the_others_with_the_beat(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Given a router with much to do, whose pulse beats when the test says so
    monkeypatch.setattr(router.outbox, "BEAT", 3600.0)
    pulse = Pulse()
    noise, outbox, seen = Outbox(pulse, 1 << 20), Outbox(pulse, 1 << 20), list[list[int]]()
    for number in range(LOADED + 1):
        noise.put(piece(number))
    pulse._beat()
    assert pulse.is_loaded
    task = asyncio.create_task(reader(outbox, seen))
    await asyncio.sleep(0)
    outbox.put(piece(0))
    await asyncio.sleep(0.001)
    assert seen == [[0]]
    for beat in range(8):
        for number in range(10):
            outbox.put(piece(1 + 10 * beat + number))
            for other in range(LOADED // 4):
                noise.put(piece(other))
        await asyncio.sleep(0.001)
        assert len(seen) == 1 + beat
        pulse._beat()
        await asyncio.sleep(0.001)
        assert seen[-1] == list(range(1 + 10 * beat, 11 + 10 * beat))
    # And the end does not wait, with all that was left
    outbox.put(piece(81))
    outbox.close(ClientTooSlow(1))
    await asyncio.gather(task, return_exceptions=True)
    assert seen[-1] == [81] and isinstance(task.exception(), ClientTooSlow)


async def test_what_is_unread_is_bounded() -> None:
    outbox = Outbox(Pulse(), 10_000)
    assert outbox.put(Delta("x" * 9_000, [1], [], [])) is None
    error = outbox.put(Delta("x" * 1_000, [2], [], []))
    assert isinstance(error, ClientTooSlow) and error.metadata["limit"] == "10000"


async def test_a_client_that_never_reads_is_ended_at_the_bound_and_told_so() -> None:
    async with running(engines=[FakeEngine(word="w" * 4096)], max_unread_kib=64) as r:
        stuck: Any = r.generation.StreamGenerate(request("stuck", tokens=10**6))
        await stuck.read()
        # The engine is rid of it, however long the client stays
        await until(lambda: r.engine.cancelled == [1], 20)
        code, info, _ = await failure(collect(stuck))
        assert (code, info.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "CLIENT_TOO_SLOW")
        # One that waits for its whole answer has nothing to read meanwhile
        assert len((await r.generation.Generate(request(tokens=100), timeout=20)).text) == 409_600
