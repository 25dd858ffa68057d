"""From the files of a PEFT adapter to a validated, packed artifact.

Packed form, one safetensors file: for each changed module `<module>.A` of shape [rank, in_features] and `<module>.B` of shape
[out_features, rank], in the engine's number type, with the scaling folded into B. So the engine computes x·Aᵀ·Bᵀ and knows
nothing of alpha, rsLoRA or patterns. The metadata holds the digest, the largest rank and the format's name.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import safetensors
from safetensors import SafetensorError
from safetensors.numpy import save

from cache.errors import MalformedAdapter, RankTooLarge, UnsupportedAdapter, shown
from cache.peft_config import PeftConfig, parse_peft_config

FORMAT = "loraplex-artifact-1"
WEIGHTS = "adapter_model.safetensors"
SOURCE_DTYPES: Mapping[str, Any] = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
TARGET_DTYPES: Mapping[str, Any] = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}

# Above what anything here has, below what numpy refuses.
MAX_DIMENSIONS = 16

_TENSOR = re.compile(r"(?:base_model\.model\.)?(?P<module>.+)\.lora_(?P<side>[AB])(?:\.default)?\.weight")

Array = np.ndarray[Any, Any]
deserialize: Any = safetensors.deserialize


@dataclass(frozen=True)
class BaseDescription:
    """What an adapter is validated against.

    Attributes:
        modules: path of each linear layer an adapter may target -> (in_features, out_features).
        dtype: number type that artifacts are packed in.
    """

    name: str
    digest: str
    dtype: str
    max_rank: int
    modules: Mapping[str, tuple[int, int]]


@dataclass(frozen=True)
class AdapterFiles:
    """The bytes of an adapter's files, as they came from its source."""

    config: bytes
    weights: bytes
    chat_template: str = ""


@dataclass(frozen=True)
class Artifact:
    """A validated adapter, packed.

    Attributes:
        rank: largest rank of its modules.
        target_modules: kinds of modules it changes, the last part of their paths, sorted.
        base: what it was validated against.
        packed: the file's content.
    """

    digest: str
    rank: int
    base_model: str
    target_modules: tuple[str, ...]
    chat_template: str
    base: BaseDescription
    packed: bytes


def build_artifact(files: AdapterFiles, base: BaseDescription) -> Artifact:
    """Validates an adapter against the base and packs it. Pure, but takes seconds for large adapters.

    Raises:
        MalformedAdapter: the files contradict themselves; metadata names file and tensor.
        UnsupportedAdapter: they ask for what this base or this server does not have.
    """
    config = parse_peft_config(files.config)
    tensors = _read_tensors(files.weights)
    pairs = _pair_up(tensors)
    if not any(config.claims(module) for module in pairs):
        claimed = shown(", ".join(config.targets))
        message = f"none of its tensors is of a module that adapter_config.json names ({claimed})"
        raise MalformedAdapter(WEIGHTS, message, "NO_MATCHING_MODULES", target_modules=claimed)
    for module, (a, b) in pairs.items():
        _check_module(module, a, b, config, base)
    packed: dict[str, Array] = {}
    for module, (a, b) in pairs.items():
        with np.errstate(over="ignore", invalid="ignore"):
            scaled = b.astype(np.float32) * np.float32(config.scaling_of(module))
        packed[f"{module}.A"] = _cast(a, base.dtype, module, "A")
        packed[f"{module}.B"] = _cast(scaled, base.dtype, module, "B")
    digest = _digest(tensors, config, files.chat_template, base.digest)
    rank = max(a.shape[0] for a, _ in pairs.values())
    return Artifact(
        digest=digest,
        rank=rank,
        base_model=config.base_model,
        target_modules=tuple(sorted({module.rpartition(".")[2] for module in pairs})),
        chat_template=files.chat_template,
        base=base,
        packed=save(packed, metadata={"format": FORMAT, "digest": digest, "rank": str(rank)}),
    )


def _read_tensors(raw: bytes) -> dict[str, Array]:
    try:
        entries = deserialize(raw)
    except (SafetensorError, ValueError, OverflowError) as error:
        message = f"is not a well-formed safetensors file ({shown(error)})"
        raise MalformedAdapter(WEIGHTS, message, "MALFORMED_SAFETENSORS") from None
    if not entries:
        raise MalformedAdapter(WEIGHTS, "holds no tensors", "NO_TENSORS")
    return {name: _tensor(name, entry) for name, entry in entries}


