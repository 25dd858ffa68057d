"""Our generic package names mean our packages: distributions on public indexes have the same names."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("name", ["router", "engine", "cache", "launcher", "servicekit", "demo", "loraplex"])
def test_a_package_resolves_inside_the_repository(name: str) -> None:
    module = importlib.import_module(name)
    assert module.__file__ is not None
    assert Path(module.__file__).is_relative_to(ROOT)


def test_proto_holds_no_package() -> None:
    # `proto` is the import name of proto-plus; an __init__.py here would take its place.
    assert not list((ROOT / "proto").rglob("*.py"))
