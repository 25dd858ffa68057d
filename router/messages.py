"""What the parts of the router tell each other. PURE.

Log probabilities and the client's request pass through the router unread, so they stay what they came as: `Wire`.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Any

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


@dataclass(frozen=True, slots=True)
class Output:
    """What a step did for one sequence."""

    sequence_id: int
    text: str
    token_ids: list[int]
    logprobs: list[Wire]
    prompt_logprobs: list[Wire]
    started: Started | None
    end: Finished | Failed | None


@dataclass(frozen=True, slots=True)
class Sequence:
    """A request as an engine gets it."""

    sequence_id: int
    request: Wire
    adapter_digest: str
    chat_template: str
    traceparent: str


@dataclass(frozen=True, slots=True)
class Delta:
    """The next piece of an answer."""

    text: str
    token_ids: list[int]
    logprobs: list[Wire]
    prompt_logprobs: list[Wire]


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
