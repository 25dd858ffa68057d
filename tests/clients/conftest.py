"""What client tests share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from loraplex import Client
from tests.clients.fake import FakeServer


@pytest.fixture
def server() -> Iterator[FakeServer]:
    fake = FakeServer()
    yield fake
    fake.stop()


@pytest.fixture
def client(server: FakeServer) -> Iterator[Client]:
    with Client(server.address) as client:
        yield client
