"""What every kind of source can do, and what is the same for all of them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

from cache.artifact import WEIGHTS, AdapterFiles
from cache.errors import MalformedAdapter
from cache.peft_config import FILE as CONFIG
from servicekit.errors import InvalidField, NotImplementedYet

TEMPLATE = "chat_template.jinja"
TOKENIZER_CONFIG = "tokenizer_config.json"
PICKLES = ("adapter_model.bin", "adapter_model.pt", "adapter_model.pth", "pytorch_model.bin")
OPTIONAL = frozenset({TEMPLATE, TOKENIZER_CONFIG})

MAX_CONFIG_BYTES = 1024 * 1024
MAX_TEMPLATE_BYTES = 64 * 1024
# Lists a tokenizer's added tokens, which can be thousands.
MAX_TOKENIZER_CONFIG_BYTES = 16 * 1024 * 1024
MAX_URI_LENGTH = 2048
SCHEMES = ("file", "hf", "s3", "https", "http")


@dataclass(frozen=True)
class Credentials:
    """A right to read a source: a bearer token, or a key for s3://. Never logged, never stored; all empty is none.

    Attributes:
        ambient: take what this machine was given by its cloud, its environment or its AWS profile.
    """

    token: str = field(default="", repr=False)
    access_key_id: str = field(default="", repr=False)
    secret_access_key: str = field(default="", repr=False)
    session_token: str = field(default="", repr=False)
    ambient: bool = False


NO_CREDENTIALS = Credentials()


@dataclass(frozen=True)
class Limits:
    """How long and how much a source may take.

    Attributes:
        connect_seconds: until a connection is there.
        idle_seconds: without a byte.
        total_seconds: of one adapter, from the first question to the last byte.
        weights_bytes: of the weights' file; the other files have limits of their own.
        at_once: adapters read from one source at the same time.
    """

    connect_seconds: float = 10.0
    idle_seconds: float = 30.0
    total_seconds: float = 900.0
    weights_bytes: int = 2 << 30
    at_once: int = 4

    @property
    def files(self) -> Mapping[str, int]:
        """Every file an adapter is read from -> the most bytes it may have."""
        return {
            CONFIG: MAX_CONFIG_BYTES,
            WEIGHTS: self.weights_bytes,
            TEMPLATE: MAX_TEMPLATE_BYTES,
            TOKENIZER_CONFIG: MAX_TOKENIZER_CONFIG_BYTES,
        }


class Source(Protocol):
    """One kind of place that adapters come from. Its methods are called on the event loop and do not block it.

    Both raise:
        InvalidField: the URI is malformed or not allowed, or a file is malformed or too large.
        SourceNotFound: there is nothing.
        SourceForbidden: these credentials may not read it.
        SourceUnreachable, SourceTooSlow: it did not deliver.
    """

    async def look(self, source_uri: str, credentials: Credentials, revision: str = "") -> str:
        """Makes sure that these credentials may read the adapter now; returns the revision it is at, "" if it has none.

        Two adapters of one URI and one revision, not "", are the same bytes. A source that keeps old revisions looks at the one
        named, and returns it if it is there.
        """
        ...

    async def fetch(self, source_uri: str, revision: str, credentials: Credentials) -> AdapterFiles:
        """The adapter's files at a revision that `look` returned; "" is what is there now.

        Raises SourceMoved when the source no longer has that revision.
        """
        ...

    async def close(self) -> None:
        """Ends what it holds open."""
        ...


def scheme_of(source_uri: str, served: tuple[str, ...] = SCHEMES) -> str:
    """The scheme of a source URI; raises for those not served, naming the field."""
    if not source_uri:
        raise InvalidField("source_uri", "must not be empty", "EMPTY")
    if len(source_uri) > MAX_URI_LENGTH or not source_uri.isprintable():
        message = f"is longer than {MAX_URI_LENGTH} characters or holds control characters"
        raise InvalidField("source_uri", message, "MALFORMED_URI")
    scheme, separator, _ = source_uri.partition("://")
    if not separator:
        raise InvalidField("source_uri", "has no scheme; file:///path is one", "MALFORMED_URI")
    if scheme not in SCHEMES:
        known = ", ".join(f"{name}://" for name in SCHEMES)
        raise InvalidField("source_uri", f"unknown scheme {scheme[:32]!r}; known are {known}", "UNKNOWN_SCHEME")
    if scheme not in served:
        raise NotImplementedYet("source_uri", f"{scheme}:// is not among the sources of this server")
    return scheme


def adapter_files(found: Mapping[str, bytes], pickle: str = "") -> AdapterFiles:
    """The files of an adapter by their names. Raises MalformedAdapter when one is missing or not what it should be.

    Args:
        pickle: name of a file that holds the weights as a pickle, if there is one.
    """
    if CONFIG not in found:
        raise MalformedAdapter(CONFIG, "is missing", "MISSING_FILE")
    if WEIGHTS not in found and pickle:
        message = f"is a pickle, which is never loaded; save the adapter as {WEIGHTS}"
        raise MalformedAdapter(pickle, message, "PICKLE_REFUSED")
    if WEIGHTS not in found:
        raise MalformedAdapter(WEIGHTS, "is missing", "MISSING_FILE")
    return AdapterFiles(found[CONFIG], found[WEIGHTS], _chat_template(found))


def too_large(name: str, size: int, limit: int) -> MalformedAdapter:
    """A file has more bytes than are read."""
    message = f"has {size} bytes, the limit is {limit}"
    return MalformedAdapter(name, message, "FILE_TOO_LARGE", size_bytes=size, limit=limit)


def _chat_template(found: Mapping[str, bytes]) -> str:
    """The adapter's own chat template; empty when it has none."""
    if TEMPLATE in found:
        with _malformed(TEMPLATE):
            return found[TEMPLATE].decode()
    if TOKENIZER_CONFIG not in found:
        return ""
    with _malformed(TOKENIZER_CONFIG):
        fields = json.loads(found[TOKENIZER_CONFIG])
        template = fields.get("chat_template") or "" if isinstance(fields, dict) else None
        # A lone surrogate cannot be encoded, and so not be sent to anyone either.
        if isinstance(template, str) and len(template.encode()) <= MAX_TEMPLATE_BYTES:
            return template
    message = f"chat_template is not one text of at most {MAX_TEMPLATE_BYTES} bytes"
    raise MalformedAdapter(TOKENIZER_CONFIG, message, "MALFORMED_TEMPLATE", limit=MAX_TEMPLATE_BYTES)


@contextmanager
def _malformed(name: str) -> Iterator[None]:
    try:
        yield
    except (ValueError, RecursionError):
        raise MalformedAdapter(name, "is not what it should be: text, or a JSON object", "MALFORMED_TEMPLATE") from None
