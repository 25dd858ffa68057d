"""Engines that die, come back, or are not what they should be."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc

from router import dispatch
from tests.router.fakes import FakeEngine, adapter, request, running, until
from tests.router.test_answers import collect, failure


async def test_requests_without_a_token_wait_for_the_engine_to_come_back_in_their_order() -> None:
    engine = FakeEngine(max_sequences=2, starts=lambda submission: False)
    async with running(engines=[engine]) as r:
        # Given four requests of one flow, two of them dispatched
        calls = [r.generation.Generate(request(str(n)), timeout=20) for n in range(4)]
        await until(lambda: len(engine.submitted) == 2 and r.router.dispatcher.queued == 2)
        order = [one.request.text for one in engine.submitted]
        # When the engine dies and comes back
        await engine.stop()
        engine.starts = lambda submission: True
        engine.submitted.clear()
        await engine.start()
        # Then all are answered, those that had been dispatched first
        answers = await asyncio.gather(*calls)
        assert [one.request.text for one in engine.submitted][:2] == order
        assert all(answer.completion.receipt.migrations == 0 for answer in answers)
        assert {answer.completion.receipt.charge for answer in answers} == {1 + 2 * 5}


async def test_another_engine_takes_over_what_had_no_token() -> None:
    first, second = FakeEngine("engine-0", starts=lambda submission: False), FakeEngine("engine-1")
    async with running(adapter("a", engines=("engine-0",)), engines=[first, second]) as r:
        call = r.generation.Generate(request("x", "a"), timeout=20)
        await until(lambda: first.submitted)
        await first.stop()
        answer = await call
        assert (answer.completion.receipt.engine_id, answer.completion.receipt.migrations) == ("engine-1", 1)


async def test_what_one_engine_said_of_a_prompt_another_does_not_repeat() -> None:
    asked = request("x", "a", tokens=4)
    asked.output.prompt_logprobs = True
    first, second = FakeEngine("engine-0", scores=2, answers=False), FakeEngine("engine-1", scores=3)
    async with running(adapter("a", engines=("engine-0",)), engines=[first, second]) as r:
        stream: Any = r.generation.StreamGenerate(asked, timeout=20)
        # Given the client has heard of half of its prompt from an engine that then dies
        said: list[int] = []
        while len(said) < 4:
            said += [entry.token_id for entry in (await stream.read()).delta.prompt_logprobs]
        await first.stop()
        events = await collect(stream)
        said += [entry.token_id for event in events for entry in event.delta.prompt_logprobs]
        assert said == list(range(6))
        assert [token for event in events for token in event.delta.token_ids] == list(range(4))
        assert events[-1].completion.receipt.migrations == 1
        assert events[-1].completion.receipt.time_to_first_token.ToNanoseconds() > 0
        # And a unary call has all of it in one piece
        unary = await r.generation.Generate(asked, timeout=20)
        assert [entry.token_id for entry in unary.prompt_logprobs] == list(range(6))


async def test_an_answer_that_had_begun_is_aborted() -> None:
    async with running() as r:
        stream = r.generation.StreamGenerate(request(tokens=10**6), timeout=20)
        await stream.read()
        await r.engine.stop()
        code, info, _ = await failure(collect(stream))
        assert (code, info.reason) == (grpc.StatusCode.ABORTED, "ENGINE_LOST")
        assert info.metadata["engine_id"] == "engine-0"


async def test_without_an_engine_requests_wait_for_a_moment_and_are_then_refused() -> None:
    async with running() as r:
        await r.engine.stop()
        await until(lambda: not r.router.fleet.engines)
        # Given the moment is not over, a request waits, and is told when it is
        loop = asyncio.get_running_loop()
        began = loop.time()
        code, info, _ = await failure(r.generation.Generate(request(), timeout=20))
        assert (code, info.reason) == (grpc.StatusCode.UNAVAILABLE, "NO_ENGINE")
        assert 0.5 < loop.time() - began < dispatch.GRACE + 1
        # And from then on refused at once
        began = loop.time()
        code, info, _ = await failure(r.generation.Generate(request(), timeout=20))
        assert (code, info.reason) == (grpc.StatusCode.UNAVAILABLE, "NO_ENGINE")
        assert loop.time() - began < 0.5
        # And answered again when an engine is back
        await r.engine.start()
        await until(lambda: r.ready)
        assert (await r.generation.Generate(request(), timeout=5)).token_ids


async def test_an_engine_with_another_base_is_not_used() -> None:
    engines = [FakeEngine("engine-0"), FakeEngine("engine-1", base_digest="another")]
    async with running(engines=engines, connected=1) as r:
        await asyncio.sleep(0.5)
        assert len(r.router.fleet.engines) == 1
        (used,) = r.router.fleet.engines
        for _ in range(4):
            answer = await r.generation.Generate(request(), timeout=5)
            assert answer.completion.receipt.engine_id == used.engine_id


async def test_two_engines_share_the_load() -> None:
    engines = [FakeEngine("engine-0", max_sequences=4), FakeEngine("engine-1", max_sequences=4)]
    async with running(engines=engines) as r:
        await asyncio.gather(*[r.generation.Generate(request(), timeout=10) for _ in range(40)])
        assert min(len(engine.submitted) for engine in engines) >= 10
