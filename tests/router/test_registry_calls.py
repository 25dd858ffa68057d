"""AdapterService through the router, and the watch that feeds its view."""

from __future__ import annotations

import asyncio

import grpc

from loraplex.v1 import adapter_pb2
from tests.router.fakes import adapter, request, running, until
from tests.router.test_answers import failure

Event = adapter_pb2.AdapterEvent


async def test_an_adapter_registered_through_the_router_answers_at_once() -> None:
    async with running() as r:
        asked = adapter_pb2.RegisterAdapterRequest(adapter_id="new", source_uri="file:///x")
        made = (await r.adapters.RegisterAdapter(asked, timeout=7)).adapter
        answer = await r.generation.Generate(request("x", "new"), timeout=5)
        assert answer.completion.adapter_digest == made.digest == "digest-new"
        # The caller's deadline went along
        assert r.cache.timeouts[0] and 6 < r.cache.timeouts[0] < 7.1
        # And one that is deleted answers no more
        await r.adapters.DeleteAdapter(adapter_pb2.DeleteAdapterRequest(adapter_id="new"), timeout=5)
        code, info, _ = await failure(r.generation.Generate(request("x", "new"), timeout=5))
        assert (code, info.reason) == (grpc.StatusCode.NOT_FOUND, "ADAPTER_NOT_FOUND")
        assert info.metadata["adapter_id"] == "new"


async def test_errors_of_the_cache_arrive_unchanged() -> None:
    async with running() as r:
        asked = adapter_pb2.RegisterAdapterRequest(adapter_id="new", source_uri="file:///full")
        code, info, delay = await failure(r.adapters.RegisterAdapter(asked, timeout=5))
        assert (code, info.reason, dict(info.metadata)) == (
            grpc.StatusCode.RESOURCE_EXHAUSTED, "DISK_FULL", {"limit_bytes": "10"},
        )  # fmt: skip
        assert delay == 1.5
        code, info, _ = await failure(r.adapters.GetAdapter(adapter_pb2.GetAdapterRequest(adapter_id="x"), timeout=5))
        assert (code, info.reason) == (grpc.StatusCode.NOT_FOUND, "ADAPTER_NOT_FOUND")
        code, info, _ = await failure(r.adapters.PreloadAdapter(adapter_pb2.PreloadAdapterRequest(), timeout=5))
        assert (code, info.metadata["field"]) == (grpc.StatusCode.UNIMPLEMENTED, "PreloadAdapter")


async def test_answers_of_the_cache_arrive_unchanged_and_change_the_view() -> None:
    async with running(adapter("a")) as r:
        listed = await r.adapters.ListAdapters(adapter_pb2.ListAdaptersRequest(page_token="p"), timeout=5)
        assert ([one.adapter_id for one in listed.adapters], listed.next_page_token) == (["a"], "p")
        await r.adapters.UpdateAdapter(adapter_pb2.UpdateAdapterRequest(adapter_id="a", weight=2.5), timeout=5)
        known = r.router.cache.view.get("a")
        assert known and known.weight == 2.5


async def test_without_the_cache_known_adapters_are_served_and_calls_are_refused() -> None:
    async with running(adapter("a")) as r:
        await r.cache.stop()
        assert (await r.generation.Generate(request("x", "a"), timeout=5)).token_ids
        code, info, _ = await failure(r.adapters.GetAdapter(adapter_pb2.GetAdapterRequest(adapter_id="a"), timeout=5))
        assert (code, info.reason) == (grpc.StatusCode.UNAVAILABLE, "CACHE_UNREACHABLE")
        # When the cache comes back with another registry, the view follows
        r.cache.adapters = {"b": adapter("b")}
        await r.cache.start()
        await until(lambda: r.router.cache.view.get("b"))
        assert r.router.cache.view.get("a") is None


async def test_events_change_what_is_served() -> None:
    async with running() as r:
        r.cache.tell(Event.KIND_REGISTERED, adapter("late"))
        await until(lambda: r.router.cache.view.get("late"))
        assert (await r.generation.Generate(request("x", "late"), timeout=5)).token_ids
        r.cache.tell(Event.KIND_UPDATED, adapter("late", state=adapter_pb2.Adapter.STATE_DRAINING))
        await asyncio.sleep(0.1)
        code, _, _ = await failure(r.generation.Generate(request("x", "late"), timeout=5))
        assert code == grpc.StatusCode.NOT_FOUND


async def test_the_watch_is_passed_on_and_ended_with_its_client() -> None:
    async with running(adapter("a")) as r:
        watch = r.adapters.WatchAdapters(adapter_pb2.WatchAdaptersRequest())
        kinds = []
        for _ in range(2):
            event = await watch.read()
            assert isinstance(event, Event)
            kinds.append(event.kind)
        assert kinds == [Event.KIND_SNAPSHOT, Event.KIND_SNAPSHOT_END]
        assert len(r.cache.watchers) == 2
        watch.cancel()
        await until(lambda: len(r.cache.watchers) == 1)


async def test_residency_tells_the_tier_at_arrival() -> None:
    async with running(adapter("a", engines=("engine-0",))) as r:
        answer = await r.generation.Generate(request("x", "a"), timeout=5)
        assert answer.completion.receipt.adapter_tier == "device"
        assert not r.cache.prefetches
