"""What the parts of the router tell each other. PURE.

Log probabilities pass through the router unread, so they stay what they came as: `Wire`. The client's request goes on to
the engine, and waits, as the bytes of a GenerateRequest.
"""

from __future__ import annotations

from collections.abc import Sequence as Row
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, Protocol

Wire = Any


class FinishReason(IntEnum):
    """Why an answer ended, by its number on the wire."""

    LENGTH = 1
    EOS = 2
    STOP = 3


@dataclass(frozen=True, slots=True)
class Started:
    """A sequence has begun."""

    prompt_tokens: int
    cached_prompt_tokens: int
    adapter_wait: float


@dataclass(frozen=True, slots=True)
class Finished:
    """A sequence was answered."""

    finish_reason: FinishReason
    stop_match: str
    output_tokens: int
    preemptions: int


@dataclass(frozen=True, slots=True)
class Failed:
    """A sequence could not be answered; code, reason and metadata are the engine's."""

    code: int
    reason: str
    message: str
    metadata: dict[str, str]


class Piece(Protocol):
    """Something to append to an answer."""

    @property
    def text(self) -> str: ...
    @property
    def token_ids(self) -> Row[int]: ...
    @property
    def logprobs(self) -> Row[Wire]: ...
    @property
    def prompt_logprobs(self) -> Row[Wire]: ...


# Not frozen: one is made for every token, and freezing triples the price.
@dataclass(slots=True)
class Output:
    """What a step did for one sequence; a Piece of its answer."""

    sequence_id: int
    text: str
    token_ids: Row[int]
    logprobs: Row[Wire]
    prompt_logprobs: Row[Wire]
    started: Started | None
    end: Finished | Failed | None


@dataclass(frozen=True, slots=True)
class Credit:
    """What an engine is ready to take: sequences of this router in all; None where it does not say."""

    places: int | None
    is_draining: bool


@dataclass(frozen=True, slots=True)
class Sequence:
    """A request as an engine gets it, with the answer another one has begun, and the length of its prompt there."""

    sequence_id: int
    request: bytes
    adapter_digest: str
    chat_template: str
    traceparent: str
    answered: Row[int] = ()
    prompt_tokens: int = 0
    urgent: bool = False


@dataclass(slots=True)
class Delta:
    """The next piece of an answer."""

    text: str
    token_ids: Row[int]
    logprobs: Row[Wire]
    prompt_logprobs: Row[Wire]


@dataclass(frozen=True, slots=True)
class Receipt:
    """What happened to a request on its way; seconds."""

    queue: float
    adapter_wait: float
    time_to_first_token: float
    total: float
    engine_id: str
    adapter_tier: str
    charge: float
    preemptions: int
    migrations: int


@dataclass(frozen=True, slots=True)
class Completion:
    """The end of an answer."""

    finish_reason: FinishReason
    stop_match: str
    prompt_tokens: int
    cached_prompt_tokens: int
    output_tokens: int
    receipt: Receipt
    adapter_id: str
    adapter_digest: str
    request_id: str
