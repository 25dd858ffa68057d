"""The demo adapters in the registry of a running server. Imports the demo only when it is asked for."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from loraplex import AsyncClient, LoraplexError, NotFound

_PATIENCE_SECONDS = 60.0


@dataclass
class Outcome:
    """Ids that answer with the demo's adapters, and a line for each that does not."""

    registered: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def root() -> Path:
    """Folder of the demo adapters."""
    from demo.catalog import ADAPTERS

    return ADAPTERS


async def register(address: str) -> Outcome:
    """Registers them all; an adapter of the user's under the same id stays."""
    from demo.catalog import load_catalog

    outcome = Outcome()
    async with AsyncClient(address, timeout=_PATIENCE_SECONDS) as client:
        for entry in load_catalog().adapters:
            source = f"file://{entry.folder}"
            try:
                if await _is_free(client, entry.id, source):
                    await client.adapters.register(entry.id, source)
                    outcome.registered.append(entry.id)
                else:
                    outcome.problems.append(f"the id {entry.id} has an adapter of yours; the demo's is left out")
            except LoraplexError as error:
                outcome.problems.append(f"the demo adapter {entry.id} cannot be registered: {error}")
    return outcome


async def _is_free(client: AsyncClient, adapter_id: str, source: str) -> bool:
    try:
        return (await client.adapters.get(adapter_id)).source_uri == source
    except NotFound:
        return True
