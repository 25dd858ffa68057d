"""Errors of the cache.

InvalidField
├── (source_uri)            OUTSIDE_ROOTS, UNKNOWN_SCHEME, NOT_A_FOLDER, ...
└── MalformedAdapter        the files are not a well-formed adapter; the reason says what is wrong
NotServable
├── UnsupportedAdapter      well formed, but this server cannot serve it; names feature, tensor or limit
├── DigestMismatch          DIGEST_MISMATCH     the content is not what the caller expected
└── BaseMismatch            BASE_MISMATCH       an engine serves another base than this registry
NotFound
├── AdapterNotFound         ADAPTER_NOT_FOUND   no such adapter_id
├── VersionNotFound         VERSION_NOT_FOUND   no such digest
└── SourceNotFound          SOURCE_NOT_FOUND    nothing at the source
Exhausted
└── TierFull                TIER_FULL           no room in a tier
Unavailable
├── RegistryUnreachable     REGISTRY_UNREACHABLE
├── BaseUnknown             BASE_UNKNOWN        no engine has described the base yet
└── NoEngine                NO_ENGINE           no engine is attached
Internal
└── IllegalMove             ILLEGAL_MOVE        an artifact was told to do what its state does not allow
"""

from __future__ import annotations

from servicekit.errors import Exhausted, Internal, InvalidField, NotFound, NotServable, Unavailable


class MalformedAdapter(InvalidField):
    """Raised when an adapter's files are malformed; names the file, and the tensor where there is one."""

    def __init__(self, file: str, message: str, reason: str, **metadata: object) -> None:
        super().__init__("source_uri", f"{file}: {message}", reason, file=file, **metadata)


class UnsupportedAdapter(NotServable):
    """Raised when an adapter cannot be served on this base by this server."""


class DigestMismatch(NotServable):
    """Raised when an adapter's digest is not the expected one."""

    def __init__(self, expected: str, found: str) -> None:
        super().__init__(
            f"expected_digest: the adapter's digest is {found}, not {expected}",
            "DIGEST_MISMATCH",
            field="expected_digest",
            expected=expected,
            found=found,
        )


class BaseMismatch(NotServable):
    """Raised when an engine's base is not the one the registered adapters were validated against."""

    def __init__(self, registered: str, engine: str) -> None:
        super().__init__(
            f"this registry holds adapters of base {registered[:12]}, the engine serves {engine[:12]}",
            "BASE_MISMATCH",
            registered=registered,
            engine=engine,
        )


class AdapterNotFound(NotFound):
    """Raised when no adapter has this id."""

    def __init__(self, adapter_id: str) -> None:
        super().__init__(f"adapter {adapter_id!r} is not registered", "ADAPTER_NOT_FOUND", adapter_id=adapter_id)


class VersionNotFound(NotFound):
    """Raised when no adapter has this digest."""

    def __init__(self, digest: str) -> None:
        super().__init__(f"no adapter has version {digest[:12]}", "VERSION_NOT_FOUND", digest=digest)


class SourceNotFound(NotFound):
    """Raised when there is nothing at a source."""

    def __init__(self, source_uri: str, message: str) -> None:
        super().__init__(f"source_uri: {message}", "SOURCE_NOT_FOUND", field="source_uri", source_uri=source_uri)


class TierFull(Exhausted):
    """Raised when a tier has no room."""

    def __init__(self, tier: str, needed: int, free: int) -> None:
        super().__init__(
            f"the {tier} tier has no room: {needed} bytes are needed, {free} are free",
            "TIER_FULL",
            tier=tier,
            needed_bytes=needed,
            free_bytes=free,
        )


class RegistryUnreachable(Unavailable):
    """Raised when Redis does not answer."""

    def __init__(self) -> None:
        super().__init__("the registry cannot be reached", "REGISTRY_UNREACHABLE", retry_after=1.0)


class BaseUnknown(Unavailable):
    """Raised when no engine has described the base yet, so that nothing can be validated."""

    def __init__(self) -> None:
        super().__init__("no engine has described the base yet", "BASE_UNKNOWN", retry_after=2.0)


class NoEngine(Unavailable):
    """Raised when something needs an attached engine and there is none."""

    def __init__(self) -> None:
        super().__init__("no engine is attached", "NO_ENGINE", retry_after=2.0)


class IllegalMove(Internal):
    """Raised when an artifact's state does not allow a move; the state is unchanged."""

    def __init__(self, state: str, move: str) -> None:
        super().__init__(f"an artifact that is {state} cannot {move}", "ILLEGAL_MOVE", state=state, move=move)
