"""s3://bucket/prefix sources: a folder in any S3-compatible store; requests are signed by botocore, and sent as all others.

Where versioning is on, the ETags pin the content all the same: If-Match refuses what has been overwritten.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Iterable, Mapping
from urllib.parse import quote

from botocore.auth import S3SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials as Keys
from botocore.session import Session

from cache.artifact import AdapterFiles
from cache.sources import remote
from cache.sources.download import Downloads, RemoteFile
from cache.sources.http import HttpClient, Network
from cache.sources.source import Credentials, Limits
from servicekit.errors import InvalidField

_BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")
Sign = Callable[[str, str, Mapping[str, str]], Mapping[str, str]]


class S3Source:
    """Reads adapters from an S3-compatible store.

    Args:
        endpoint: the store's URL; buckets are the first part of the path there. Empty is AWS, where they are part of the host.
    """

    def __init__(
        self, downloads: Downloads, limits: Limits, networks: Iterable[Network], endpoint: str, region: str
    ) -> None:
        self._downloads, self._limits = downloads, limits
        self._endpoint, self._region = endpoint.rstrip("/"), region
        self._client = HttpClient(limits, networks, endpoint)
        self._session: Session | None = None

    async def look(self, source_uri: str, credentials: Credentials, revision: str = "") -> str:
        """See Source.look."""
        file = await self._files(source_uri, credentials)
        names = self._limits.files
        return await remote.look(self._downloads, self._client, source_uri, lambda name: file(name, ""), names)

    async def fetch(self, source_uri: str, revision: str, credentials: Credentials) -> AdapterFiles:
        """See Source.fetch."""
        file = await self._files(source_uri, credentials)
        return await remote.fetch(self._downloads, self._client, revision, file, self._limits.files)

    async def close(self) -> None:
        """Closes the connections."""
        await self._client.close()

    async def _files(self, source_uri: str, credentials: Credentials) -> Callable[[str, str], RemoteFile]:
        folder = self._folder(source_uri)
        # What the machine was given may have to be asked for at its cloud's metadata service.
        keys = await asyncio.to_thread(self._keys, credentials)

        def file(name: str, etag: str) -> RemoteFile:
            url = f"{folder}/{name}"

            def sign(method: str, headers: Mapping[str, str]) -> Mapping[str, str]:
                return self._signed(keys, method, url, headers)

            # A signature is for one host: a store that redirects is set up with another region or endpoint.
            return RemoteFile(source_uri, name, url, self._limits.files.get(name, 0), sign, etag, redirects=False)

        return file

    def _folder(self, source_uri: str) -> str:
        bucket, _, key = source_uri.removeprefix("s3://").partition("/")
        key = key.strip("/")
        if not _BUCKET.fullmatch(bucket) or ".." in bucket:
            raise InvalidField(
                "source_uri", "must be s3://bucket/key, with a bucket's name as S3 allows it", "MALFORMED_URI"
            )
        if any(part in ("", ".", "..") for part in key.split("/")) and key:
            raise InvalidField("source_uri", "must not hold an empty part, . or .. in its key", "MALFORMED_URI")
        path = f"/{quote(key, safe='/~')}" if key else ""
        if self._endpoint:
            return f"{self._endpoint}/{bucket}{path}"
        return f"https://{bucket}.s3.{self._region}.amazonaws.com{path}"

    def _keys(self, credentials: Credentials) -> Keys | None:
        if credentials.access_key_id:
            return Keys(credentials.access_key_id, credentials.secret_access_key, credentials.session_token or None)
        if not credentials.ambient:
            return None
        self._session = self._session or Session()
        found = self._session.get_credentials()
        if found is None:
            return None
        frozen = found.get_frozen_credentials()
        return Keys(frozen.access_key, frozen.secret_key, frozen.token)

    def _signed(self, keys: Keys | None, method: str, url: str, headers: Mapping[str, str]) -> Mapping[str, str]:
        if keys is None:
            return headers
        request = AWSRequest(method, url, headers=dict(headers))
        S3SigV4Auth(keys, "s3", self._region).add_auth(request)
        return dict(request.headers.items())
