"""PEFT's adapter_config.json: what it may say to be served, and what it says about scaling.

Rule of this file: a field that could change the answer is either served or refused by its name. A field this file does not
know may be there only when it is switched off (null, false, empty), because PEFT adds features as fields.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from cache.errors import MalformedAdapter, UnsupportedAdapter

FILE = "adapter_config.json"

# Say how an adapter was trained or written, not what it computes.
IRRELEVANT = frozenset(
    {
        "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode", "lora_dropout",
        "megatron_core", "qalora_group_size", "runtime_config", "ensure_weight_tying", "eva_config",
        # Which modules carry weights is read from the tensors themselves.
        "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern",
        # Matters when weights are merged into a transposed base; the two factors are the same either way.
        "fan_in_fan_out",
    }
)  # fmt: skip


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


# Field -> whether a value is served. The initialisations accepted leave the base's weights as they are; pissa, olora, corda,
# loftq, eva and their kin train against a changed base.
SERVED: Mapping[str, Callable[[Any], bool]] = {
    "peft_type": lambda value: value == "LORA",
    "bias": lambda value: value in (None, "none"),
    "init_lora_weights": lambda value: value in (None, True, False, "gaussian", "orthogonal", "eva"),
    "r": lambda value: isinstance(value, int) and not isinstance(value, bool) and value > 0,
    "lora_alpha": _is_number,
    "use_rslora": lambda value: isinstance(value, bool),
    "rank_pattern": lambda value: _is_pattern(value, lambda rank: isinstance(rank, int) and rank > 0),
    "alpha_pattern": lambda value: _is_pattern(value, _is_number),
}
# Keys are regular expressions to PEFT. Without quantifiers and alternatives they match in linear time.
_SAFE_KEY = re.compile(r"\^?[\w.\\-]{1,256}\$?")
MAX_PATTERNS = 4096


def _is_pattern(value: Any, is_number: Callable[[Any], bool]) -> bool:
    if value is None:
        return True
    return (
        isinstance(value, dict)
        and len(value) <= MAX_PATTERNS
        and all(_SAFE_KEY.fullmatch(key) and is_number(number) for key, number in value.items())
    )


@dataclass(frozen=True)
class PeftConfig:
    """What an adapter_config.json says about the answer.

    Attributes:
        base_model: name of the base as its author wrote it; for people.
    """

    rank: int
    alpha: float
    rslora: bool
    rank_pattern: tuple[tuple[str, int], ...]
    alpha_pattern: tuple[tuple[str, float], ...]
    base_model: str

    def rank_of(self, module: str) -> int:
        """Rank of a module, by its path in the model."""
        return next((rank for key, rank in self.rank_pattern if _matches(key, module)), self.rank)

    def scaling_of(self, module: str) -> float:
        """Factor on B·A: alpha / r, or alpha / sqrt(r) for rsLoRA (arXiv 2312.03732)."""
        alpha = next((alpha for key, alpha in self.alpha_pattern if _matches(key, module)), self.alpha)
        rank = self.rank_of(module)
        return alpha / math.sqrt(rank) if self.rslora else alpha / rank

    def normalised(self) -> dict[str, Any]:
        """The part of the configuration that an adapter's identity contains."""
        return {
            "method": "lora",
            "rank": self.rank,
            "alpha": self.alpha,
            "rslora": self.rslora,
            "rank_pattern": self.rank_pattern,
            "alpha_pattern": self.alpha_pattern,
        }


def _matches(key: str, module: str) -> bool:
    return re.match(rf"(.*\.)?({key})$", module) is not None


def parse_peft_config(raw: bytes) -> PeftConfig:
    """Reads an adapter_config.json.

    Raises:
        MalformedAdapter: it is not a JSON object.
        UnsupportedAdapter: it asks for something that is not served; metadata names the field and its value.
    """
    try:
        fields = json.loads(raw)
    except (ValueError, RecursionError):
        raise MalformedAdapter(FILE, "is not JSON", "MALFORMED_CONFIG") from None
    if not isinstance(fields, dict):
        raise MalformedAdapter(FILE, "is not a JSON object", "MALFORMED_CONFIG")
    if not isinstance(fields.get("peft_type"), str):
        raise MalformedAdapter(FILE, "has no peft_type", "MALFORMED_CONFIG", feature="peft_type")
    for name in sorted(fields, key=lambda name: name != "peft_type"):
        _check_served(name, fields[name])
    alpha = fields.get("lora_alpha")
    return PeftConfig(
        rank=fields.get("r", 8),
        alpha=float(8 if alpha is None else alpha),
        rslora=fields.get("use_rslora", False),
        rank_pattern=tuple((fields.get("rank_pattern") or {}).items()),
        alpha_pattern=tuple((key, float(value)) for key, value in (fields.get("alpha_pattern") or {}).items()),
        base_model=str(fields.get("base_model_name_or_path") or "")[:256],
    )


def _check_served(name: str, value: Any) -> None:
    if name in IRRELEVANT:
        return
    served = SERVED.get(name)
    if served(value) if served else value in (None, False, {}, [], ""):
        return
    shown = json.dumps(value)[:100]
    raise UnsupportedAdapter(
        f"{FILE}: {name} = {shown} is not served", "UNSUPPORTED_FEATURE", feature=name[:100], value=shown, file=FILE
    )
