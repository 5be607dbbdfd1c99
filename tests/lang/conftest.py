"""Fixtures of the language's tests: one engine with the real model for all of them."""

import pytest

import actorserve.lang as sgl


@pytest.fixture(scope="session")
def engine(smollm):
    """With the weights that a CPU keeps by itself, as the references have them. Grammars get a minute: other tests may
    be at work on these cores."""
    with sgl.Engine(smollm, placement="inline", max_total_tokens=8192, grammar_seconds=60.0) as engine:
        yield engine
