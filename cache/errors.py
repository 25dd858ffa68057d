"""Errors of the cache.

InvalidField
├── (source_uri)            OUTSIDE_ROOTS, UNKNOWN_SCHEME, NOT_A_FOLDER, ...
├── AmbiguousBase           AMBIGUOUS_BASE      several bases may be meant, and nobody says which
├── NoSuchBase              NO_SUCH_BASE        bases are known, and none by that name: it may be misspelt
└── MalformedAdapter        the files are not a well-formed adapter; the reason says what is wrong
NotServable
├── UnsupportedAdapter      well formed, but this server cannot serve it; names feature, tensor or limit
│   └── RankTooLarge        RANK_TOO_LARGE      more than the engine can run
├── DigestMismatch          DIGEST_MISMATCH     the content is not what the caller expected
├── SourceChanged           SOURCE_CHANGED      a version is gone from the tiers, and its source holds another by now
├── SourceMoved             SOURCE_MOVED        the source no longer has the revision that was asked for
└── BaseMismatch            BASE_MISMATCH       an engine serves another base than an adapter's
NotFound
├── AdapterNotFound         ADAPTER_NOT_FOUND   no such adapter_id
├── VersionNotFound         VERSION_NOT_FOUND   no such digest
└── SourceNotFound          SOURCE_NOT_FOUND    nothing at the source
PermissionDenied
└── SourceForbidden         SOURCE_FORBIDDEN    the source does not let this caller read it
DeadlineExceeded
└── SourceTooSlow           SOURCE_TOO_SLOW     the source did not deliver in time
Exhausted
├── TierFull                TIER_FULL           no room in a tier
└── AdapterTooLarge         ADAPTER_TOO_LARGE   larger than a whole tier
Unavailable
├── RegistryUnreachable     REGISTRY_UNREACHABLE
├── SourceUnreachable       SOURCE_UNREACHABLE  the source does not answer, or with an error of its own
├── NeighbourFailed         NEIGHBOUR_FAILED    another node's artifact could not be had
├── BaseUnknown             BASE_UNKNOWN        no base is known yet, or none of an adapter's digest: engines may be starting
└── NoEngine                NO_ENGINE           no engine is attached
AlreadyExists
└── EngineAttached          ENGINE_ATTACHED     an engine of this id is attached
Internal
├── ArtifactDamaged         ARTIFACT_DAMAGED    a file is not what was written; it was removed, and is fetched again
├── TierFailed              TIER_FAILED         a tier's file system has another trouble than being full
└── IllegalMove             ILLEGAL_MOVE        an artifact was told to do what its state does not allow
"""

from __future__ import annotations

from collections.abc import Sequence

from servicekit.errors import (
    AlreadyExists,
    DeadlineExceeded,
    Exhausted,
    Internal,
    InvalidField,
    NotFound,
    NotServable,
    PermissionDenied,
    Unavailable,
)

MAX_SHOWN = 160


def shown(text: object, limit: int = MAX_SHOWN) -> str:
    """Text of a stranger, made fit for messages, logs and statuses: short, on one line, and valid Unicode."""
    whole = str(text)
    kept = "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in whole[:limit])
    return kept if len(whole) <= limit else f"{kept}… ({len(whole)} characters)"


class MalformedAdapter(InvalidField):
    """Raised when an adapter's files are malformed; names the file, and the tensor where there is one."""

    def __init__(self, file: str, message: str, reason: str, **metadata: object) -> None:
        super().__init__("source_uri", f"{file}: {message}", reason, file=file, **metadata)


class AmbiguousBase(InvalidField):
    """Raised when several bases may be meant; names them."""

    def __init__(self, message: str, known: Sequence[str]) -> None:
        listed = shown(", ".join(known), 1000)
        super().__init__("base_model", f"{shown(message, 400)}: {listed}", "AMBIGUOUS_BASE", known_bases=listed)


class NoSuchBase(InvalidField):
    """Raised when no engine has ever described a base that a caller names, but others are known; names them."""

    def __init__(self, asked: str, known: Sequence[str], close: str = "") -> None:
        name, listed = shown(asked), shown(", ".join(known), 1000)
        hint = f"; did you mean {shown(close)!r}?" if close else "."
        super().__init__(
            "base_model",
            f"no engine has ever served a base {name!r}{hint} Known: {listed}; another becomes known when its engine starts",
            "NO_SUCH_BASE",
            base_model=name,
            known_bases=listed,
        )


class UnsupportedAdapter(NotServable):
    """Raised when an adapter cannot be served on this base by this server."""


class RankTooLarge(UnsupportedAdapter):
    """Raised when an adapter has a larger rank than the engine can run."""

    def __init__(self, name: str, rank: int, limit: int) -> None:
        super().__init__(
            f"{name} has rank {rank}, the limit is {limit}", "RANK_TOO_LARGE", module=name, rank=rank, limit=limit
        )


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


