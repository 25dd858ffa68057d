"""What every kind of source can do."""

from __future__ import annotations

from typing import Protocol

from cache.artifact import AdapterFiles
from servicekit.errors import InvalidField, NotImplementedYet

MAX_CONFIG_BYTES = 1024 * 1024
MAX_TEMPLATE_BYTES = 64 * 1024
# Lists a tokenizer's added tokens, which can be thousands.
MAX_TOKENIZER_CONFIG_BYTES = 16 * 1024 * 1024
MAX_URI_LENGTH = 2048
# Part of the contract; the code behind them is not there yet.
LATER_SCHEMES = ("hf", "s3", "https")


class Source(Protocol):
    """Reads the files of an adapter. Blocks; call it off the event loop."""

    def read(self, source_uri: str) -> AdapterFiles:
        """The adapter's files.

        Raises:
            InvalidField: the URI is malformed or not allowed, or a file is malformed or too large.
            SourceNotFound: there is nothing.
        """
        ...


def scheme_of(source_uri: str) -> str:
    """The scheme of a source URI that is served; raises for all others, naming the field."""
    if not source_uri:
        raise InvalidField("source_uri", "must not be empty", "EMPTY")
    if len(source_uri) > MAX_URI_LENGTH or "\0" in source_uri:
        raise InvalidField("source_uri", f"is longer than {MAX_URI_LENGTH} characters or holds NUL", "MALFORMED_URI")
    scheme, separator, _ = source_uri.partition("://")
    if not separator:
        raise InvalidField("source_uri", "has no scheme; file:///path is one", "MALFORMED_URI")
    if scheme in LATER_SCHEMES:
        raise NotImplementedYet("source_uri", f"{scheme}:// is not served yet")
    if scheme != "file":
        served = ", ".join(f"{name}://" for name in ("file", *LATER_SCHEMES))
        raise InvalidField("source_uri", f"unknown scheme {scheme[:32]!r}; known are {served}", "UNKNOWN_SCHEME")
    return scheme
