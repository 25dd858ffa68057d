"""Adapters that must not get in: refused over the wire with status, reason and what it is about; then a good one is taken."""

from __future__ import annotations

import json
import os
import random
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from safetensors.numpy import save

from cache.artifact import build_artifact
from cache.errors import MalformedAdapter
from loraplex.v1 import adapter_pb2 as pb
from servicekit.errors import ServiceError
from tests.cache.conftest import BASE, Cache, FakeEngine, Store, make_tensors, serve_cache, write_adapter

Q = "base_model.model.model.layers.0.self_attn.q_proj"
INVALID, UNSERVED = grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.FAILED_PRECONDITION
Folder = Callable[[Path], None]


def config(**fields: Any) -> Folder:
    return lambda folder: void(write_adapter(folder, **fields))


def raw_config(text: bytes) -> Folder:
    def make(folder: Path) -> None:
        write_adapter(folder)
        (folder / "adapter_config.json").write_bytes(text)

    return make


def tensors(change: Callable[[dict[str, Any]], object], **fields: Any) -> Folder:
    def make(folder: Path) -> None:
        changed = make_tensors()
        change(changed)
        write_adapter(folder, changed, **fields)

    return make


def weights(change: Callable[[bytes], bytes]) -> Folder:
    def make(folder: Path) -> None:
        path = write_adapter(folder) / "adapter_model.safetensors"
        path.write_bytes(change(path.read_bytes()))

    return make


def header(entries: dict[str, Any], data: bytes = b"") -> Folder:
    text = json.dumps(entries).encode()
    return weights(lambda _: len(text).to_bytes(8, "little") + text + data)


def with_file(name: str, content: bytes) -> Folder:
    return lambda folder: void((write_adapter(folder) / name).write_bytes(content))


def pickle_only(folder: Path) -> None:
    write_adapter(folder)
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")


def no_weights(folder: Path) -> None:
    (write_adapter(folder) / "adapter_model.safetensors").unlink()


def no_config(folder: Path) -> None:
    (write_adapter(folder) / "adapter_config.json").unlink()


def linked_out(folder: Path) -> None:
    write_adapter(folder.parents[1] / "outside")
    folder.symlink_to(folder.parents[1] / "outside")


def file_linked_out(folder: Path) -> None:
    path = write_adapter(folder) / "adapter_model.safetensors"
    path.rename(folder.parents[1] / "outside.safetensors")
    path.symlink_to(folder.parents[1] / "outside.safetensors")


def fifo(folder: Path) -> None:
    no_weights(folder)
    os.mkfifo(folder / "adapter_model.safetensors")


def sparse(folder: Path) -> None:
    with (write_adapter(folder) / "adapter_model.safetensors").open("ab") as file:
        file.truncate(1 << 40)


def void(_: object) -> None:
    return None


LORA = {"dtype": "F32", "shape": [4, 16], "data_offsets": [0, 256]}
OVERLAP = {f"{Q}.lora_A.weight": LORA, f"{Q}.lora_B.weight": {**LORA, "shape": [16, 4], "data_offsets": [128, 384]}}
LONG = "x" * 100_000

