"""What tests of several packages use."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.otlp_collector import Collector


@pytest.fixture
def otlp_collector() -> Iterator[Collector]:
    """A real OTLP endpoint that nothing has been sent to yet."""
    collector = Collector()
    yield collector
    collector.close()
