"""https:// sources: a folder on a web server, `<uri>/adapter_config.json` and so on, registered with its digest.

Without a digest nobody would know what a web server gave: the caller has to say what is expected. http:// is served for
networks that the operator named, and for nothing else.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from urllib.parse import quote, unquote, urlsplit

from cache.artifact import AdapterFiles
from cache.sources import remote
from cache.sources.download import Downloads, RemoteFile
from cache.sources.http import HttpClient, Network
from cache.sources.source import Credentials, Limits
from servicekit.errors import InvalidField


class WebSource:
    """Reads adapters from web servers."""

    def __init__(self, downloads: Downloads, limits: Limits, networks: Iterable[Network]) -> None:
        self._downloads, self._limits = downloads, limits
        self._client = HttpClient(limits, networks)

    async def look(self, source_uri: str, credentials: Credentials, revision: str = "") -> str:
        """See Source.look."""
        folder = _folder(source_uri)
        return await remote.look(
            self._downloads,
            self._client,
            source_uri,
            lambda name: self._file(source_uri, folder, name, "", credentials),
            self._limits.files,
        )

    async def fetch(self, source_uri: str, revision: str, credentials: Credentials) -> AdapterFiles:
        """See Source.fetch."""
        folder = _folder(source_uri)
        return await remote.fetch(
            self._downloads,
            self._client,
            revision,
            lambda name, etag: self._file(source_uri, folder, name, etag, credentials),
            self._limits.files,
        )

    async def close(self) -> None:
        """Closes the connections."""
        await self._client.close()

    def _file(self, source_uri: str, folder: str, name: str, etag: str, credentials: Credentials) -> RemoteFile:
        def sign(_: str, headers: Mapping[str, str]) -> Mapping[str, str]:
            return {**headers, "authorization": f"Bearer {credentials.token}"} if credentials.token else headers

        limit = self._limits.files.get(name, 0)
        return RemoteFile(source_uri, name, f"{folder}/{name}", limit, sign, etag)


def _folder(source_uri: str) -> str:
    """The URL of a folder. Raises InvalidField for what does not name one, or would carry a secret into the registry."""
    try:
        parts = urlsplit(source_uri)
        host, _ = parts.hostname, parts.port
    except ValueError:
        host = None
    if not host or not host.isascii():
        raise InvalidField("source_uri", "must be https://host/path", "MALFORMED_URI")
    if "@" in parts.netloc or parts.query or parts.fragment or "?" in source_uri or "#" in source_uri:
        message = "must not hold a user, a query or a fragment; rights to read it go into credentials"
        raise InvalidField("source_uri", message, "MALFORMED_URI")
    path = parts.path.rstrip("/")
    if any(part in (".", "..") for part in unquote(path).split("/")) or "\\" in unquote(path):
        raise InvalidField("source_uri", "must not hold . or .. as a part of its path", "MALFORMED_URI")
    return f"{parts.scheme}://{parts.netloc}{quote(path, safe='/%:@!$&()*+,;=~')}"
