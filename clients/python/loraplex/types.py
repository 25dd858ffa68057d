"""What calls return. Durations are seconds; everything is immutable."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime
from enum import Enum


class FinishReason(Enum):
    """Why an answer ended."""

    LENGTH = 1
    EOS = 2
    STOP = 3


class Tier(Enum):
    """Where the bytes of an adapter are, worst first."""

    REMOTE = 1
    DISK = 2
    HOST = 3
    DEVICE = 4


class AdapterState(Enum):
    """What can be asked of an adapter."""

    ACTIVE = 1
    DRAINING = 2
    FAILED = 3


class AdapterEventKind(Enum):
    """What changed in the registry; SNAPSHOT_END comes without an adapter."""

    SNAPSHOT = 1
    SNAPSHOT_END = 2
    REGISTERED = 3
    UPDATED = 4
    DELETED = 5
    RESIDENCY = 6


@dataclass(frozen=True)
class Message:
    """One turn of a conversation."""

    role: str
    content: str


@dataclass(frozen=True)
class TokenLogprob:
    """Log probability of a token, and of the most likely ones at its place: (token id, log probability)."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Delta:
    """The next piece of an answer. Text and token ids of one delta need not match.

    `prompt_logprobs` come before the text, when asked for: one for each token of the prompt but the first.
    """

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...]
    prompt_logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True)
class Usage:
    """Tokens read and written; `cached_prompt_tokens` are among `prompt_tokens`."""

    prompt_tokens: int
    cached_prompt_tokens: int
    output_tokens: int


@dataclass(frozen=True)
class Receipt:
    """What happened to a request on its way.

    Attributes:
        queue: from arrival to dispatch to an engine.
        adapter_wait: until the adapter was on the engine's device.
        time_to_first_token, total: from arrival at the server.
        adapter_tier: where the adapter was at arrival: "remote", "disk", "host", "device"; "" for the base.
        charge: what the request's flow was charged, in weighted tokens.
    """

    queue: float
    adapter_wait: float
    time_to_first_token: float
    total: float
    engine_id: str
    adapter_tier: str
    charge: float
    preemptions: int
    migrations: int


@dataclass(frozen=True, kw_only=True)
class Completion:
    """How an answer ended and what it cost.

    Attributes:
        stop_match: the stop string that ended it, or the stop token's id in decimal; else "".
        adapter_id, adapter_digest: what answered, and which version of it; "" for the base.
    """

    finish_reason: FinishReason | None
    stop_match: str
    usage: Usage
    receipt: Receipt
    adapter_id: str
    adapter_digest: str
    request_id: str


@dataclass(frozen=True, kw_only=True)
class Generation(Completion):
    """A whole answer.

    Attributes:
        logprobs: one for each token id, when asked for with `top_logprobs`.
        prompt_logprobs: one for each token of the prompt but the first, when asked for.
    """

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...]
    prompt_logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True)
class Tokenization:
    """The token ids a prompt becomes, and the vocabulary entry of each."""

    token_ids: tuple[int, ...]
    tokens: tuple[str, ...]


@dataclass(frozen=True)
class ServedBase:
    """A base whose engines are connected."""

    base_model: str
    base_digest: str
    engine_ids: tuple[str, ...]


@dataclass(frozen=True)
class ModelInfo:
    """The base model that answers without an adapter, and the limits of a request; `bases` are all there are, it first."""

    base_model: str
    base_digest: str
    architecture: str
    context_length: int
    vocab_size: int
    dtype: str
    device: str
    max_adapter_rank: int
    has_chat_template: bool
    engine_ids: tuple[str, ...]
    server_version: str
    bases: tuple[ServedBase, ...] = ()


@dataclass(frozen=True)
class Residency:
    """One place where an adapter's bytes are; `engine_id` is "" but on the device tier."""

    node_id: str
    engine_id: str
    tier: Tier | None


@dataclass(frozen=True)
class Lease:
    """An engine whose sequences use or wait for an adapter."""

    node_id: str
    engine_id: str


@dataclass(frozen=True)
class Failure:
    """Why an adapter cannot be brought up, and when that is tried again."""

    reason: str
    message: str
    retry_time: datetime


@dataclass(frozen=True)
class Credentials:
    """A caller's right to read a source: a token for hf:// and https://, a key for s3://."""

    token: str = field(default="", repr=False)
    access_key_id: str = field(default="", repr=False)
    secret_access_key: str = field(default="", repr=False)
    session_token: str = field(default="", repr=False)


@dataclass(frozen=True)
class Adapter:
    """A registered adapter.

    `digest` is the version its id answers with now; `last_use_time` is of any node. `base_model` is what its own files
    call its base, `base_name` what the server calls it, and `base_digest` which one that is.
    """

    adapter_id: str
    source_uri: str
    digest: str
    base_model: str
    method: str
    rank: int
    size_bytes: int
    pinned: bool
    weight: float
    create_time: datetime
    state: AdapterState | None
    residency: tuple[Residency, ...]
    chat_template: str
    target_modules: tuple[str, ...]
    source_revision: str = ""
    last_use_time: datetime | None = None
    leases: tuple[Lease, ...] = ()
    failure: Failure | None = None
    base_digest: str = ""
    base_name: str = ""

    @property
    def tier(self) -> Tier | None:
        """The best tier it is in anywhere, None when nothing is known."""
        tiers = [place.tier for place in self.residency if place.tier]
        return max(tiers, key=lambda tier: tier.value, default=None)


@dataclass(frozen=True)
class AdapterEvent:
    """A change of registry or residency, with the adapter after it."""

    kind: AdapterEventKind | None
    adapter: Adapter | None
