"""What can be checked of a request without a model. PURE.

The engine checks what needs the tokenizer: vocabulary, context length, whether prompt and answer fit.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from servicekit.errors import InvalidField, NotImplementedYet

MAX_TEXT_BYTES = 4 * 1024 * 1024
# A request travels on to the engine inside another message, and both are limited to 16 MiB: one that was taken but
# could not be sent on would break the stream of everyone else.
MAX_REQUEST_BYTES = 8 * 1024 * 1024
MAX_LOGIT_BIAS = 1024
MAX_STOP_STRINGS = 64
MAX_STOP_BYTES = 256
MAX_STOP_TOKEN_IDS = 64
MAX_TOP_LOGPROBS = 20
MAX_NAME_LENGTH = 128

_ADAPTER_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,127}")


@dataclass(frozen=True, slots=True)
class Prompt:
    """At most one of the three is not None; a chat is (role, content) per message."""

    text: str | None = None
    token_ids: tuple[int, ...] | None = None
    chat: tuple[tuple[str, str], ...] | None = None

    def estimated_tokens(self) -> int:
        """About how many tokens it becomes: 4 bytes each, as in English text, and 4 tokens around each message."""
        if self.token_ids is not None:
            return len(self.token_ids)
        texts = [content for _, content in self.chat] if self.chat is not None else [self.text or ""]
        return 1 + sum(4 + len(text.encode()) // 4 for text in texts)


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is chosen; None is unset."""

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    logit_bias: Mapping[int, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Stopping:
    """When an answer ends; None is unset."""

    max_output_tokens: int | None = None
    min_output_tokens: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Generation:
    """A request to continue a prompt."""

    prompt: Prompt
    adapter_id: str = ""
    request_id: str = ""
    sampling: Sampling = field(default_factory=Sampling)
    stopping: Stopping = field(default_factory=Stopping)
    top_logprobs: int = 0
    constrained: bool = False
    size_bytes: int = 0


@dataclass(frozen=True, slots=True)
class _Range:
    """Numbers from `low` to `high`; NaN is in no range."""

    low: float
    high: float
    above: bool = False

    def __contains__(self, value: float) -> bool:
        return (value > self.low or (value == self.low and not self.above)) and value <= self.high

    def __str__(self) -> str:
        low = f"{'above' if self.above else 'at least'} {self.low:g}"
        return low if math.isinf(self.high) else f"{low} and at most {self.high:g}"


_SAMPLING = {
    "temperature": _Range(0, 100),
    "top_k": _Range(1, math.inf),
    "top_p": _Range(0, 1, above=True),
    "min_p": _Range(0, 1),
    "repetition_penalty": _Range(0, 100, above=True),
    "frequency_penalty": _Range(-2, 2),
    "presence_penalty": _Range(-2, 2),
}
_LOGIT_BIAS = _Range(-100, 100)
_COUNT = _Range(0, math.inf)
_AT_LEAST_ONE = _Range(1, math.inf)


def check_generation(request: Generation) -> None:
    """Raises InvalidField or NotImplementedYet for the first thing that is wrong, named by its proto path."""
    if request.size_bytes > MAX_REQUEST_BYTES:
        raise _too_large("request", request.size_bytes, MAX_REQUEST_BYTES)
    check_adapter_id(request.adapter_id)
    check_name("request_id", request.request_id)
    if request.constrained:
        raise NotImplementedYet("constraint")
    check_prompt(request.prompt)
    _check_sampling(request.sampling)
    _check_stopping(request.stopping)
    _check_number("output.top_logprobs", request.top_logprobs, _Range(0, MAX_TOP_LOGPROBS))


def check_adapter_id(adapter_id: str) -> None:
    """Raises InvalidField unless it is empty or could be an adapter's id."""
    if adapter_id and not _ADAPTER_ID.fullmatch(adapter_id):
        limit = "1 to 128 letters, digits, '.', '_', '-' and '/', starting with a letter or digit"
        raise InvalidField("adapter_id", f"must be {limit}", value=_shown(adapter_id), limit=limit)


def check_name(path: str, name: str) -> None:
    """Raises InvalidField unless a name that goes to logs and traces is short and printable."""
    if len(name) > MAX_NAME_LENGTH or not (name.isascii() and name.isprintable()):
        limit = f"at most {MAX_NAME_LENGTH} printable ASCII characters"
        raise InvalidField(path, f"must be {limit}", value=_shown(name), limit=limit)


def check_prompt(prompt: Prompt, *, may_be_empty: bool = False) -> None:
    """Raises InvalidField unless exactly one kind of prompt is set, and there is something in it."""
    if prompt.text is not None:
        if not prompt.text and not may_be_empty:
            raise InvalidField("text", "must not be empty", value="", limit="at least 1 byte")
        _check_text_size("text", len(prompt.text.encode()))
    elif prompt.token_ids is not None:
        if not prompt.token_ids:
            raise InvalidField("token_ids.ids", "must not be empty", value="", limit="at least 1 id")
        _check_number("token_ids.ids", min(prompt.token_ids), _COUNT)
    elif prompt.chat is not None:
        _check_chat(prompt.chat)
    else:
        raise InvalidField("prompt", "one of text, token_ids and chat must be set", value="", limit="exactly one")


def _check_chat(chat: tuple[tuple[str, str], ...]) -> None:
    if not chat:
        raise InvalidField("chat.messages", "must not be empty", value="", limit="at least 1 message")
    for index, (role, _) in enumerate(chat):
        if not role:
            raise InvalidField(f"chat.messages[{index}].role", "must not be empty", value="", limit="at least 1 byte")
    _check_text_size("chat", sum(len(role.encode()) + len(content.encode()) for role, content in chat))


def _check_text_size(path: str, size: int) -> None:
    if size > MAX_TEXT_BYTES:
        raise _too_large(path, size, MAX_TEXT_BYTES)


def _too_large(path: str, size: int, limit: int) -> InvalidField:
    return InvalidField(path, f"has {size} bytes, at most {limit} are taken", value=size, limit=limit)


def _check_sampling(sampling: Sampling) -> None:
    for name, allowed in _SAMPLING.items():
        value = getattr(sampling, name)
        if value is not None:
            _check_number(f"sampling.{name}", value, allowed)
    _check_count("sampling.logit_bias", len(sampling.logit_bias), MAX_LOGIT_BIAS)
    for token_id, bias in sampling.logit_bias.items():
        _check_number("sampling.logit_bias", token_id, _COUNT)
        _check_number(f"sampling.logit_bias[{token_id}]", bias, _LOGIT_BIAS)


def _check_stopping(stopping: Stopping) -> None:
    most = stopping.max_output_tokens
    if most is not None:
        _check_number("stopping.max_output_tokens", most, _AT_LEAST_ONE)
    allowed = _COUNT if most is None else _Range(0, most)
    _check_number("stopping.min_output_tokens", stopping.min_output_tokens, allowed)
    _check_count("stopping.stop", len(stopping.stop), MAX_STOP_STRINGS)
    for index, text in enumerate(stopping.stop):
        _check_number(f"stopping.stop[{index}]", len(text.encode()), _Range(1, MAX_STOP_BYTES), "its size in bytes ")
    _check_count("stopping.stop_token_ids", len(stopping.stop_token_ids), MAX_STOP_TOKEN_IDS)
    for index, token_id in enumerate(stopping.stop_token_ids):
        _check_number(f"stopping.stop_token_ids[{index}]", token_id, _COUNT)


def _check_count(path: str, count: int, limit: int) -> None:
    if count > limit:
        raise InvalidField(path, f"has {count} entries, at most {limit} are taken", value=count, limit=limit)


def _check_number(path: str, value: float, allowed: _Range, what: str = "") -> None:
    if value not in allowed:
        raise InvalidField(path, f"{what}must be {allowed}, not {value:g}", value=f"{value:g}", limit=allowed)


def _shown(text: str) -> str:
    return text if len(text) <= 64 else text[:64] + "…"
