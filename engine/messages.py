"""What crosses between the step thread and everybody else. All of it is immutable."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from opentelemetry.context import Context

from engine.answer import FinishReason, Stopping
from engine.logprobs import TokenLogprob
from engine.lora import DeviceAdapter
from engine.sampler import Sampling
from servicekit.errors import ServiceError


@dataclass(frozen=True, slots=True)
class Request:
    """A request, tokenised and checked against this base.

    Attributes:
        sequence_id: the router's name for it, unique on its connection.
        adapter: digest; empty for the base.
        received: when it reached the engine, monotonic seconds.
        trace: the context its spans are children of.
        prompt_logprobs: whether the log probabilities of the prompt are wanted.
        answered: tokens of the answer that another engine has produced and sent.
        urgent: whether the step that runs may be given up for it.
    """

    sequence_id: int
    adapter: str
    prompt: tuple[int, ...]
    sampling: Sampling
    stopping: Stopping
    received: float
    trace: Context
    prompt_logprobs: bool = False
    answered: tuple[int, ...] = ()
    urgent: bool = False


@dataclass(frozen=True, slots=True)
class Started:
    """What is known once a sequence has begun. `adapter_wait` is in seconds."""

    prompt_tokens: int
    cached_prompt_tokens: int
    adapter_wait: float


@dataclass(frozen=True, slots=True)
class Finished:
    """A sequence was answered."""

    reason: FinishReason
    stop_match: str
    output_tokens: int
    preemptions: int


@dataclass(frozen=True, slots=True)
class Failed:
    """A sequence could not be answered."""

    error: ServiceError


@dataclass(frozen=True, slots=True)
class Output:
    """What happened to one sequence in a step.

    `prompt_logprobs` go on where the ones before them stopped; the prompt's first token has none.
    """

    sequence_id: int
    text: str = ""
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    started: Started | None = None
    end: Finished | Failed | None = None


@dataclass(frozen=True, slots=True)
class Load:
    """How loaded the engine is."""

    running: int = 0
    waiting: int = 0
    loading: int = 0
    free_blocks: int = 0
    total_blocks: int = 0


@dataclass(frozen=True, slots=True)
class Frame:
    """The outputs of one step for one connection; step 0 when no step ran."""

    step: int
    outputs: tuple[Output, ...]
    load: Load


class Connection(Protocol):
    """A router's stream, as the step thread sees it."""

    def deliver(self, frame: Frame) -> None:
        """Takes a frame; called on the step thread, returns at once."""


@dataclass(frozen=True, slots=True)
class Submit:
    """To the loop: start a sequence."""

    connection: Connection
    request: Request


@dataclass(frozen=True, slots=True)
class Cancel:
    """To the loop: end a sequence without another word. One that has ended already is no error."""

    connection: Connection
    sequence_id: int


@dataclass(frozen=True, slots=True)
class Hangup:
    """To the loop: a router is gone; end all its sequences."""

    connection: Connection


@dataclass(frozen=True, slots=True)
class Install:
    """To the loop: an adapter was copied to the device."""

    adapter: DeviceAdapter


@dataclass(frozen=True, slots=True)
class Evict:
    """To the loop: remove an adapter, unless sequences use it and it is not by force."""

    digest: str
    force: bool


@dataclass(frozen=True, slots=True)
class Deny:
    """To the loop: an adapter cannot be had; the sequences that wait for it fail with this error."""

    digest: str
    error: ServiceError


Message = Submit | Cancel | Hangup | Install | Evict | Deny


@dataclass(frozen=True, slots=True)
class Usage:
    """To the cache: adapters that sequences use or wait for, those they wait for, most wanted first, and what is popular.

    Attributes:
        begun: how many sequences have begun with each since the last report.
    """

    in_use: frozenset[str] = frozenset()
    wanted: tuple[str, ...] = ()
    begun: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Loaded:
    """To the cache: an adapter is on the device."""

    digest: str
    size_bytes: int


@dataclass(frozen=True, slots=True)
class LoadFailed:
    """To the cache: an adapter could not be brought to the device."""

    digest: str
    error: ServiceError


@dataclass(frozen=True, slots=True)
class Evicted:
    """To the cache: an adapter was removed, or was in use and stays."""

    digest: str
    evicted: bool


Report = Usage | Loaded | LoadFailed | Evicted
