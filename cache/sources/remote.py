"""What sources read over HTTP have in common: a folder of files at URLs, each with an ETag.

The revision of such a folder is the ETags of all its files, so that it is another one when any of them is, and the files that
are fetched are those that were looked at.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping

from cache.artifact import WEIGHTS, AdapterFiles
from cache.errors import SourceForbidden, SourceNotFound
from cache.peft_config import FILE as CONFIG
from cache.sources.download import Downloads, RemoteFile, strong_etag
from cache.sources.http import HttpClient
from cache.sources.source import OPTIONAL, PICKLES, adapter_files

MakeFile = Callable[[str], RemoteFile]


async def look(
    downloads: Downloads, client: HttpClient, source_uri: str, file: MakeFile, names: Mapping[str, int]
) -> str:
    """See Source.look. `file` makes the RemoteFile of a name."""
    found = await _heads(downloads, client, [file(name) for name in names])
    if found[CONFIG] is None and found[WEIGHTS] is None:
        raise SourceNotFound(source_uri, f"there is no {CONFIG} and no {WEIGHTS}")
    tags = {name: strong_etag(headers) for name, headers in found.items() if headers is not None}
    return json.dumps(tags, sort_keys=True) if all(tags.values()) else ""


async def fetch(
    downloads: Downloads,
    client: HttpClient,
    revision: str,
    file: Callable[[str, str], RemoteFile],
    names: Mapping[str, int],
) -> AdapterFiles:
    """See Source.fetch. `file` makes the RemoteFile of a name and an ETag."""
    tags: Mapping[str, str] = json.loads(revision) if revision else dict.fromkeys(names, "")
    found: dict[str, bytes] = {}
    # One after another: a source has as many connections as adapters that are read from it.
    for name in names:
        if name in tags and (content := await _content(downloads, client, file(name, tags[name]))) is not None:
            found[name] = content
    pickle = "" if WEIGHTS in found else await _pickle(downloads, client, lambda name: file(name, ""))
    return adapter_files(found, pickle)


async def _heads(
    downloads: Downloads, client: HttpClient, files: list[RemoteFile]
) -> dict[str, Mapping[str, str] | None]:
    """Headers by name. When one cannot be had, nothing is asked any more by the time that is raised."""
    try:
        async with asyncio.TaskGroup() as group:
            asked = {file.name: group.create_task(_head(downloads, client, file)) for file in files}
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None
    return {name: task.result() for name, task in asked.items()}


async def _head(downloads: Downloads, client: HttpClient, file: RemoteFile) -> Mapping[str, str] | None:
    try:
        return await downloads.head(client, file)
    except SourceForbidden:
        # Stores answer so for what is not there, too, when the caller may not list it.
        if file.name in OPTIONAL:
            return None
        raise


async def _content(downloads: Downloads, client: HttpClient, file: RemoteFile) -> bytes | None:
    try:
        return await downloads.fetch(client, file)
    except SourceForbidden:
        if file.name in OPTIONAL:
            return None
        raise


async def _pickle(downloads: Downloads, client: HttpClient, file: MakeFile) -> str:
    """Name of the pickle that is there instead of the weights; "" when there is none."""
    for name in PICKLES:
        try:
            if await downloads.head(client, file(name)) is not None:
                return name
        except SourceForbidden:
            continue
    return ""