class SourceChanged(NotServable):
    """Raised when a version has to be read from its source again, and there is another by now."""

    def __init__(self, source_uri: str, expected: str, found: str) -> None:
        super().__init__(
            f"{shown(source_uri)} holds version {found[:12]} by now, not {expected[:12]}; register the adapter again",
            "SOURCE_CHANGED",
            source_uri=shown(source_uri),
            expected=expected,
            found=found,
        )


class SourceMoved(NotServable):
    """Raised when a source no longer has the revision that was asked for."""

    def __init__(self, source_uri: str) -> None:
        message = f"{shown(source_uri)} has changed since; register the adapter again"
        super().__init__(message, "SOURCE_MOVED", source_uri=shown(source_uri))


class BaseMismatch(NotServable):
    """Raised when an engine's base is not the one an adapter was validated against."""

    def __init__(self, registered: str, engine: str) -> None:
        super().__init__(
            f"the adapter is registered for base {registered[:12]}, the engine serves {engine[:12]}",
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
        super().__init__(f"no adapter has version {shown(digest, 12)}", "VERSION_NOT_FOUND", digest=shown(digest))


class SourceNotFound(NotFound):
    """Raised when there is nothing at a source."""

    def __init__(self, source_uri: str, message: str) -> None:
        super().__init__(f"source_uri: {message}", "SOURCE_NOT_FOUND", field="source_uri", source_uri=shown(source_uri))


class SourceForbidden(PermissionDenied):
    """Raised when a source does not let the caller read an adapter; the reason a source gives is not repeated."""

    def __init__(self, source_uri: str, message: str = "the source does not let this caller read it") -> None:
        super().__init__(f"source_uri: {message}", "SOURCE_FORBIDDEN", field="source_uri", source_uri=shown(source_uri))


class SourceTooSlow(DeadlineExceeded):
    """Raised when a source did not deliver in time."""

    def __init__(self, source_uri: str, seconds: float) -> None:
        super().__init__(
            f"{shown(source_uri)} was not there within {seconds:g} seconds",
            "SOURCE_TOO_SLOW",
            retry_after=5.0,
            source_uri=shown(source_uri),
            limit_seconds=f"{seconds:g}",
        )


class SourceUnreachable(Unavailable):
    """Raised when a source does not answer, or answers with an error of its own, however often it is asked."""

    def __init__(self, source_uri: str, message: str) -> None:
        super().__init__(
            f"{shown(source_uri)}: {message}", "SOURCE_UNREACHABLE", retry_after=5.0, source_uri=shown(source_uri)
        )


class NeighbourFailed(Unavailable):
    """Raised when an artifact could not be had from another node."""

    def __init__(self, node_id: str, message: str) -> None:
        super().__init__(f"node {node_id}: {shown(message)}", "NEIGHBOUR_FAILED", node_id=node_id)


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


class AdapterTooLarge(Exhausted):
    """Raised when an artifact is larger than a whole tier."""

    def __init__(self, tier: str, size: int, limit: int) -> None:
        super().__init__(
            f"the artifact has {size} bytes, the {tier} tier holds {limit}",
            "ADAPTER_TOO_LARGE",
            tier=tier,
            size_bytes=size,
            limit=limit,
        )


class EngineAttached(AlreadyExists):
    """Raised when an engine of the same id is attached."""

    def __init__(self, engine_id: str) -> None:
        super().__init__(f"an engine {engine_id!r} is attached", "ENGINE_ATTACHED", engine_id=engine_id)


class RegistryUnreachable(Unavailable):
    """Raised when Redis does not answer."""

    def __init__(self) -> None:
        super().__init__("the registry cannot be reached", "REGISTRY_UNREACHABLE", retry_after=1.0)


class BaseUnknown(Unavailable):
    """Raised when no engine has described any base, or the one of an adapter, yet: nothing can be validated against it."""

    def __init__(self, asked: str = "") -> None:
        base = f"base {shown(asked)!r}" if asked else "a base"
        super().__init__(f"no engine has described {base} yet", "BASE_UNKNOWN", retry_after=2.0)


class NoEngine(Unavailable):
    """Raised when something needs an attached engine and there is none."""

    def __init__(self) -> None:
        super().__init__("no engine is attached", "NO_ENGINE", retry_after=2.0)


class ArtifactDamaged(Internal):
    """Raised when a tier's file is not what was written, or is gone; what was left of it has been removed."""

    def __init__(self, file: str, tier: str) -> None:
        super().__init__(f"{file} was damaged in the {tier} tier and removed", "ARTIFACT_DAMAGED", file=file, tier=tier)


class TierFailed(Internal):
    """Raised when a tier's file system has another trouble than being full."""

    def __init__(self, tier: str, message: str) -> None:
        super().__init__(f"the {tier} tier cannot be written: {message}", "TIER_FAILED", tier=tier)


class IllegalMove(Internal):
    """Raised when an artifact's state does not allow a move; the state is unchanged."""

    def __init__(self, state: str, move: str) -> None:
        super().__init__(f"an artifact that is {state} cannot {move}", "ILLEGAL_MOVE", state=state, move=move)
