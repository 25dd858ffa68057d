"""The rights that the operator gave this server, by the beginning of the URIs they are for.

A JSON file that nobody else may read:

    [{"prefix": "hf://acme/", "token": "..."},
     {"prefix": "s3://models", "access_key_id": "...", "secret_access_key": "...", "session_token": "..."},
     {"prefix": "s3://shared/", "ambient": true}]

The longest prefix wins. They are used for every caller who brings none of his own: what they open, this server's callers may
register. A caller's own credentials are used instead, never as well.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from cache.sources.source import NO_CREDENTIALS, Credentials
from servicekit.errors import StartupError

_FIELDS = {"token": str, "access_key_id": str, "secret_access_key": str, "session_token": str, "ambient": bool}


class GivenCredentials:
    """See the module."""

    def __init__(self, given: Sequence[tuple[str, Credentials]] = ()) -> None:
        self._given = sorted(given, key=lambda each: len(each[0]), reverse=True)

    def of(self, source_uri: str) -> Credentials:
        """What this server may read a URI with; empty when nothing was given for it."""
        return next((rights for prefix, rights in self._given if _begins(source_uri, prefix)), NO_CREDENTIALS)


def read_credentials(file: str) -> GivenCredentials:
    """Reads the file; "" is none. Raises StartupError, which does not repeat what is in it."""
    if not file:
        return GivenCredentials()
    path = Path(file).expanduser()
    try:
        if path.stat().st_mode & 0o077:
            raise StartupError(f"the credentials {file} can be read by others; chmod 600 it")
        entries = json.loads(path.read_text())
        return GivenCredentials([_entry(each) for each in entries])
    except OSError as error:
        raise StartupError(f"the credentials {file} cannot be read: {error.strerror}") from None
    except (ValueError, TypeError, KeyError, AttributeError):
        raise StartupError(f"the credentials {file} are not what they should be: see docs/sources.md") from None


def _entry(raw: dict[str, object]) -> tuple[str, Credentials]:
    prefix, fields = raw["prefix"], {name: value for name, value in raw.items() if name != "prefix"}
    if not isinstance(prefix, str) or "://" not in prefix:
        raise ValueError
    if not fields or not all(isinstance(value, _FIELDS[name]) for name, value in fields.items()):
        raise ValueError
    return prefix, Credentials(**fields)  # type: ignore[arg-type]


def _begins(source_uri: str, prefix: str) -> bool:
    """Whether a URI lies below a prefix; s3://models is not the beginning of s3://models-of-others."""
    rest = source_uri.removeprefix(prefix)
    return source_uri.startswith(prefix) and (prefix.endswith("/") or rest == "" or rest[0] in "/@")
