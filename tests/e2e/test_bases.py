"""Two bases behind one router, with one registry: every adapter is answered as PEFT answers it on the base it is for.

The bases have the same shapes and differ in their weights only: nothing but their identity keeps an adapter from the wrong one.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from loraplex.v1 import adapter_pb2, adapter_pb2_grpc, generation_pb2, generation_pb2_grpc
from tests.e2e.conftest import Stack, free_port, wait_until
from tests.engine.tiny import Oracle, TinyAdapter, make_adapter, make_model

PROMPT = [5, 80, 33, 7, 290]
TOKENS = 12


class TwoBases(Stack):
    """A stack with a second engine, "second", that serves `other`."""

    other: Path

    def __post_init__(self) -> None:
        super().__post_init__()
        self.ports["second"] = free_port()
        self.ports["second_metrics"] = free_port()

    def command(self, name: str) -> list[str]:
        if name == "router":
            return [*super().command(name), "--engines", self.address("second")]
        if name != "second":
            return super().command(name)
        changed = {
            str(self.model): str(self.other),
            "engine-0": "engine-1",
            self.address("engine"): self.address("second"),
            self.address("engine_metrics"): self.address("second_metrics"),
        }
        return [changed.get(word, word) for word in super().command("engine")]


class Made:
    """The stack, and an adapter of each base as PEFT made it."""

    def __init__(self, folder: Path) -> None:
        self.bases = {name: make_model(folder / name, "llama", seed) for seed, name in enumerate(("red", "blue"))}
        targets = ["q_proj", "v_proj", "down_proj"]
        self.adapters = {
            name: make_adapter(base, folder, f"of-{name}", 8, targets) for name, base in self.bases.items()
        }
        self.stack = TwoBases(folder / "stack", self.bases["red"], {})
        self.stack.other = self.bases["blue"]
        for adapter in self.adapters.values():
            shutil.copytree(adapter.folder, self.stack.incoming / adapter.name)

    def register(self, adapter_id: str, name: str, **fields: Any) -> adapter_pb2.Adapter:
        request = adapter_pb2.RegisterAdapterRequest(
            adapter_id=adapter_id, source_uri=f"file://{self.stack.incoming / name}", **fields
        )
        with self.stack.channel() as channel:
            return adapter_pb2_grpc.AdapterServiceStub(channel).RegisterAdapter(request, timeout=60).adapter


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Made]:
    made = Made(tmp_path_factory.mktemp("bases"))
    names = ("store", "cache", "engine", "second", "router")
    try:
        for name in names:
            made.stack.start(name)
        for name in names[1:]:
            made.stack.wait_ready(name)
        # A router is ready with the first engine; it tries the other again and again.
        wait_until(lambda: described(made.stack) == ["red", "blue"], 60, "the router has both engines")
        yield made
    finally:
        for name in reversed(names):
            if name in made.stack.processes:
                made.stack.kill(name)
        shutil.rmtree(made.stack.host_tier, ignore_errors=True)


def ask(stack: Stack, adapter_id: str) -> generation_pb2.GenerateResponse:
    request = generation_pb2.GenerateRequest(
        adapter_id=adapter_id,
        token_ids=generation_pb2.TokenIds(ids=PROMPT),
        stopping=generation_pb2.StoppingParams(max_output_tokens=TOKENS),
    )
    with stack.channel() as channel:
        return generation_pb2_grpc.GenerationServiceStub(channel).Generate(request, timeout=60)


def described(stack: Stack) -> list[str]:
    """The bases the router describes, the one that answers without an adapter first; none while that has no engine."""
    with stack.channel() as channel:
        stub = generation_pb2_grpc.GenerationServiceStub(channel)
        try:
            info = stub.GetModelInfo(generation_pb2.GetModelInfoRequest(), timeout=10)
        except grpc.RpcError:
            return []
    return [base.base_model for base in info.bases]


def as_peft(base: Path, adapter: TinyAdapter | None) -> list[int]:
    oracle = Oracle(base, [adapter] if adapter else [])
    return oracle.greedy(PROMPT, TOKENS, adapter.digest if adapter else "")


def answered(response: generation_pb2.GenerateResponse) -> list[int]:
    return [token for token in response.token_ids if token]


def test_every_adapter_is_answered_as_peft_answers_it_on_its_base(made: Made) -> None:
    red, blue = made.adapters["red"], made.adapters["blue"]
    # Their own files say which base they are for; the caller may say another
    registered = {
        "red": made.register("red", red.name),
        "blue": made.register("blue", blue.name),
        "red-on-blue": made.register("red-on-blue", red.name, base_model="blue"),
    }
    assert {name: adapter.base_name for name, adapter in registered.items()} == {
        "red": "red", "blue": "blue", "red-on-blue": "blue",
    }  # fmt: skip
    assert len({adapter.digest for adapter in registered.values()}) == 3
    expected = {
        "": ("engine-0", as_peft(made.bases["red"], None)),
        "red": ("engine-0", as_peft(made.bases["red"], red)),
        "blue": ("engine-1", as_peft(made.bases["blue"], blue)),
        "red-on-blue": ("engine-1", as_peft(made.bases["blue"], red)),
    }
    assert len({tuple(tokens) for _, tokens in expected.values()}) == len(expected), "a wrong base could not be told"
    for _ in range(2):
        for adapter_id, (engine_id, tokens) in expected.items():
            response = ask(made.stack, adapter_id)
            assert answered(response) == tokens, adapter_id
            assert response.completion.receipt.engine_id == engine_id
    with made.stack.channel() as channel:
        listed = adapter_pb2_grpc.AdapterServiceStub(channel).ListAdapters(
            adapter_pb2.ListAdaptersRequest(), timeout=10
        )
    on = {adapter.adapter_id: {place.engine_id for place in adapter.residency} - {""} for adapter in listed.adapters}
    assert on == {"red": {"engine-0"}, "blue": {"engine-1"}, "red-on-blue": {"engine-1"}}


def test_both_bases_are_described_the_one_that_answers_without_an_adapter_first(made: Made) -> None:
    with made.stack.channel() as channel:
        stub = generation_pb2_grpc.GenerationServiceStub(channel)
        info = stub.GetModelInfo(generation_pb2.GetModelInfoRequest(), timeout=10)
    assert [(base.base_model, list(base.engine_ids)) for base in info.bases] == [
        ("red", ["engine-0"]), ("blue", ["engine-1"]),
    ]  # fmt: skip
    assert (info.base_model, info.base_digest, list(info.engine_ids)) == (
        "red",
        info.bases[0].base_digest,
        ["engine-0"],
    )
    assert info.bases[0].base_digest != info.bases[1].base_digest


def test_a_base_that_is_not_said_or_not_there_is_refused_by_name(made: Made) -> None:
    unsaid = made.stack.incoming / "unsaid"
    shutil.copytree(made.adapters["red"].folder, unsaid)
    config = unsaid / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "base_model_name_or_path": ""}))
    for fields, code, reason in (
        ({}, grpc.StatusCode.INVALID_ARGUMENT, "AMBIGUOUS_BASE"),
        ({"base_model": "green"}, grpc.StatusCode.INVALID_ARGUMENT, "NO_SUCH_BASE"),
    ):
        with pytest.raises(grpc.RpcError) as caught:
            made.register("unsaid", "unsaid", **fields)
        error: Any = caught.value
        info = error_details_pb2.ErrorInfo()
        status = rpc_status.from_call(error)
        assert status is not None and any(detail.Unpack(info) for detail in status.details)
        assert (error.code(), info.reason, info.metadata["field"]) == (code, reason, "base_model")
        assert "blue (" in info.metadata["known_bases"] and "red (" in info.metadata["known_bases"]
    assert made.register("unsaid", "unsaid", base_model="red").base_name == "red"


def test_when_the_engines_of_one_base_are_gone_the_other_goes_on(made: Made) -> None:
    made.register("red", made.adapters["red"].name)
    made.register("blue", made.adapters["blue"].name)
    made.stack.kill("engine")
    wait_until(lambda: described(made.stack) == [], 10, "the lost engine is noticed")
    # The other base does not answer in its stead
    for adapter_id in ("", "red"):
        with pytest.raises(grpc.RpcError) as caught:
            ask(made.stack, adapter_id)
        error: Any = caught.value
        assert error.code() is grpc.StatusCode.UNAVAILABLE
    assert answered(ask(made.stack, "blue")) == as_peft(made.bases["blue"], made.adapters["blue"])
    made.stack.start("engine")
    wait_until(lambda: described(made.stack) == ["red", "blue"], 60, "the engine is back")
    assert answered(ask(made.stack, "red")) == as_peft(made.bases["red"], made.adapters["red"])