# What is wrong -> (how to make it, status, reason, what message and metadata name)
HOSTILE: dict[str, tuple[Folder, grpc.StatusCode, str, str]] = {
    "missing": (void, grpc.StatusCode.NOT_FOUND, "SOURCE_NOT_FOUND", "source_uri"),
    "a file": (lambda folder: void(folder.write_text("x")), INVALID, "NOT_A_FOLDER", "source_uri"),
    "linked out of the root": (linked_out, INVALID, "OUTSIDE_ROOTS", "source_uri"),
    "weights linked out of the root": (file_linked_out, INVALID, "OUTSIDE_ROOTS", "adapter_model.safetensors"),
    "a fifo": (fifo, INVALID, "NOT_A_FILE", "adapter_model.safetensors"),
    "too large": (sparse, INVALID, "FILE_TOO_LARGE", "16777216"),
    "no config": (no_config, INVALID, "MISSING_FILE", "adapter_config.json"),
    "config not JSON": (raw_config(b"{"), INVALID, "MALFORMED_CONFIG", "adapter_config.json"),
    "config too deep": (raw_config(b"[" * 100_000), INVALID, "MALFORMED_CONFIG", "adapter_config.json"),
    "config too large": (raw_config(b" " * (1 << 21)), INVALID, "FILE_TOO_LARGE", "1048576"),
    "config of huge numbers": (config(lora_alpha=10**400), UNSERVED, "UNSUPPORTED_FEATURE", "lora_alpha"),
    "pickle only": (pickle_only, INVALID, "PICKLE_REFUSED", "adapter_model.bin"),
    "no weights": (no_weights, INVALID, "MISSING_FILE", "adapter_model.safetensors"),
    "truncated": (weights(lambda whole: whole[:-1]), INVALID, "MALFORMED_SAFETENSORS", "adapter_model.safetensors"),
    "header longer than the file": (
        weights(lambda whole: (1 << 40).to_bytes(8, "little") + whole[8:]), INVALID, "MALFORMED_SAFETENSORS", ""),
    "overlapping tensors": (header(OVERLAP, bytes(384)), INVALID, "MALFORMED_SAFETENSORS", ""),
    "offsets backwards": (
        header({"x": {**LORA, "data_offsets": [256, 0]}}, bytes(256)), INVALID, "MALFORMED_SAFETENSORS", ""),
    "shape that overflows": (
        header({"x": {**LORA, "shape": [1 << 62, 1 << 62]}}, bytes(256)), INVALID, "MALFORMED_SAFETENSORS", ""),
    "a thousand dimensions": (
        header({"x": {"dtype": "F32", "shape": [1] * 1000, "data_offsets": [0, 4]}}, bytes(4)),
        INVALID, "MALFORMED_SAFETENSORS", "1000 dimensions"),
    "a name of 100,000 characters": (
        tensors(lambda all_: all_.update({LONG: np.zeros(1, np.float32)})), UNSERVED, "UNSUPPORTED_TENSOR", "100000"),
    "a name of control characters": (
        tensors(lambda all_: all_.update({"a\nb\x1b[31m": np.zeros(1, np.float32)})),
        UNSERVED, "UNSUPPORTED_TENSOR", r"a\nb\x1b"),
    "no tensors": (tensors(lambda all_: all_.clear()), INVALID, "NO_TENSORS", ""),
    "half a pair": (tensors(lambda all_: all_.pop(f"{Q}.lora_B.weight")), INVALID, "HALF_A_PAIR", f"{Q}.lora_A"),
    "wrong shape": (
        tensors(lambda all_: all_.update({f"{Q}.lora_A.weight": np.zeros((4, 15), np.float32)})),
        UNSERVED, "WRONG_SHAPE", "[4, 16]"),
    "rank unlike the config's": (tensors(void, r=8), UNSERVED, "WRONG_SHAPE", "[8, 16]"),
    "rank over the limit": (
        lambda folder: void(write_adapter(folder, make_tensors(rank=65), r=65)), UNSERVED, "RANK_TOO_LARGE", "64"),
    "rank 0": (config(r=0), UNSERVED, "UNSUPPORTED_FEATURE", "r"),
    "NaN": (tensors(lambda all_: all_[f"{Q}.lora_A.weight"].fill(np.nan)), INVALID, "NOT_FINITE", "layers.0.self_attn"),
    "infinite": (tensors(lambda all_: all_[f"{Q}.lora_B.weight"].fill(np.inf)), INVALID, "NOT_FINITE", "lora_B"),
    "scaled out of range": (
        tensors(lambda all_: all_[f"{Q}.lora_B.weight"].fill(3e38), lora_alpha=1e6), UNSERVED, "OUT_OF_RANGE", "lora_B"),
    "integers": (
        tensors(lambda all_: all_.update({f"{Q}.lora_A.weight": np.zeros((4, 16), np.int8)})),
        UNSERVED, "UNSUPPORTED_DTYPE", "I8"),
    "DoRA's vector": (
        tensors(lambda all_: all_.update({f"{Q}.lora_magnitude_vector": np.zeros(16, np.float32)})),
        UNSERVED, "UNSUPPORTED_TENSOR", "lora_magnitude_vector"),
    "an embedding": (
        tensors(lambda all_: all_.update({"base_model.model.x.lora_embedding_A": np.zeros((4, 9), np.float32)})),
        UNSERVED, "UNSUPPORTED_TENSOR", "lora_embedding_A"),
    "a module the base has not": (
        tensors(lambda all_: all_.update({k.replace("layers", "blocks"): all_.pop(k) for k in list(all_)})),
        UNSERVED, "UNKNOWN_MODULE", "model.blocks.0.self_attn.q_proj"),
    "no module it claims": (config(target_modules=["o_proj"]), INVALID, "NO_MATCHING_MODULES", "o_proj"),
    "another method": (config(peft_type="VERA"), UNSERVED, "UNSUPPORTED_FEATURE", "VERA"),
    "a pattern that never ends": (config(rank_pattern={"(a+)+$": 4}), UNSERVED, "UNSUPPORTED_FEATURE", "rank_pattern"),
    "a pattern that is none": (config(alpha_pattern={"\\1": 4}), UNSERVED, "UNSUPPORTED_FEATURE", "alpha_pattern"),
    "a feature of 100,000 characters": (config(**{LONG: 1}), UNSERVED, "UNSUPPORTED_FEATURE", "100000"),
    "a surrogate": (config(**{"\ud800": "\ud800"}), UNSERVED, "UNSUPPORTED_FEATURE", "ud800"),
    "template too large": (with_file("chat_template.jinja", b"x" * 65537), INVALID, "FILE_TOO_LARGE", "65536"),
    "template not text": (with_file("chat_template.jinja", b"\xff"), INVALID, "MALFORMED_TEMPLATE", "chat_template"),
    "templates, several": (
        with_file("tokenizer_config.json", b'{"chat_template": [{"name": "a"}]}'), INVALID, "MALFORMED_TEMPLATE", "one text"),
    "template with a surrogate": (
        with_file("tokenizer_config.json", b'{"chat_template": "\\ud800"}'), INVALID, "MALFORMED_TEMPLATE", ""),
    "tokenizer config not JSON": (
        with_file("tokenizer_config.json", b"{"), INVALID, "MALFORMED_TEMPLATE", "tokenizer_config.json"),
}  # fmt: skip


