"""Fairness, admission and receipts as clients see them."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from loraplex.v1 import adapter_pb2, generation_pb2
from router.config import Settings
from tests.router.fakes import FakeEngine, Running, adapter, request, running, until

MIB = 1 << 20


def ask(r: Running, tenant: str, adapter_id: str = "", timeout: float = 30, **fields: Any) -> Any:
    return r.generation.Generate(
        request("12345678", adapter_id, **fields), metadata=(("x-loraplex-tenant", tenant),), timeout=timeout
    )


def reason_of(error: grpc.aio.AioRpcError) -> tuple[str, float]:
    """ErrorInfo.reason and the retry delay in seconds."""
    info, retry = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo()
    for detail in rpc_status.from_call(error).details:  # type: ignore[arg-type]
        detail.Unpack(info)
        detail.Unpack(retry)
    return info.reason, retry.retry_delay.ToNanoseconds() / 1e9


async def test_the_receipt_tells_what_the_flow_was_charged_after_its_weight() -> None:
    warm = adapter("warm", engines=("engine-0",), weight=4.0, size_bytes=100 * MIB)
    async with running(warm) as r:
        answer: generation_pb2.GenerateResponse = await ask(r, "t", "warm", tokens=6)
        receipt = answer.completion.receipt
        # 8 tokens in, 6 out at 2 each, a quarter of it for a weight of 4; nothing was loaded
        assert receipt.charge == pytest.approx((8 + 2 * 6) / 4)
        assert receipt.adapter_tier == "device" and receipt.engine_id == "engine-0"
        assert receipt.adapter_wait.ToMilliseconds() == 7


async def test_who_has_an_adapter_loaded_pays_for_it_once() -> None:
    cold = adapter("cold", size_bytes=100 * MIB)
    async with running(cold) as r:
        r.engine.starts = lambda submission: False
        calls = [ask(r, "t", "cold") for _ in range(3)]
        await until(lambda: r.engine.submitted)
        r.cache.tell(
            adapter_pb2.AdapterEvent.KIND_RESIDENCY, adapter("cold", engines=("engine-0",), size_bytes=100 * MIB)
        )
        await until(lambda: len(r.engine.submitted) == 3)
        r.engine.starts = lambda submission: True
        charges = sorted([answer.completion.receipt.charge for answer in await asyncio.gather(*calls)])
        assert charges == [18.0, 18.0, 18.0 + 50.0]


async def test_a_full_queue_turns_away_the_flood_and_takes_who_asks_for_little() -> None:
    engine = FakeEngine(max_sequences=1)
    async with running(engines=[engine], max_queued_requests=10) as r:
        engine.stepping.clear()
        flood = [ask(r, "flood") for _ in range(11)]
        await until(lambda: r.router.dispatcher.queued == 10)
        modest = ask(r, "modest")
        # Then the latest of the flood is told to come back
        done, _ = await asyncio.wait(
            [asyncio.ensure_future(_outcome(call)) for call in flood], timeout=2, return_when="FIRST_COMPLETED"
        )
        (refused,) = [task.result() for task in done]
        assert isinstance(refused, grpc.aio.AioRpcError) and refused.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        reason, retry_after = reason_of(refused)
        assert reason == "QUEUE_FULL" and 0.1 <= retry_after <= 30
        assert r.router.dispatcher.queued == 10
        # And the other is answered
        engine.stepping.set()
        assert (await modest).token_ids


async def _outcome(call: Any) -> Any:
    try:
        return await call
    except grpc.aio.AioRpcError as error:
        return error


async def test_a_deadline_that_cannot_be_met_is_refused_at_once() -> None:
    engine = FakeEngine(max_sequences=1)
    async with running(engines=[engine]) as r:
        # Given a tenant with a queue of many seconds, as the service has been for a while
        calls = [ask(r, "t", tokens=60) for _ in range(60)]
        await until(lambda: len(engine.submitted) > 12, seconds=20)
        engine.stepping.clear()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await ask(r, "t", timeout=0.3)
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert reason_of(caught.value)[0] == "DEADLINE_UNREACHABLE"
        for call in calls:
            call.cancel()


async def test_tenants_get_shares_by_their_weights() -> None:
    engine = FakeEngine(max_sequences=1)
    async with running(engines=[engine], tenant_weights=("paying=3",)) as r:
        engine.stepping.clear()
        calls = [ask(r, tenant) for tenant in ("paying", "other") for _ in range(40)]
        await until(lambda: r.router.dispatcher.queued == 79)
        engine.stepping.set()
        order: list[str] = []
        for call, tenant in zip(calls, ["paying"] * 40 + ["other"] * 40, strict=True):
            call.add_done_callback(lambda _, tenant=tenant: order.append(tenant))
        await asyncio.gather(*calls)
        assert 27 <= order[:40].count("paying") <= 33


@pytest.mark.parametrize("text", ["t", "=2", "t=", "t=0", "t=-1", "t=inf", "t=nan"])
def test_a_malformed_weight_of_a_tenant_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="tenant_weights"):
        Settings(tenant_weights=(text,))


def test_a_tenant_has_one_weight() -> None:
    with pytest.raises(ValueError, match="once for a name"):
        Settings(tenant_weights=("t=1", "t=2"))


async def test_who_has_nothing_on_engines_is_urgent_there_while_others_are_served() -> None:
    engine = FakeEngine(max_sequences=6)
    async with running(engines=[engine]) as r:
        engine.stepping.clear()

        async def urgent(tenant: str) -> bool:
            before = len(engine.submitted)
            call = ask(r, tenant)
            calls.append(call)
            await until(lambda: len(engine.submitted) == before + 1)
            return engine.submitted[-1].urgent

        calls: list[Any] = []
        # Nobody else is known yet, and then: the first of a tenant is, its second is not.
        assert not await urgent("flood")
        assert not await urgent("flood")
        assert await urgent("modest")
        assert not await urgent("modest")
        assert not await urgent("flood")
        engine.stepping.set()
        await asyncio.gather(*calls)
        # All has been answered: it is the first again.
        engine.stepping.clear()
        calls.clear()
        assert await urgent("modest")
        engine.stepping.set()
        await asyncio.gather(*calls)


async def test_where_nobody_waits_a_short_deadline_is_no_reason_to_refuse() -> None:
    engine = FakeEngine(max_sequences=1)
    async with running(engines=[engine]) as r:
        # Given answers that have taken long
        for _ in range(2):
            engine.stepping.clear()
            call = ask(r, "t", tokens=6)
            await until(lambda: engine.running)
            await asyncio.sleep(0.9)
            engine.stepping.set()
            await call
        # Then one that may not take as long is begun all the same; this time it is quick
        answer: generation_pb2.GenerateResponse = await ask(r, "t", tokens=6, timeout=0.7)
        assert len(answer.token_ids) == 6
