"""What tests of several packages use."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest

from tests.otlp_collector import Collector

# Started in the background by a shell this process ignores Ctrl-C, and so would the commands that tests press it for.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def otlp_collector() -> Iterator[Collector]:
    """A real OTLP endpoint that nothing has been sent to yet."""
    collector = Collector()
    yield collector
    collector.close()
