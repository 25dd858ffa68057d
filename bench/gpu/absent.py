"""Lets the engine's loop run where the packages it only reports to are not installed.

The benchmark must run on a machine with torch, triton and transformers alone. Spans and Prometheus metrics are not
measured; where their packages are missing, whatever is asked of them does nothing.
"""

from __future__ import annotations

import importlib.util
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

PACKAGES = {
    "opentelemetry": ("context", "trace", "trace.propagation", "trace.propagation.tracecontext"),
    "prometheus_client": (),
}


class _Nothing:
    """Answers everything with itself."""

    def __call__(self, *_: Any, **__: Any) -> _Nothing:
        return self

    def __getattr__(self, name: str) -> _Nothing:
        if name.startswith("__"):
            raise AttributeError(name)
        return self


class _Absent(ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Nothing()


def stand_in() -> list[str]:
    """Puts stand-ins where packages are missing; returns which."""
    # Before: it looks for the same packages, and takes a stand-in for the real one.
    import transformers  # noqa: F401

    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    for name in missing:
        for full in (name, *(f"{name}.{part}" for part in PACKAGES[name])):
            module = _Absent(full)
            module.__spec__ = ModuleSpec(full, None, is_package=True)
            module.__path__ = []
            sys.modules[full] = module
    return missing
