"""One server for all tests that do not end it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.server.process import Server


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    """One rank, a batch of 8."""
    with Server("--max_batch_size", 8, "--max_waiting", 256, "--max_body_mb", 2) as started:
        yield started.ready()
