"""Fixtures for all tests. Nothing heavy is imported here: most test files need no torch."""

import os
import shutil
from collections.abc import Callable

import pytest

# Before anybody imports torch, here and in the processes that tests spawn: tests must not fight for the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1" if "PYTEST_XDIST_WORKER" in os.environ else "2")

# Our Triton kernels run where there is no GPU too, in Triton's interpreter; it must be told before the first kernel.
if not shutil.which("nvidia-smi"):
    os.environ.setdefault("TRITON_INTERPRET", "1")

FAIL_WITHOUT_MODEL = os.environ.get("CI") == "true"


def pytest_configure(config: pytest.Config) -> None:
    """Before test files are imported; workers of xdist inherit it."""
    if config.getoption("thorough"):
        os.environ["TESTS_THOROUGH"] = "1"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What uses the real model bears the marker `real`, so that `-m "not real"` runs without a network.

    In parallel it comes first: of what takes long, nothing is left for one worker at the end.
    """
    for item in items:
        if {"smollm", "minilm"} & set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.real)
    if "PYTEST_XDIST_WORKER" in os.environ:
        items.sort(key=lambda item: item.get_closest_marker("real") is None)


def pytest_addoption(parser: pytest.Parser) -> None:
    """--thorough: tests that take a sample of something large take all of it."""
    parser.addoption("--kills", type=int, help="deaths in system/test_chaos.py, instead of 4 or, thorough, 500")
    parser.addoption("--thorough", action="store_true", help="take all of what CI takes a sample of; minutes to hours")


@pytest.fixture(scope="session")
def thorough(request: pytest.FixtureRequest) -> bool:
    """Whether --thorough was given."""
    return bool(request.config.getoption("--thorough"))


@pytest.fixture(scope="session")
def smollm() -> str:
    """Folder of the real SmolLM2-135M-Instruct, fetched and converted at the first use.

    Without a network and without a cache the test is skipped, in CI (CI=true) it fails.
    """
    from actorserve.models.embedded import embedded_model

    return _fetched(embedded_model)


@pytest.fixture(scope="session")
def minilm() -> str:
    """Folder of the real all-MiniLM-L6-v2; as `smollm`."""
    from actorserve.models.embedded import minilm_model

    return _fetched(minilm_model)


def _fetched(fetch: Callable[[], str]) -> str:
    from actorserve.errors import StartupError

    try:
        return fetch()
    except StartupError as error:
        if FAIL_WITHOUT_MODEL:
            pytest.fail(f"CI needs the real model: {error}")
        pytest.skip(str(error))
