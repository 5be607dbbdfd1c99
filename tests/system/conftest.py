"""Fixtures for tests of the whole engine with the real model."""

from collections.abc import Iterator

import pytest
from live_server import LiveServer, live_server


@pytest.fixture(scope="module")
def session_server(smollm: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    with live_server(
        tmp_path_factory.mktemp("server"), "--model", smollm, "--max-total-tokens", "32768", "--dtype", "float32"
    ) as s:
        yield s


@pytest.fixture
def server(session_server: LiveServer) -> Iterator[LiveServer]:
    """A running server that all tests share; after each test its pages must add up."""
    yield session_server
    session_server.assert_pages_add_up()
