"""What can be said about images and compose files without a Docker engine; `make compose-test` says the rest."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from servicekit.settings import variable

ROOT = Path(__file__).parents[2]
FILES = ["images/Dockerfile", "compose.yaml", "compose.gpu.yaml"]
SERVICES = ["router", "engine", "cache"]


@pytest.mark.parametrize("file", FILES)
def test_every_variable_of_a_service_is_a_setting(file: str) -> None:
    known = {
        variable(service, field.name)
        for service in SERVICES
        for field in fields(importlib.import_module(f"{service}.config").Settings)
    }
    # Only what is set counts (NAME: value, NAME=value); ${NAME} is a question of compose's own.
    used = set(re.findall(r"(?<![{\w])(LORAPLEX_(?:ROUTER|ENGINE|CACHE)_\w+)[:=]", (ROOT / file).read_text()))
    assert used - {"LORAPLEX_CACHE_DIR"} <= known


def test_the_images_use_nothing_that_only_one_builder_knows() -> None:
    text = (ROOT / "images/Dockerfile").read_text()
    assert not re.search(r"<<|--mount|--chmod|--link|^# *syntax=", text, re.MULTILINE)


def test_the_router_needs_no_torch_and_no_rust_extension() -> None:
    def requirements(*extras: str) -> set[str]:
        command = [sys.executable, "images/requirements.py", ".", *extras]
        lines = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
        return {re.split(r"[>=<]", line)[0] for line in lines}

    assert {"grpcio", "uvloop"} <= requirements()
    assert not requirements() & {"torch", "transformers", "safetensors", "numpy", "loraplex"}
    assert {"torch", "transformers"} <= requirements("engine")
    assert "redis" in requirements("cache")
    assert "triton" in requirements("engine", "kernels")
