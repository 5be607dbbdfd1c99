"""Runs each test of a module with each way in which the rings of lanes are made. Use: `from rings import rings`."""

from collections.abc import Iterator
from types import SimpleNamespace

import pytest

from actorserve.actors import ring

WRITERS_AND_READERS = [("c", "c"), ("python", "python"), ("python", "c"), ("c", "python")]


@pytest.fixture(scope="module", autouse=True, params=WRITERS_AND_READERS, ids="-".join)
def rings(request: pytest.FixtureRequest) -> Iterator[tuple[str, str]]:
    """What writes and what reads; lanes between processes of such kinds exist where only one found a compiler."""
    kinds = {"c": ring.native(), "python": ring.PYTHON}
    writing, reading = (kinds[kind] for kind in request.param)
    if writing is None or reading is None:
        pytest.skip("there is no C compiler here, or no headers of Python")
    patch = pytest.MonkeyPatch()
    mixed = SimpleNamespace(Writer=writing.Writer, Reader=reading.Reader, Watch=reading.Watch)
    patch.setattr(ring, "types", lambda: mixed)
    yield request.param
    patch.undo()
