"""From a source to a packed artifact, off the event loop, a few at a time."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from cache import metrics
from cache.artifact import Artifact, BaseDescription, build_artifact
from cache.peft_config import parse_peft_config
from cache.sources import NO_CREDENTIALS, Credentials, Source
from servicekit.errors import ServiceError
from servicekit.tracing import context_from, end_span, start_span

# An adapter is in memory as file, as tensors and packed while it is being built.
BUILDS_AT_ONCE = 2


class Builder:
    """Reads adapters, validates and packs them."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self._builds = asyncio.Semaphore(BUILDS_AT_ONCE)

    async def build(
        self,
        source_uri: str,
        base_for: Callable[[str], BaseDescription],
        traceparent: str = "",
        revision: str = "",
        credentials: Credentials = NO_CREDENTIALS,
    ) -> Artifact:
        """The artifact of the adapter at a source, for the base that `base_for` makes of the name in its files.

        Raises what Source.fetch, `base_for` and build_artifact raise.
        """
        span = start_span("adapter.load disk", parent=context_from(traceparent))
        try:
            # Not among the builds: a source that hangs must not keep others from being built.
            files = await self.source.fetch(source_uri, revision, credentials)
            async with self._builds:
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
