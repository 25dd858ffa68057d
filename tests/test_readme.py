"""The README tells the truth about settings and commands. `python -m tests.test_readme` prints its settings tables."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest

import cache.config
import engine.config
import router.config
from servicekit.settings import variable

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SERVICES: dict[str, Any] = {
    "router": router.config.Settings,
    "engine": engine.config.Settings,
    "cache": cache.config.Settings,
}


def table(service: str) -> str:
    """A service's settings as a Markdown table."""
    rows = [f"| `python -m {service}` | variable | default | meaning |", "|---|---|---|---|"]
    for field in dataclasses.fields(SERVICES[service]):
        default = " ".join(field.default) if isinstance(field.default, tuple) else str(field.default)
        flag = f"--{field.name.replace('_', '-')}"
        shown = f"`{default}`" if default else ""
        rows.append(f"| `{flag}` | `{variable(service, field.name)}` | {shown} | {field.metadata['description']} |")
    return "\n".join(rows)


@pytest.mark.parametrize("service", SERVICES)
def test_every_setting_is_in_the_readme_as_it_is(service: str) -> None:
    assert table(service) in README, f"the table should be:\n{table(service)}"


def test_every_make_target_named_in_the_readme_exists() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"`make ([a-z-]+)", README))
    assert named and named <= targets


def test_every_file_named_in_the_readme_exists() -> None:
    named = set(re.findall(r"\]\((?!http)([^)#]+)\)", README))
    assert named
    assert all((ROOT / path).exists() for path in named)


if __name__ == "__main__":
    print("\n\n".join(table(service) for service in SERVICES))  # noqa: T201
