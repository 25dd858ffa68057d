"""Every unary call and stream, described once: which method, which message, how its answer is read.

The clients differ only in how they make a call.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from os import PathLike
from typing import Any, Generic, Literal, TypeVar

from loraplex import _requests, _wire
from loraplex._requests import CallOptions, split_call_options
from loraplex.errors import Internal
from loraplex.types import (
    Adapter,
    AdapterEvent,
    Completion,
    Delta,
    Generation,
    ModelInfo,
    Tier,
    Tokenization,
)
from loraplex.v1 import adapter_pb2, adapter_pb2_grpc, generation_pb2, generation_pb2_grpc

R = TypeVar("R")
PAGE_SIZE = 1000


class Stubs:
    """The stubs of a channel, of either API."""

    def __init__(self, channel: Any) -> None:
        self.generation: Any = generation_pb2_grpc.GenerationServiceStub(channel)
        self.adapters: Any = adapter_pb2_grpc.AdapterServiceStub(channel)


@dataclass(frozen=True)
class Call(Generic[R]):
    """One RPC.

    Attributes:
        method: picks the RPC from the stubs.
        read: its response, or one event of its stream, as what the caller gets.
        repeatable: whether a call whose fate is unknown may be made again.
    """

    method: Callable[[Stubs], Any]
    request: Any
    read: Callable[[Any], R]
    options: CallOptions
    repeatable: bool = True


def generate(text: str | None, options: Mapping[str, Any]) -> Call[Generation]:
    about_call, rest = split_call_options(options)
    request = _requests.generate_request(text, rest)
    return Call(lambda stubs: stubs.generation.Generate, request, _wire.generation, about_call)


def stream(text: str | None, options: Mapping[str, Any]) -> Call[Delta | Completion | None]:
    about_call, rest = split_call_options(options)
    request = _requests.generate_request(text, rest)
    return Call(lambda stubs: stubs.generation.StreamGenerate, request, _wire.stream_event, about_call)


def tokenize(text: str | None, options: Mapping[str, Any]) -> Call[Tokenization]:
    about_call, rest = split_call_options(options)
    request = _requests.tokenize_request(text, rest)
    return Call(lambda stubs: stubs.generation.Tokenize, request, _wire.tokenization, about_call)


def model_info(options: CallOptions) -> Call[ModelInfo]:
    request = generation_pb2.GetModelInfoRequest()
    return Call(lambda stubs: stubs.generation.GetModelInfo, request, _wire.model_info, options)


def register(adapter_id: str, source: str | PathLike[str], options: Mapping[str, Any]) -> Call[Adapter]:
    about_call, rest = split_call_options(options)
    request = _requests.register_request(adapter_id, source, rest)
    return Call(lambda stubs: stubs.adapters.RegisterAdapter, request, _adapter, about_call)


def get(adapter_id: str, options: CallOptions) -> Call[Adapter]:
    return Call(lambda stubs: stubs.adapters.GetAdapter, _requests.get_request(adapter_id), _adapter, options)


def list_page(page_token: str, options: CallOptions) -> Call[tuple[list[Adapter], str]]:
    request = adapter_pb2.ListAdaptersRequest(page_size=PAGE_SIZE, page_token=page_token)
    return Call(lambda stubs: stubs.adapters.ListAdapters, request, _page, options)


def update(adapter_id: str, options: Mapping[str, Any]) -> Call[Adapter]:
    about_call, rest = split_call_options(options)
    request = _requests.update_request(adapter_id, rest)
    return Call(lambda stubs: stubs.adapters.UpdateAdapter, request, _adapter, about_call)


def delete(adapter_id: str, force: bool, options: CallOptions) -> Call[None]:
    request = _requests.delete_request(adapter_id, force)
    # A deletion whose answer was lost would be answered with NOT_FOUND the second time.
    return Call(lambda stubs: stubs.adapters.DeleteAdapter, request, _nothing, options, repeatable=False)


def preload(adapter_id: str, tier: Tier | Literal["disk", "host", "device"], options: CallOptions) -> Call[Adapter]:
    request = _requests.preload_request(adapter_id, tier)
    return Call(lambda stubs: stubs.adapters.PreloadAdapter, request, _adapter, options)


def watch(options: CallOptions) -> Call[AdapterEvent]:
    request = adapter_pb2.WatchAdaptersRequest()
    return Call(lambda stubs: stubs.adapters.WatchAdapters, request, _wire.adapter_event, options)


class Answer:
    """What a stream of deltas has said so far.

    Attributes:
        left: the caller went away before the end.
    """

    def __init__(self) -> None:
        self.left = False
        self.deltas: list[Delta] = []
        self._completion: Completion | None = None

    def take(self, event: Delta | Completion | None) -> Delta | None:
        """Notes an event; returns it when it is for the caller."""
        if isinstance(event, Delta):
            self.deltas.append(event)
            return event
        self._completion = event or self._completion
        return None

    @property
    def completion(self) -> Completion:
        """How the answer ended; an error while it has not."""
        if self._completion is None:
            raise RuntimeError("the stream has not been read to its end")
        return self._completion

    @property
    def generation(self) -> Generation:
        """The whole answer."""
        return _wire.joined(self.deltas, self.completion)

    def check_ended(self) -> None:
        """Called when the stream is over."""
        if self._completion is None and not self.left:
            raise Internal("the stream ended without a completion")


def _adapter(response: Any) -> Adapter:
    return _wire.adapter(response.adapter)


def _page(response: adapter_pb2.ListAdaptersResponse) -> tuple[list[Adapter], str]:
    return [_wire.adapter(message) for message in response.adapters], response.next_page_token


def _nothing(response: Any) -> None:
    return None
