"""PEFT's adapter_config.json: what it may say to be served, and what it says about scaling.

Rule of this file: a field that could change the answer is either served or refused by its name. A field this file does not
know may be there only when it is switched off (null, false, empty), because PEFT adds features as fields.
"""

from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from cache.errors import MalformedAdapter, UnsupportedAdapter, shown

FILE = "adapter_config.json"

# Say how an adapter was trained or written, not what it computes.
IRRELEVANT = frozenset(
    {
        "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode", "lora_dropout",
        "megatron_core", "qalora_group_size", "runtime_config", "ensure_weight_tying", "eva_config",
        # Which modules carry weights is read from the tensors themselves.
        "exclude_modules", "layers_to_transform", "layers_pattern",
        # Matters when weights are merged into a transposed base; the two factors are the same either way.
        "fan_in_fan_out",
    }
)  # fmt: skip


MAX_NUMBER = 1_000_000_000


def _is_number(value: Any) -> bool:
    # NaN is on neither side of anything.
    return isinstance(value, int | float) and not isinstance(value, bool) and -MAX_NUMBER <= value <= MAX_NUMBER


def _is_rank(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value <= MAX_NUMBER


def _is_init(value: Any) -> bool:
    return value is None or isinstance(value, bool) or (isinstance(value, str) and value.lower() in HARMLESS_INITS)


def _are_targets(value: Any) -> bool:
    names = value if isinstance(value, list) else [value or ""]
    return len(names) <= MAX_PATTERNS and all(isinstance(name, str) for name in names)


# These leave the base's weights as they are; pissa, olora, corda, loftq and their kin train against a changed base.
HARMLESS_INITS = ("gaussian", "orthogonal", "eva")
# Field -> whether a value is served.
SERVED: Mapping[str, Callable[[Any], bool]] = {
    "peft_type": lambda value: value == "LORA",
    "bias": lambda value: value in (None, "none"),
    "init_lora_weights": _is_init,
    "target_modules": lambda value: _are_targets(value),
    "r": _is_rank,
    "lora_alpha": _is_number,
    "use_rslora": lambda value: isinstance(value, bool),
    "rank_pattern": lambda value: _is_pattern(value, _is_rank),
    "alpha_pattern": lambda value: _is_pattern(value, _is_number),
}
# Keys are regular expressions to PEFT. Names with dots, plain or escaped, match in linear time; nothing else is evaluated.
_SAFE_KEY = re.compile(r"\^?(?:[\w-]|\\?\.){1,256}\$?", re.ASCII)
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
        targets: ends of the paths of the modules it says it changes; empty when it says so by a regular expression.
    """

    rank: int
    alpha: float
    rslora: bool
    rank_pattern: tuple[tuple[str, int], ...]
    alpha_pattern: tuple[tuple[str, float], ...]
    base_model: str
    targets: tuple[str, ...] = ()

    def claims(self, module: str) -> bool:
        """Whether it says that it changes a module; a regular expression of a stranger is not evaluated."""
        return not self.targets or any(module == end or module.endswith(f".{end}") for end in self.targets)

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
    return _compiled(key).match(module) is not None


@functools.lru_cache(maxsize=2 * MAX_PATTERNS)
def _compiled(key: str) -> re.Pattern[str]:
    return re.compile(rf"(.*\.)?({key})$")


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
        base_model=shown(fields.get("base_model_name_or_path") or ""),
        targets=tuple(targets) if isinstance(targets := fields.get("target_modules"), list) else (),
    )


def _check_served(name: str, value: Any) -> None:
    if name in IRRELEVANT:
        return
    served = SERVED.get(name)
    if served(value) if served else value in (None, False, {}, [], ""):
        return
    feature, found = shown(name), shown(json.dumps(value))
    raise UnsupportedAdapter(
        f"{FILE}: {feature} = {found} is not served", "UNSUPPORTED_FEATURE", feature=feature, value=found, file=FILE
    )
