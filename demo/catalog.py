"""The demo adapters as people meet them: demo/catalog.json, read into dataclasses."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).parent
ADAPTERS = FOLDER / "adapters"


@dataclass(frozen=True)
class DemoAdapter:
    """One demo adapter.

    Attributes:
        id: its adapter_id and the name of its folder in demo/adapters.
        description: one line for people.
        prompt: a prompt that shows what it does.
        expect: what a right answer looks like, for people.
        rank, targets, rslora: as in its adapter_config.json.
        oracle_prompts: prompts whose answers are compared with PEFT's.
    """

    id: str
    description: str
    prompt: str
    expect: str
    rank: int
    targets: tuple[str, ...]
    rslora: bool
    oracle_prompts: tuple[str, ...]

    @property
    def folder(self) -> Path:
        """Where its files are."""
        return ADAPTERS / self.id


@dataclass(frozen=True)
class Catalog:
    """All demo adapters, in the order they are shown.

    Attributes:
        shared_prompt: the prompt that base and all adapters are asked at once.
        base_oracle_prompts: prompts for the base alone.
    """

    shared_prompt: str
    base_oracle_prompts: tuple[str, ...]
    adapters: tuple[DemoAdapter, ...]


def load_catalog() -> Catalog:
    """Reads demo/catalog.json."""
    raw = json.loads((FOLDER / "catalog.json").read_text(encoding="utf-8"))
    adapters = tuple(
        DemoAdapter(**{**row, "targets": tuple(row["targets"]), "oracle_prompts": tuple(row["oracle_prompts"])})
        for row in raw["adapters"]
    )
    return Catalog(raw["shared_prompt"], tuple(raw["base_oracle_prompts"]), adapters)
