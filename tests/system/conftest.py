"""Fixtures for tests of the whole engine with the real model."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from live_server import LiveServer


@pytest.fixture(scope="session")
def session_server(smollm: str, tmp_path_factory: pytest.TempPathFactory) -> "Iterator[LiveServer]":
    from live_server import live_server  # where there is no client, as on some GPU machines, other tests still run

    folder = tmp_path_factory.mktemp("server")
    flags = ["--model", smollm, "--max-total-tokens", "32768", "--data-dir", str(folder / "data")]
    with live_server(folder, *flags) as s:
        yield s


@pytest.fixture
def server(session_server: "LiveServer") -> "Iterator[LiveServer]":
    """A running server that the tests of all modules share; after each test its pages must add up."""
    yield session_server
    session_server.assert_pages_add_up()
