"""Arguments of a call -> messages of the wire."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from os import PathLike, fspath
from pathlib import Path
from typing import Any, Literal, TypedDict

from loraplex.types import Credentials, Message, Tier
from loraplex.v1 import adapter_pb2, generation_pb2

MessageLike = Message | tuple[str, str] | Mapping[str, str]


class CallOptions(TypedDict, total=False):
    """What every call takes.

    timeout: seconds for the whole call, retries included; None waits for ever. Default: the client's.
    metadata: sent beside the client's own, for example a `traceparent`; wins over it.
    """

    timeout: float | None
    metadata: Mapping[str, str]


class PromptOptions(CallOptions, total=False):
    """A prompt other than the positional text, which is tokenised as it is.

    messages: a conversation, rendered with the chat template; a string is one message of the user.
    token_ids: tokenised already.
    adapter: id of the adapter; left out, the base answers.
    """

    messages: str | Sequence[MessageLike]
    token_ids: Sequence[int]
    adapter: str


class GenerateOptions(PromptOptions, total=False):
    """Everything a request can say; what is left out is the server's default. Ranges are in `generation.proto`.

    temperature, top_k, top_p, min_p, seed, repetition_penalty, frequency_penalty, presence_penalty, logit_bias: how
        the next token is chosen; none of them is greedy.
    max_output_tokens, min_output_tokens, stop, stop_token_ids, ignore_eos, include_stop: when the answer ends.
    json_schema, regex, grammar, choice, json_object: structure the answer must follow, one at most.
    top_logprobs, prompt_logprobs: what is returned besides the text.
    request_id: name in logs and traces.
    """

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    seed: int
    repetition_penalty: float
    frequency_penalty: float
    presence_penalty: float
    logit_bias: Mapping[int, float]
    max_output_tokens: int
    min_output_tokens: int
    stop: str | Sequence[str]
    stop_token_ids: Sequence[int]
    ignore_eos: bool
    include_stop: bool
    json_schema: str
    regex: str
    grammar: str
    choice: Sequence[str]
    json_object: bool
    top_logprobs: int
    prompt_logprobs: bool
    request_id: str


class RegisterOptions(CallOptions, total=False):
    """expected_digest: refuse other content. pinned: keep it on the device. weight: share of service, default 1.

    base_model: name or digest of the base it is for, where a server has several; default: what its own files name.
    credentials: the caller's right to read the source; used for this call and not kept.
    """

    base_model: str
    credentials: Credentials
    expected_digest: str
    pinned: bool
    weight: float


class UpdateOptions(CallOptions, total=False):
    """What is left out stays as it is."""

    pinned: bool
    weight: float


_PROMPTS = ("messages", "token_ids")
_PARTS = {
    **dict.fromkeys(
        ("temperature", "top_k", "top_p", "min_p", "seed", "repetition_penalty", "frequency_penalty",
         "presence_penalty", "logit_bias"),
        "sampling",
    ),
    **dict.fromkeys(
        ("max_output_tokens", "min_output_tokens", "stop", "stop_token_ids", "ignore_eos", "include_stop"), "stopping"
    ),
    **dict.fromkeys(("json_schema", "regex", "grammar", "choice", "json_object"), "constraint"),
    **dict.fromkeys(("top_logprobs", "prompt_logprobs"), "output"),
}  # fmt: skip


def generate_request(text: str | None, options: Mapping[str, Any]) -> generation_pb2.GenerateRequest:
    request = generation_pb2.GenerateRequest()
    rest = _set_prompt(request, text, options)
    if sum(_PARTS.get(name) == "constraint" for name in rest) > 1:
        raise TypeError("only one of json_schema, regex, grammar, choice and json_object can be given")
    for name, value in rest.items():
        if name == "request_id":
            _set(request, name, value)
        elif name not in _PARTS:
            raise TypeError(f"unknown option {name!r}")
        elif name == "choice":
            _set(request.constraint.choice, "options", value, name)
        else:
            values = [value] if name == "stop" and isinstance(value, str) else value
            _set(getattr(request, _PARTS[name]), name, values)
    return request


def tokenize_request(text: str | None, options: Mapping[str, Any]) -> generation_pb2.TokenizeRequest:
    if "token_ids" in options:
        raise TypeError("token ids are tokenised already")
    request = generation_pb2.TokenizeRequest()
    _no_more(_set_prompt(request, text, options))
    return request


def register_request(
    adapter_id: str, source: str | PathLike[str], options: Mapping[str, Any]
) -> adapter_pb2.RegisterAdapterRequest:
    request = adapter_pb2.RegisterAdapterRequest()
    _set(request, "adapter_id", adapter_id)
    _set(request, "source_uri", source if isinstance(source, str) else f"file://{Path(fspath(source)).absolute()}")
    fields = dict(options)
    for name, value in vars(fields.pop("credentials", Credentials())).items():
        if value:
            _set(request.credentials, name, value)
    _set_all(request, fields, ("base_model", "expected_digest", "pinned", "weight"))
    return request


def update_request(adapter_id: str, options: Mapping[str, Any]) -> adapter_pb2.UpdateAdapterRequest:
    request = adapter_pb2.UpdateAdapterRequest()
    _set(request, "adapter_id", adapter_id)
    _set_all(request, options, ("pinned", "weight"))
    return request


def delete_request(adapter_id: str, force: bool) -> adapter_pb2.DeleteAdapterRequest:
    request = adapter_pb2.DeleteAdapterRequest(force=force)
    _set(request, "adapter_id", adapter_id)
    return request


def get_request(adapter_id: str) -> adapter_pb2.GetAdapterRequest:
    request = adapter_pb2.GetAdapterRequest()
    _set(request, "adapter_id", adapter_id)
    return request


def preload_request(
    adapter_id: str, tier: Tier | Literal["disk", "host", "device"]
) -> adapter_pb2.PreloadAdapterRequest:
    request = adapter_pb2.PreloadAdapterRequest()
    _set(request, "adapter_id", adapter_id)
    if isinstance(tier, str) and tier.upper() not in Tier.__members__:
        raise ValueError(f"tier: {tier!r} is none of disk, host, device")
    request.tier = (Tier[tier.upper()] if isinstance(tier, str) else tier).value  # type: ignore[assignment]
    return request


def split_call_options(options: Mapping[str, Any]) -> tuple[CallOptions, dict[str, Any]]:
    """What is about the call, and what is about its message."""
    about_call = CallOptions()
    if "timeout" in options:
        about_call["timeout"] = options["timeout"]
    if "metadata" in options:
        about_call["metadata"] = options["metadata"]
    return about_call, {name: value for name, value in options.items() if name not in about_call}


def _set_prompt(request: Any, text: str | None, options: Mapping[str, Any]) -> dict[str, Any]:
    """Sets prompt and adapter; returns the other options."""
    given = [name for name in _PROMPTS if name in options]
    if (text is not None) + len(given) != 1:
        raise TypeError("exactly one of a text, messages and token_ids must be given")
    if text is not None:
        _set(request, "text", text)
    elif "messages" in options:
        # Marks the field as given even when the conversation is empty, so that the server can say what is wrong.
        request.chat.SetInParent()
        request.chat.messages.extend(_chat(options["messages"]))
    else:
        request.token_ids.SetInParent()
        _set(request.token_ids, "ids", options["token_ids"], "token_ids")
    if "adapter" in options:
        _set(request, "adapter_id", options["adapter"], "adapter")
    return {name: value for name, value in options.items() if name not in (*_PROMPTS, "adapter")}


def _chat(messages: str | Iterable[MessageLike]) -> list[generation_pb2.ChatMessage]:
    if isinstance(messages, str):
        messages = [Message("user", messages)]
    return [_chat_message(number, message) for number, message in enumerate(messages)]


def _chat_message(number: int, message: MessageLike) -> generation_pb2.ChatMessage:
    if isinstance(message, Message):
        role, content = message.role, message.content
    elif isinstance(message, Mapping):
        if set(message) != {"role", "content"}:
            raise ValueError(f"messages[{number}]: has the keys {sorted(message)}, not role and content")
        role, content = message["role"], message["content"]
    else:
        role, content = message
    turn = generation_pb2.ChatMessage()
    _set(turn, "role", role, f"messages[{number}].role")
    _set(turn, "content", content, f"messages[{number}].content")
    return turn


def _set_all(request: Any, options: Mapping[str, Any], names: Sequence[str]) -> None:
    _no_more({name: value for name, value in options.items() if name not in names})
    for name, value in options.items():
        _set(request, name, value)


def _no_more(options: Mapping[str, Any]) -> None:
    for name in options:
        raise TypeError(f"unknown option {name!r}")


def _set(message: Any, field: str, value: Any, shown: str = "") -> None:
    """Sets a field; what protobuf refuses is refused by the option's name."""
    try:
        current = getattr(message, field)
        if isinstance(value, Mapping):
            current.update(value)
        elif isinstance(value, Iterable) and not isinstance(value, str | bytes):
            current.extend(value)
        else:
            setattr(message, field, value)
    except (TypeError, ValueError, AttributeError) as error:
        kind = ValueError if isinstance(error, ValueError) else TypeError
        raise kind(f"{shown or field}: {_short(value)} cannot be sent: {error}") from None


def _short(value: object) -> str:
    text = ascii(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
