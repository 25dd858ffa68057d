"""From a source to a packed artifact, off the event loop, a few at a time."""

from __future__ import annotations

import asyncio

from cache import metrics
from cache.artifact import Artifact, BaseDescription, build_artifact
from cache.sources import Source
from servicekit.errors import ServiceError
from servicekit.tracing import context_from, end_span, start_span

# An adapter is in memory as file, as tensors and packed while it is being built.
BUILDS_AT_ONCE = 2


class Builder:
    """Reads adapters, validates and packs them."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._builds = asyncio.Semaphore(BUILDS_AT_ONCE)

    async def build(self, source_uri: str, base: BaseDescription, traceparent: str = "") -> Artifact:
        """The artifact of the adapter at a source. Raises what Source.read and build_artifact raise."""
        span = start_span("adapter.load disk", parent=context_from(traceparent))
        try:
            async with self._builds:
                artifact = await asyncio.to_thread(self._build, source_uri, base)
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

    def _build(self, source_uri: str, base: BaseDescription) -> Artifact:
        return build_artifact(self._source.read(source_uri), base)
