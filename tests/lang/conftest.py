"""Fixtures of the language's tests: one engine with the real model for all of them."""

import pytest

import actorserve.lang as sgl


@pytest.fixture(scope="session")
def engine(smollm):
    """In float32, as the references are. Grammars get a minute: other tests may be at work on these cores."""
    with sgl.Engine(smollm, placement="inline", dtype="float32", max_total_tokens=8192, grammar_seconds=60.0) as engine:
        yield engine
