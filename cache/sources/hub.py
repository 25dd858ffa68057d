"""hf://owner/name[@revision] sources: repositories of a Hugging Face hub, read at the commit that a branch or tag points to.

The hub's library says what is where; the bytes come the way they come from all other sources, with its limits and resumed.
"""

from __future__ import annotations

import asyncio
import hashlib
import re
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor

import httpx2
from huggingface_hub import HfApi, constants, hf_hub_url
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.hf_api import ModelInfo

from cache.artifact import WEIGHTS, AdapterFiles
from cache.errors import MalformedAdapter, SourceForbidden, SourceNotFound, SourceUnreachable
from cache.sources.download import Downloads, RemoteFile
from cache.sources.http import HttpClient, Network
from cache.sources.source import PICKLES, Credentials, Limits, adapter_files, too_large
from servicekit.errors import InvalidField

_URI = re.compile(
    r"hf://(?P<repo>[A-Za-z0-9][A-Za-z0-9._-]{0,95}/[A-Za-z0-9][A-Za-z0-9._-]{0,95})"
    r"(?:@(?P<revision>[A-Za-z0-9][A-Za-z0-9._/-]{0,254}))?"
)
_COMMIT = re.compile(r"[0-9a-f]{40}")
ATTEMPTS = 3


class HubSource:
    """Reads adapters from a hub.

    Args:
        endpoint: the hub's URL; empty is what its library knows, or HF_ENDPOINT.
    """

    def __init__(self, downloads: Downloads, limits: Limits, networks: Iterable[Network], endpoint: str) -> None:
        self._downloads, self._limits = downloads, limits
        self._endpoint = endpoint or constants.ENDPOINT
        self._client = HttpClient(limits, networks, self._endpoint)
        self._threads = ThreadPoolExecutor(limits.at_once, thread_name_prefix="hub-source")

    async def look(self, source_uri: str, credentials: Credentials, revision: str = "") -> str:
        """See Source.look. The revision is a commit."""
        repo, named = _parse(source_uri)
        info = await self._info(source_uri, repo, revision or named, credentials)
        commit = info.sha or ""
        if not _COMMIT.fullmatch(commit):
            raise SourceUnreachable(source_uri, "the hub names no commit")
        # Anyone sees that a gated repository exists; whether this caller may read it, only a file of it tells.
        if WEIGHTS in _sizes(info):
            await self._downloads.head(self._client, self._file(source_uri, repo, commit, WEIGHTS, credentials))
        return commit

    async def fetch(self, source_uri: str, revision: str, credentials: Credentials) -> AdapterFiles:
        """See Source.fetch."""
        repo, _ = _parse(source_uri)
        commit = revision or await self.look(source_uri, credentials)
        info = await self._info(source_uri, repo, commit, credentials)
        sizes, found = _sizes(info), dict[str, bytes]()
        for name, limit in self._limits.files.items():
            if name not in sizes:
                continue
            if sizes[name] > limit:
                raise too_large(name, sizes[name], limit)
            content = await self._downloads.fetch(self._client, self._file(source_uri, repo, commit, name, credentials))
            if content is None:
                raise SourceUnreachable(source_uri, f"the hub lists {name} and does not have it")
            await asyncio.to_thread(_compare, name, content, _sha256(info, name))
            found[name] = content
        return adapter_files(found, next((name for name in PICKLES if name in sizes), ""))

    async def close(self) -> None:
        """Closes the connections."""
        await self._client.close()
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _file(self, source_uri: str, repo: str, commit: str, name: str, credentials: Credentials) -> RemoteFile:
        def sign(_: str, headers: Mapping[str, str]) -> Mapping[str, str]:
            return {**headers, "authorization": f"Bearer {credentials.token}"} if credentials.token else headers

        url = hf_hub_url(repo, name, revision=commit, endpoint=self._endpoint)
        return RemoteFile(source_uri, name, url, self._limits.files[name], sign)

    async def _info(self, source_uri: str, repo: str, revision: str | None, credentials: Credentials) -> ModelInfo:
        # False, not None: with None the library would look for a token of its own.
        api = HfApi(self._endpoint, token=credentials.token or False)
        seconds = self._limits.idle_seconds

        def ask() -> ModelInfo:
            return api.model_info(repo, revision=revision, files_metadata=True, timeout=seconds)

        for last in [False] * (ATTEMPTS - 1) + [True]:
            try:
                return await asyncio.get_running_loop().run_in_executor(self._threads, ask)
            except (HfHubHTTPError, httpx2.HTTPError) as error:
                status = error.response.status_code if isinstance(error, HfHubHTTPError) else 0
                if last or (400 <= status < 500 and status != 429):
                    raise _error_of(source_uri, error, status) from None
            await asyncio.sleep(0.5)
        raise AssertionError("the last attempt returns or raises")


def _error_of(source_uri: str, error: Exception, status: int) -> Exception:
    if isinstance(error, RevisionNotFoundError):
        return SourceNotFound(source_uri, "the repository has no such revision")
    # The hub answers so both for what is not there and for what the caller must not see.
    if isinstance(error, GatedRepoError) or status in (401, 403):
        return SourceForbidden(source_uri, "the hub does not let this caller read it, or has no such repository")
    if isinstance(error, RepositoryNotFoundError) or status == 404:
        return SourceNotFound(source_uri, "there is no such repository, or this caller must not see it")
    return SourceUnreachable(source_uri, f"the hub answers {status}" if status else "the hub cannot be reached")


def _parse(source_uri: str) -> tuple[str, str | None]:
    """Repository and revision of a URI."""
    match = _URI.fullmatch(source_uri)
    parts = re.split("[/@]", source_uri.removeprefix("hf://"))
    if match is None or any(part in ("", ".", "..") for part in parts):
        raise InvalidField("source_uri", "must be hf://owner/name or hf://owner/name@revision", "MALFORMED_URI")
    return match["repo"], match["revision"]


def _sizes(info: ModelInfo) -> dict[str, int]:
    return {each.rfilename: each.size or 0 for each in info.siblings or ()}


def _sha256(info: ModelInfo, name: str) -> str:
    """What the hub says a large file's sha256 is; "" for small ones."""
    lfs = next((each.lfs for each in info.siblings or () if each.rfilename == name), None)
    return lfs.sha256 if lfs is not None else ""


def _compare(name: str, content: bytes, sha256: str) -> None:
    if sha256 and hashlib.sha256(content).hexdigest() != sha256:
        raise MalformedAdapter(name, "arrived other than the hub says it is", "WRONG_CHECKSUM")
