"""What must hold when parts of the stack die."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import grpc
import pytest

from demo.catalog import load_catalog
from loraplex.v1 import adapter_pb2, adapter_pb2_grpc, generation_pb2_grpc
from tests.e2e.conftest import ADAPTERS, Stack, wait_until
from tests.e2e.test_streams import chat, joined


@pytest.fixture(scope="module")
def own_stack(make_stack: Callable[..., Stack]) -> Stack:
    stack = make_stack()
    for entry in load_catalog().adapters[:3]:
        stack.register(entry.id, ADAPTERS / entry.id)
    return stack


def test_killing_redis_disturbs_neither_streams_nor_resident_adapters(own_stack: Stack) -> None:
    first, second = load_catalog().adapters[:2]
    with own_stack.channel() as channel:
        stub = generation_pb2_grpc.GenerationServiceStub(channel)
        registry = adapter_pb2_grpc.AdapterServiceStub(channel)
        # Given two adapters on the device and streams of both under way
        before = {e.id: stub.Generate(chat(e.prompt, e.id), timeout=60).text for e in (first, second)}
        results: dict[str, int] = {}

        def stream(adapter_id: str) -> None:
            request = chat("Tell a long story.", adapter_id, max_output_tokens=100, ignore_eos=True)
            results[adapter_id] = len(joined(stub, request)[1])

        threads = [threading.Thread(target=stream, args=(e.id,)) for e in (first, second)]
        for thread in threads:
            thread.start()
        wait_until(lambda: own_stack.metric("engine", "loraplex_engine_running_sequences") == 2, 20, "streams run")

        # When Redis is killed
        own_stack.kill("store")

        # Then streams go on, and new requests to resident adapters are answered
        assert {e.id: stub.Generate(chat(e.prompt, e.id), timeout=60).text for e in (first, second)} == before
        for thread in threads:
            thread.join()
        assert results == {first.id: 100, second.id: 100}

        # And a registration is refused, quickly and safe to retry
        began = time.monotonic()
        with pytest.raises(grpc.RpcError) as refused:
            registry.RegisterAdapter(
                adapter_pb2.RegisterAdapterRequest(adapter_id="new", source_uri=f"file://{ADAPTERS / first.id}"),
                timeout=30,
            )
        assert refused.value.code() == grpc.StatusCode.UNAVAILABLE
        assert time.monotonic() - began < 5

        # And when Redis is back, so is registration, with nothing lost
        own_stack.start("store")

        def registered() -> bool:
            try:
                own_stack.register("new", ADAPTERS / first.id)
            except grpc.RpcError:
                time.sleep(0.2)
                return False
            return True

        wait_until(registered, 30, "registration works again")
        listed = {adapter.adapter_id for adapter in registry.ListAdapters(adapter_pb2.ListAdaptersRequest()).adapters}
        assert listed == {e.id for e in load_catalog().adapters[:3]} | {"new"}


def test_after_a_restart_of_everything_registered_adapters_are_still_there(own_stack: Stack) -> None:
    entry = load_catalog().adapters[0]
    with own_stack.channel() as channel:
        stub = generation_pb2_grpc.GenerationServiceStub(channel)
        before = stub.Generate(chat(entry.prompt, entry.id), timeout=60)

    # When every process is stopped, which each does with exit code 0, and started again
    for name in ("router", "engine", "cache"):
        assert own_stack.kill(name, 15) == 0, own_stack.log(name)[-2000:]
    own_stack.kill("store", 15)
    own_stack.start_all()

    # Then the adapters answer as before, the same version
    with own_stack.channel() as channel:
        after = generation_pb2_grpc.GenerationServiceStub(channel).Generate(chat(entry.prompt, entry.id), timeout=60)
    assert after.text == before.text
    assert after.completion.adapter_digest == before.completion.adapter_digest


def test_a_cache_that_dies_leaves_resident_adapters_served(own_stack: Stack) -> None:
    entry = load_catalog().adapters[0]
    with own_stack.channel() as channel:
        stub = generation_pb2_grpc.GenerationServiceStub(channel)
        before = stub.Generate(chat(entry.prompt, entry.id), timeout=60).text
        own_stack.kill("cache")
        assert stub.Generate(chat(entry.prompt, entry.id), timeout=60).text == before
        own_stack.start("cache")
        own_stack.wait_ready("cache")
        cold = load_catalog().adapters[2]
        assert stub.Generate(chat(cold.prompt, cold.id), timeout=60).text


def test_an_engine_that_dies_with_no_other_to_go_on_is_reported(own_stack: Stack) -> None:
    with own_stack.channel() as channel:
        stub = generation_pb2_grpc.GenerationServiceStub(channel)
        stream = stub.StreamGenerate(chat("Tell a long story.", max_output_tokens=200, ignore_eos=True), timeout=100)
        next(stream)
        own_stack.kill("engine")
        with pytest.raises(grpc.RpcError) as lost:
            list(stream)
        assert lost.value.code() == grpc.StatusCode.UNAVAILABLE
        own_stack.start("engine")
        own_stack.wait_ready("engine")
        own_stack.wait_ready("router", 30)
        assert stub.Generate(chat("Hello!", max_output_tokens=4), timeout=60, wait_for_ready=True).text
