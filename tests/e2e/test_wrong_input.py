"""Wrong input through the whole stack: status, reason and field, and nothing else disturbed."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from safetensors.numpy import save_file

from demo.catalog import load_catalog
from loraplex.v1 import adapter_pb2, adapter_pb2_grpc, generation_pb2, generation_pb2_grpc
from tests.e2e.conftest import ADAPTERS, Stack
from tests.e2e.test_streams import chat

INVALID = grpc.StatusCode.INVALID_ARGUMENT
Request = generation_pb2.GenerateRequest
Sampling = generation_pb2.SamplingParams
Stopping = generation_pb2.StoppingParams


def failure(call: Callable[[], Any]) -> tuple[grpc.StatusCode, error_details_pb2.ErrorInfo, str]:
    with pytest.raises(grpc.RpcError) as caught:
        call()
    status = rpc_status.from_call(caught.value)  # type: ignore[arg-type]
    assert status is not None, f"no details: {caught.value}"
    info = error_details_pb2.ErrorInfo()
    assert status.details[0].Unpack(info)
    assert info.domain == "loraplex" and info.reason
    return caught.value.code(), info, status.message


@pytest.fixture(scope="module", autouse=True)
def a_stream_that_must_not_notice(stack: Stack) -> Iterator[None]:
    """Runs beside every case of this file; all its tokens arrive."""
    with stack.channel() as channel:
        stub = generation_pb2_grpc.GenerationServiceStub(channel)
        call = stub.Generate.future(
            chat("Tell a very long story.", max_output_tokens=150, ignore_eos=True), timeout=280
        )
        yield
        assert len(call.result().token_ids) == 150


WRONG_REQUESTS: dict[str, tuple[Request, grpc.StatusCode, str]] = {
    "unknown adapter": (Request(text="x", adapter_id="nobody"), grpc.StatusCode.NOT_FOUND, ""),
    "malformed adapter id": (Request(text="x", adapter_id="../etc"), INVALID, "adapter_id"),
    "no prompt": (Request(), INVALID, "prompt"),
    "empty text": (Request(text=""), INVALID, "text"),
    "empty ids": (Request(token_ids=generation_pb2.TokenIds()), INVALID, "token_ids"),
    "empty chat": (Request(chat=generation_pb2.Chat()), INVALID, "chat"),
    "ids outside the vocabulary": (Request(token_ids=generation_pb2.TokenIds(ids=[10**6])), INVALID, "token_ids"),
    "negative ids": (Request(token_ids=generation_pb2.TokenIds(ids=[-1])), INVALID, "token_ids"),
    "answer too long": (Request(text="x", stopping=Stopping(max_output_tokens=10**6)), INVALID, "max_output_tokens"),
    "prompt too long": (Request(text="word " * 20000), INVALID, "prompt"),
    "no output": (Request(text="x", stopping=Stopping(max_output_tokens=0)), INVALID, "max_output_tokens"),
    "temperature -1": (Request(text="x", sampling=Sampling(temperature=-1)), INVALID, "temperature"),
    "temperature NaN": (Request(text="x", sampling=Sampling(temperature=math.nan)), INVALID, "temperature"),
    "temperature inf": (Request(text="x", sampling=Sampling(temperature=math.inf)), INVALID, "temperature"),
    "top_p 0": (Request(text="x", sampling=Sampling(top_p=0)), INVALID, "top_p"),
    "top_p 2": (Request(text="x", sampling=Sampling(top_p=2)), INVALID, "top_p"),
    "top_k 0": (Request(text="x", sampling=Sampling(top_k=0)), INVALID, "top_k"),
    "10,000 stop strings": (Request(text="x", stopping=Stopping(stop=["s"] * 10000)), INVALID, "stop"),
    "empty stop string": (Request(text="x", stopping=Stopping(stop=[""])), INVALID, "stop"),
    "bias outside the vocabulary": (Request(text="x", sampling=Sampling(logit_bias={10**7: 1})), INVALID, "logit_bias"),
    "constraint": (
        Request(text="x", constraint=generation_pb2.Constraint(json_object=True)),
        grpc.StatusCode.UNIMPLEMENTED,
        "constraint",
    ),
}


@pytest.mark.parametrize("name", WRONG_REQUESTS)
def test_a_wrong_request_is_refused_naming_the_field(
    generation: generation_pb2_grpc.GenerationServiceStub, name: str
) -> None:
    request, code, field = WRONG_REQUESTS[name]
    for call in (
        lambda: generation.Generate(request, timeout=30),
        lambda: list(generation.StreamGenerate(request, timeout=30)),
    ):
        got, info, message = failure(call)
        assert got == code, message
        assert field in info.metadata.get("field", ""), (message, dict(info.metadata))


def good(folder: Path) -> None:
    shutil.copytree(ADAPTERS / load_catalog().adapters[0].id, folder)


def tensors(folder: Path) -> dict[str, np.ndarray[Any, Any]]:
    from safetensors import safe_open

    with safe_open(folder / "adapter_model.safetensors", framework="pt") as file:
        return {name: file.get_tensor(name).float().numpy() for name in file.keys()}  # noqa: SIM118


def with_tensors(change: Callable[[dict[str, np.ndarray[Any, Any]]], None]) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        good(folder)
        changed = tensors(folder)
        change(changed)
        save_file(changed, folder / "adapter_model.safetensors")

    return make


def with_config(**fields: Any) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        good(folder)
        path = folder / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))

    return make


def pickle_only(folder: Path) -> None:
    good(folder)
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")


def truncated(folder: Path) -> None:
    good(folder)
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def symlink_out(folder: Path) -> None:
    outside = folder.parent.parent / "outside"
    if not outside.exists():
        good(outside)
    folder.symlink_to(outside)


def file_symlink_out(folder: Path) -> None:
    good(folder)
    path = folder / "adapter_model.safetensors"
    outside = folder.parent.parent / "outside.safetensors"
    path.rename(outside)
    path.symlink_to(outside)


def fifo(folder: Path) -> None:
    good(folder)
    (folder / "adapter_model.safetensors").unlink()
    os.mkfifo(folder / "adapter_model.safetensors")


def config_not_json(folder: Path) -> None:
    good(folder)
    (folder / "adapter_config.json").write_text("{")


def first(changed: dict[str, np.ndarray[Any, Any]]) -> str:
    return sorted(changed)[0]


def set_nan(changed: dict[str, np.ndarray[Any, Any]]) -> None:
    changed[first(changed)].flat[3] = np.nan


def narrow(changed: dict[str, np.ndarray[Any, Any]]) -> None:
    changed[first(changed)] = np.ascontiguousarray(changed[first(changed)][:, :-1])


def drop_one(changed: dict[str, np.ndarray[Any, Any]]) -> None:
    del changed[first(changed)]


def rename_all(changed: dict[str, np.ndarray[Any, Any]]) -> None:
    for name in list(changed):
        changed[name.replace("layers", "blocks")] = changed.pop(name)


NOT_SERVABLE = grpc.StatusCode.FAILED_PRECONDITION
WRONG_ADAPTERS: dict[str, tuple[Callable[[Path], None], grpc.StatusCode, str]] = {
    "missing folder": (lambda folder: None, grpc.StatusCode.NOT_FOUND, ""),
    "symlink out of the root": (symlink_out, INVALID, "source_uri"),
    "file symlink out of the root": (file_symlink_out, INVALID, ""),
    "fifo": (fifo, INVALID, ""),
    "pickle only": (pickle_only, INVALID, "adapter_model.bin"),
    "truncated safetensors": (truncated, INVALID, "safetensors"),
    "wrong shape": (with_tensors(narrow), NOT_SERVABLE, "layers"),
    "NaN": (with_tensors(set_nan), INVALID, "layers"),
    "zero matching modules": (with_tensors(rename_all), NOT_SERVABLE, "blocks"),
    "half a pair": (with_tensors(drop_one), INVALID, "lora_"),
    "unknown method": (with_config(peft_type="VERA"), NOT_SERVABLE, "VERA"),
    "use_dora": (with_config(use_dora=True), NOT_SERVABLE, "use_dora"),
    "modules_to_save": (with_config(modules_to_save=["lm_head"]), NOT_SERVABLE, "modules_to_save"),
    "target_parameters": (with_config(target_parameters=["x.weight"]), NOT_SERVABLE, "target_parameters"),
    "pissa": (with_config(init_lora_weights="pissa"), NOT_SERVABLE, "init_lora_weights"),
    "olora": (with_config(init_lora_weights="olora"), NOT_SERVABLE, "init_lora_weights"),
    "bias": (with_config(bias="all"), NOT_SERVABLE, "bias"),
    "lora_bias": (with_config(lora_bias=True), NOT_SERVABLE, "lora_bias"),
    "trainable_token_indices": (with_config(trainable_token_indices=[1]), NOT_SERVABLE, "trainable_token_indices"),
    "layer_replication": (with_config(layer_replication=[[0, 2]]), NOT_SERVABLE, "layer_replication"),
    "a field nobody knows": (with_config(use_magic=True), NOT_SERVABLE, "use_magic"),
    "config is not JSON": (config_not_json, INVALID, "adapter_config.json"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG_ADAPTERS)
def test_a_wrong_adapter_is_refused_by_name(
    stack: Stack, adapters: adapter_pb2_grpc.AdapterServiceStub, name: str
) -> None:
    make, code, named = WRONG_ADAPTERS[name]
    folder = stack.incoming / name.replace(" ", "-")
    make(folder)
    request = adapter_pb2.RegisterAdapterRequest(adapter_id="wrong", source_uri=f"file://{folder}")
    got, info, message = failure(lambda: adapters.RegisterAdapter(request, timeout=60))
    assert got == code, (message, info)
    assert named in message + str(dict(info.metadata)), (message, info)
    with pytest.raises(grpc.RpcError):
        adapters.GetAdapter(adapter_pb2.GetAdapterRequest(adapter_id="wrong"))


@pytest.mark.parametrize(
    "uri, field",
    [
        ("file:///etc", "source_uri"),
        ("file:///etc/../etc/passwd", "source_uri"),
        ("", "source_uri"),
        ("gopher://x", "source_uri"),
        ("/no/scheme", "source_uri"),
        ("hf://owner", "source_uri"),
        ("s3://", "source_uri"),
        ("https://host/adapter.safetensors", "expected_digest"),
    ],
)
def test_a_wrong_source_is_refused(adapters: adapter_pb2_grpc.AdapterServiceStub, uri: str, field: str) -> None:
    request = adapter_pb2.RegisterAdapterRequest(adapter_id="wrong", source_uri=uri)
    got, info, message = failure(lambda: adapters.RegisterAdapter(request, timeout=60))
    assert got == INVALID, message
    assert info.metadata.get("field") == field


def test_a_good_adapter_is_still_taken_and_answers(
    stack: Stack, generation: generation_pb2_grpc.GenerationServiceStub
) -> None:
    folder = stack.incoming / "still-good"
    good(folder)
    stack.register("still-good", folder)
    assert generation.Generate(chat("Hello", "still-good", max_output_tokens=4), timeout=60).token_ids