def _tensor(name: str, entry: Mapping[str, Any]) -> Array:
    dtype, shape = entry["dtype"], entry["shape"]
    if dtype not in SOURCE_DTYPES:
        raise UnsupportedAdapter(
            f"{WEIGHTS}: tensor {shown(name)} has type {dtype}, served are {', '.join(SOURCE_DTYPES)}",
            "UNSUPPORTED_DTYPE",
            tensor=shown(name),
            dtype=dtype,
        )
    if len(shape) > MAX_DIMENSIONS:
        message = f"tensor {shown(name)} has {len(shape)} dimensions"
        raise MalformedAdapter(WEIGHTS, message, "MALFORMED_SAFETENSORS", tensor=shown(name))
    return np.frombuffer(entry["data"], dtype=SOURCE_DTYPES[dtype]).reshape(shape)


def _pair_up(tensors: Mapping[str, Array]) -> dict[str, tuple[Array, Array]]:
    """Module path -> (A, B); refuses anything that is not half of such a pair, and halves without the other."""
    halves: dict[str, dict[str, tuple[str, Array]]] = {}
    for name, tensor in tensors.items():
        match = _TENSOR.fullmatch(name)
        if match is None:
            raise UnsupportedAdapter(
                f"{WEIGHTS}: tensor {shown(name)} is not lora_A or lora_B of a linear layer; nothing else is served",
                "UNSUPPORTED_TENSOR",
                tensor=shown(name),
            )
        sides = halves.setdefault(match["module"], {})
        if match["side"] in sides:
            message = f"two tensors are lora_{match['side']} of {shown(match['module'])}"
            raise MalformedAdapter(WEIGHTS, message, "DUPLICATE_TENSOR", tensor=shown(name))
        sides[match["side"]] = (name, tensor)
    pairs: dict[str, tuple[Array, Array]] = {}
    for module, sides in sorted(halves.items()):
        if len(sides) == 1:
            [(side, (name, _))] = sides.items()
            other = "B" if side == "A" else "A"
            message = f"half a pair: {shown(name)} is there, lora_{other} is not"
            raise MalformedAdapter(WEIGHTS, message, "HALF_A_PAIR", tensor=shown(name), module=shown(module))
        pairs[module] = (sides["A"][1], sides["B"][1])
    return pairs


def _check_module(module: str, a: Array, b: Array, config: PeftConfig, base: BaseDescription) -> None:
    if module not in base.modules:
        raise UnsupportedAdapter(
            f"{WEIGHTS}: module {shown(module)} is not a linear layer of {base.name} that adapters may change",
            "UNKNOWN_MODULE",
            module=shown(module),
            base=base.name,
        )
    in_features, out_features = base.modules[module]
    rank = config.rank_of(module)
    if rank > base.max_rank:
        raise RankTooLarge(module, rank, base.max_rank)
    for side, tensor, expected in (("A", a, (rank, in_features)), ("B", b, (out_features, rank))):
        if tensor.shape != expected:
            raise UnsupportedAdapter(
                f"{WEIGHTS}: lora_{side} of {module} has shape {list(tensor.shape)}, not {list(expected)}",
                "WRONG_SHAPE",
                tensor=f"{module}.lora_{side}",
                shape=list(tensor.shape),
                expected=list(expected),
            )
        if not np.isfinite(tensor.astype(np.float32)).all():
            message = f"lora_{side} of {module} holds NaN or infinite numbers"
            raise MalformedAdapter(WEIGHTS, message, "NOT_FINITE", tensor=f"{module}.lora_{side}")


def _cast(tensor: Array, dtype: str, module: str, side: str) -> Array:
    with np.errstate(over="ignore"):
        cast = np.ascontiguousarray(tensor.astype(TARGET_DTYPES[dtype]))
    if not np.isfinite(cast.astype(np.float32)).all():
        raise UnsupportedAdapter(
            f"lora_{side} of {module} with its scaling does not fit into {dtype}",
            "OUT_OF_RANGE",
            tensor=f"{module}.lora_{side}",
            dtype=dtype,
        )
    return cast


def _digest(tensors: Mapping[str, Array], config: PeftConfig, chat_template: str, base_digest: str) -> str:
    """sha256 over the tensors as they came, the normalised configuration and the base's identity."""
    total = hashlib.sha256()
    for part in _digest_parts(tensors, config, chat_template, base_digest):
        # Each part with its length, so that no two lists of parts give the same bytes.
        total.update(len(part).to_bytes(8, "little"))
        total.update(part)
    return total.hexdigest()


def _digest_parts(
    tensors: Mapping[str, Array], config: PeftConfig, chat_template: str, base_digest: str
) -> Iterator[bytes | memoryview]:
    identity = {**config.normalised(), "chat_template": chat_template, "base": base_digest}
    yield json.dumps(identity, sort_keys=True, separators=(",", ":")).encode()
    for name in sorted(tensors):
        tensor = tensors[name]
        yield f"{name} {tensor.dtype.name} {list(tensor.shape)}".encode()
        yield np.ascontiguousarray(tensor).tobytes()
