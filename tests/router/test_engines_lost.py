"""Engines that die, come back, or are not what they should be."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc

from loraplex.v1 import adapter_pb2, generation_pb2
from router import dispatch
from router.fleet import EngineDown, Fleet, Frame
from tests.router.fakes import WORDS, FakeEngine, adapter, request, running, until
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


async def test_another_engine_goes_on_with_an_answer_and_the_client_cannot_tell() -> None:
    first, second = FakeEngine("engine-0"), FakeEngine("engine-1")
    async with running(adapter("a", engines=("engine-0",)), engines=[first, second]) as r:
        asked = request("Hello", "a", tokens=200)
        asked.sampling.temperature = 1.0
        stream: Any = r.generation.StreamGenerate(asked, timeout=20)
        events = [await stream.read() for _ in range(5)]
        unary = r.generation.Generate(asked, timeout=20)
        await until(lambda: len(first.running) == 2 and all(done > 3 for _, done in first.running.values()))
        await first.stop()
        events += await collect(stream)
        answer = await unary
        # Then text and tokens are as if nothing had happened
        assert (
            [token for event in events for token in event.delta.token_ids] == list(range(200)) == list(answer.token_ids)
        )
        assert "".join(event.delta.text for event in events) == answer.text == "".join(WORDS[n % 5] for n in range(200))
        for completion in (events[-1].completion, answer.completion):
            # And the prompt is the prompt, charged once
            usage, receipt = completion.usage, completion.receipt
            assert (usage.prompt_tokens, usage.output_tokens) == (5, 200)
            assert (receipt.engine_id, receipt.migrations, receipt.charge) == ("engine-1", 1, 5 + 2 * 200)
            assert receipt.adapter_wait.ToMilliseconds() == 14
        # And the second engine was told what had been answered, and the seed it was answered with
        for one in second.submitted:
            assert one.continuation.prompt_tokens == 5 and len(one.continuation.token_ids) >= 3
            assert one.request.sampling.seed and one.request.sampling.HasField("seed")
        assert {s.request.sampling.seed for s in second.submitted} == {s.request.sampling.seed for s in first.submitted}


async def test_answers_that_move_go_first_in_their_order_and_wait_for_room() -> None:
    first, second = FakeEngine("engine-0", max_sequences=4), FakeEngine("engine-1", max_sequences=4)
    async with running(engines=[first, second]) as r:
        streams: list[Any] = [r.generation.StreamGenerate(request(str(n), tokens=150), timeout=30) for n in range(8)]
        begun = [[await stream.read()] for stream in streams]
        queued = [r.generation.Generate(request("queued"), timeout=30) for _ in range(6)]
        await until(lambda: r.router.dispatcher.queued == 6)
        already = len(second.submitted)
        moved = [one.request.text for one, _ in first.running.values()]
        await first.stop()
        for seen, stream in zip(begun, streams, strict=True):
            seen += await collect(stream)
            assert [token for event in seen for token in event.delta.token_ids] == list(range(150))
        await asyncio.gather(*queued)
        assert [one.request.text for one in second.submitted[already:]][:4] == moved


async def test_an_answer_nobody_can_go_on_with_is_unavailable_and_not_charged() -> None:
    async with running() as r:
        stream = r.generation.StreamGenerate(request(tokens=10**6), timeout=20)
        await stream.read()
        await r.engine.stop()
        code, info, _ = await failure(collect(stream))
        assert (code, info.reason) == (grpc.StatusCode.UNAVAILABLE, "ENGINE_LOST")
        assert int(info.metadata["output_tokens"]) > 0
        (loop,) = r.router.dispatcher._loops.values()
        assert loop._flows.charge_of("default", "") == 0


async def test_the_same_engine_goes_on_when_it_is_back_in_time() -> None:
    async with running() as r:
        stream: Any = r.generation.StreamGenerate(request(tokens=300), timeout=20)
        events = [await stream.read()]
        await r.engine.stop()
        await r.engine.start()
        events += await collect(stream)
        assert [token for event in events for token in event.delta.token_ids] == list(range(300))
        assert events[-1].completion.receipt.migrations == 0


async def test_an_engine_that_drains_gets_nothing_new_and_no_request_fails() -> None:
    first, second = FakeEngine("engine-0", max_sequences=4), FakeEngine("engine-1", max_sequences=4)
    async with running(engines=[first, second]) as r:
        streams: list[Any] = [r.generation.StreamGenerate(request(tokens=100), timeout=30) for _ in range(8)]
        begun = [[await stream.read()] for stream in streams]
        # Given requests wait, some of which are sent to the engine just when it begins to drain
        queued = [r.generation.Generate(request("queued", tokens=20), timeout=30) for _ in range(40)]
        await until(lambda: len([s for s in first.submitted if s.request.text == "queued"]) >= 2)
        first.drain()
        await until(lambda: r.router.fleet.engines[0].is_draining)
        before = len(first.submitted)
        # Then what runs there ends there, everything else is answered by the other
        for seen, stream in zip(begun, streams, strict=True):
            seen += await collect(stream)
            assert [token for event in seen for token in event.delta.token_ids] == list(range(100))
        assert {len(answer.token_ids) for answer in await asyncio.gather(*queued)} == {20}
        assert len(first.submitted) <= before + 1
        # And when it goes with work left, that moves
        late: Any = r.generation.StreamGenerate(request(tokens=100), timeout=30)
        assert (await collect(late))[-1].completion.receipt.engine_id == "engine-1"


async def test_a_silent_engine_is_lost_by_the_clock() -> None:
    now = 0.0
    engine = FakeEngine("engine-0")
    await engine.start()
    said: list[object] = []
    fleet = Fleet((engine.address,), "router", said.append, silence=15.0, now=lambda: now)
    task = asyncio.create_task(fleet.run())
    try:
        await until(lambda: fleet.engines)
        (first,) = fleet.engines
        now = 15.0
        fleet.check()
        await asyncio.sleep(0.01)
        assert fleet.engines == [first]
        # A word starts the clock anew
        engine.places = 3
        await until(lambda: any(isinstance(one, Frame) for one in said))
        now = 30.0
        fleet.check()
        await asyncio.sleep(0.01)
        assert fleet.engines == [first]
        now = 30.1
        fleet.check()
        await until(lambda: EngineDown(first) in said)
        # And it is asked again
        await until(lambda: fleet.engines and fleet.engines != [first])
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await engine.stop()


async def test_an_engine_that_hangs_loses_its_streams_to_another() -> None:
    first, second = FakeEngine("engine-0"), FakeEngine("engine-1")
    async with running(adapter("a", engines=("engine-0",)), engines=[first, second], engine_silence_seconds=0.3) as r:
        second.places = 8

        async def chatter() -> None:
            while True:
                second.places = 15 - (second.places or 0)
                await asyncio.sleep(0.05)

        heart = asyncio.create_task(chatter())
        stream: Any = r.generation.StreamGenerate(request("x", "a", tokens=100), timeout=20)
        events = [await stream.read()]
        first.silent = True
        events += await collect(stream)
        heart.cancel()
        assert [token for event in events for token in event.delta.token_ids] == list(range(100))
        assert events[-1].completion.receipt.engine_id == "engine-1"


async def test_an_engine_gets_no_more_than_it_has_room_for() -> None:
    engine = FakeEngine(max_sequences=8, places=3)
    async with running(engines=[engine]) as r:
        await asyncio.sleep(0.05)
        engine.starts = lambda submission: False
        calls = [r.generation.Generate(request(), timeout=20) for _ in range(6)]
        await until(lambda: len(engine.running) == 3)
        await asyncio.sleep(0.05)
        assert len(engine.running) == 3
        engine.places = 5
        await until(lambda: len(engine.running) == 5)
        engine.starts = lambda submission: True
        await asyncio.gather(*calls)


async def test_a_popular_adapter_is_brought_to_more_engines() -> None:
    engines = [FakeEngine(f"engine-{n}", max_sequences=2, starts=lambda submission: False) for n in range(3)]
    async with running(adapter("hot", engines=("engine-0",)), engines=engines) as r:
        calls = [r.generation.Generate(request("x", "hot"), timeout=20) for _ in range(2)]
        await until(lambda: len(engines[0].running) == 2)
        assert not r.cache.prefetches
        calls += [r.generation.Generate(request("x", "hot"), timeout=20)]
        await until(lambda: len(r.cache.prefetches) == 1)
        (wish,) = r.cache.prefetches
        assert wish.engine_id in ("engine-1", "engine-2")
        # Nothing is sent there before it is there; and then at once
        assert not engines[1].running and not engines[2].running
        r.cache.tell(adapter_pb2.AdapterEvent.KIND_RESIDENCY, adapter("hot", engines=("engine-0", wish.engine_id)))
        await until(lambda: sum(len(engine.running) for engine in engines) == 3)
        for engine in engines:
            engine.starts = lambda submission: True
        await asyncio.gather(*calls)


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


async def test_an_adapter_is_answered_by_the_base_it_was_made_for() -> None:
    engines = [FakeEngine("engine-0", base_digest="one"), FakeEngine("engine-1", base_digest="two")]
    ours, theirs = adapter("ours", base_digest="one"), adapter("theirs", base_digest="two")
    async with running(ours, theirs, adapter("lost", base_digest="three"), engines=engines) as r:
        for name, engine_id in (("ours", "engine-0"), ("theirs", "engine-1"), ("", "engine-0")):
            for _ in range(4):
                answer = await r.generation.Generate(request(adapter_id=name), timeout=5)
                assert answer.completion.receipt.engine_id == engine_id
        code, info, _ = await failure(r.generation.Generate(request(adapter_id="lost"), timeout=5))
        assert (code, info.reason) == (grpc.StatusCode.UNAVAILABLE, "NO_ENGINE")
        # And when the engines of one base are gone, the other's go on
        await engines[0].stop()
        code, info, _ = await failure(r.generation.Generate(request(adapter_id="ours"), timeout=20))
        assert (code, info.reason) == (grpc.StatusCode.UNAVAILABLE, "NO_ENGINE")
        assert (await r.generation.Generate(request(adapter_id="theirs"), timeout=5)).token_ids


async def test_the_base_that_answers_without_an_adapter_can_be_set_and_is_not_replaced() -> None:
    for named in ("two", "second"):
        engines = [
            FakeEngine("engine-0", base_digest="one"),
            FakeEngine("engine-1", base_digest="two", base_model="second"),
        ]
        async with running(engines=engines, default_base=named) as r:
            await until(lambda: len(r.router.fleet.engines) == 2)
            info = await r.generation.GetModelInfo(generation_pb2.GetModelInfoRequest(), timeout=5)
            assert [(base.base_digest, list(base.engine_ids)) for base in info.bases] == [
                ("two", ["engine-1"]),
                ("one", ["engine-0"]),
            ]
            assert (info.base_digest, list(info.engine_ids)) == ("two", ["engine-1"])
            assert (await r.generation.Generate(request(), timeout=5)).completion.receipt.engine_id == "engine-1"
            await engines[1].stop()
            await until(lambda: len(r.router.fleet.engines) == 1)
            for call in (
                r.generation.Generate(request(), timeout=20),
                r.generation.GetModelInfo(generation_pb2.GetModelInfoRequest(), timeout=5),
            ):
                code, why, _ = await failure(call)
                assert (code, why.reason) == (grpc.StatusCode.UNAVAILABLE, "NO_ENGINE")


async def test_two_engines_share_the_load() -> None:
    engines = [FakeEngine("engine-0", max_sequences=4), FakeEngine("engine-1", max_sequences=4)]
    async with running(engines=engines) as r:
        await asyncio.gather(*[r.generation.Generate(request(), timeout=10) for _ in range(40)])
        assert min(len(engine.submitted) for engine in engines) >= 10
