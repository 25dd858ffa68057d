"""From a source to a packed artifact, off the event loop, a few at a time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, nullcontext
from dataclasses import dataclass

from cache import metrics
from cache.artifact import Artifact, BaseDescription, build_artifact, digest_of
from cache.errors import SourceChanged, SourceMoved
from cache.peft_config import parse_peft_config
from cache.sources import NO_CREDENTIALS, Credentials, Source
from servicekit.errors import ServiceError
from servicekit.tracing import context_from, end_span, start_span

# An adapter is in memory as file, as tensors and packed while it is being built.
BUILDS_AT_ONCE = 2
# One place is kept for what is needed now; and the rest of the node keeps its processors while many are registered.
UNHURRIED_AT_ONCE = 1


@dataclass(frozen=True)
class Origin:
    """What has to be known to make an artifact again: where its adapter came from, and the base.

    Attributes:
        restorable: it can be read without a caller's own rights, and validated against this base.
    """

    source_uri: str
    base: BaseDescription
    revision: str = ""
    restorable: bool = False


class Builder:
    """Reads adapters, validates and packs them."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self._builds = asyncio.Semaphore(BUILDS_AT_ONCE)
        self._unhurried = asyncio.Semaphore(UNHURRIED_AT_ONCE)

    async def build(
        self,
        source_uri: str,
        base_for: Callable[[str], BaseDescription],
        traceparent: str = "",
        revision: str = "",
        credentials: Credentials = NO_CREDENTIALS,
        *,
        is_needed: bool = False,
    ) -> Artifact:
        """The artifact of the adapter at a source, for the base that `base_for` makes of the name in its files.

        What is needed, as requests may wait for it, does not wait for what is not.

        Raises what Source.fetch, `base_for` and build_artifact raise.
        """
        span = start_span("adapter.load disk", parent=context_from(traceparent))
        try:
            # Not among the builds: a source that hangs must not keep others from being built.
            files = await self.source.fetch(source_uri, revision, credentials)
            async with self._turn(is_needed):
                config = await asyncio.to_thread(parse_peft_config, files.config)
                # Not in the thread: what the choice depends on is the event loop's.
                base = base_for(config.base_model)
                artifact = await asyncio.to_thread(build_artifact, files, base)
        except BaseException as error:
            metrics.FETCHES.labels(error.reason if isinstance(error, ServiceError) else "FAILED").inc()
            end_span(span, error)
            raise
        metrics.FETCHES.labels("ok").inc()
        span.set_attributes(
            {"loraplex.adapter_digest": artifact.digest, "loraplex.adapter_bytes": len(artifact.packed)}
        )
        end_span(span)
        return artifact

    async def confirm(self, digest: str, origin: Origin) -> None:
        """Makes sure that a version could be read from its source again now. Where there are no revisions, it is read for that.

        Raises SourceMoved or SourceChanged when there is another, and what Source.look and Source.fetch raise.
        """
        if origin.revision:
            found = await self.source.look(origin.source_uri, NO_CREDENTIALS, origin.revision)
            if found != origin.revision:
                raise SourceMoved(origin.source_uri)
            return
        files = await self.source.fetch(origin.source_uri, "", NO_CREDENTIALS)
        async with self._turn(is_needed=True):
            found = await asyncio.to_thread(digest_of, files, origin.base)
        if found != digest:
            raise SourceChanged(origin.source_uri, digest, found)

    @asynccontextmanager
    async def _turn(self, is_needed: bool) -> AsyncIterator[None]:
        async with nullcontext() if is_needed else self._unhurried, self._builds:
            yield