@pytest.fixture
async def attached(module_store: Store, tmp_path: Path) -> AsyncIterator[Cache]:
    async with serve_cache(module_store.url, tmp_path) as cache:
        engine = FakeEngine(cache.residency)
        await engine.attach()
        yield cache
        engine.leave()


async def register(cache: Cache, adapter_id: str, folder: Path) -> pb.Adapter:
    request = pb.RegisterAdapterRequest(adapter_id=adapter_id, source_uri=f"file://{folder}")
    return (await cache.adapters.RegisterAdapter(request, timeout=20)).adapter


@pytest.mark.parametrize("name", HOSTILE)
async def test_a_hostile_adapter_is_refused_by_name_and_disturbs_nobody(attached: Cache, name: str) -> None:
    make, code, reason, named = HOSTILE[name]
    make(attached.root / "bad")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await register(attached, "bad", attached.root / "bad")
    status = rpc_status.from_call(caught.value)  # type: ignore[arg-type]
    assert status is not None, caught.value
    info = error_details_pb2.ErrorInfo()
    assert status.details[0].Unpack(info)
    assert (caught.value.code(), info.reason, info.domain) == (code, reason, "loraplex"), status.message
    assert named in f"{status.message} {dict(info.metadata)}"
    assert info.metadata, "nothing says what it is about"
    assert len(status.message) < 500 and status.message.isprintable()
    # Nothing of it stays, and a good one is taken
    assert "bad" not in attached.manager.view.records
    good = await register(attached, "good", write_adapter(attached.root / "good"))
    assert good.state == pb.Adapter.STATE_ACTIVE


async def test_a_name_of_the_base_that_cannot_be_sent_is_made_fit(attached: Cache) -> None:
    folder = write_adapter(attached.root / "odd", base_model_name_or_path="\ud800\n" + "x" * 10_000)
    adapter = await register(attached, "odd", folder)
    assert adapter.base_model.startswith("\\ud800\\n") and len(adapter.base_model) < 300
    assert (await attached.adapters.ListAdapters(pb.ListAdaptersRequest())).adapters


def test_damaged_weights_are_malformed_and_nothing_else() -> None:
    """Bytes changed at random, most of them in the header."""
    whole, dice = save(make_tensors()), random.Random(0)
    from tests.cache.test_artifact import files

    good = files()
    length = int.from_bytes(whole[:8], "little")
    refused = 0
    for _ in range(1500):
        damaged = bytearray(whole)
        for _ in range(dice.randint(1, 4)):
            damaged[dice.randrange(8 + length if dice.random() < 0.9 else len(whole))] = dice.randrange(256)
        try:
            build_artifact(type(good)(good.config, bytes(damaged)), BASE)
        except ServiceError as error:
            refused += isinstance(error, MalformedAdapter)
    assert refused > 1000
