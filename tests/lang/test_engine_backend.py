"""The embedded engine as a backend: what is asked of it, and what is refused; see test_real_model for the real one."""

from types import SimpleNamespace

import pytest

import actorserve.lang as sgl
from actorserve.errors import EngineDown, Overloaded, RequestError
from actorserve.lang.engine_backend import EngineBackend
from actorserve.outputs import Output

REPLY = {"index": 0, "text": "four", "ids": [4], "finish_reason": "stop", "matched": 2, "prompt_tokens": 3}
REPLY |= {"completion_tokens": 1, "cached_tokens": 0, "logprobs": []}


class FakeEngine:
    """Refuses with `errors`, one a call, then answers."""

    model = SimpleNamespace(name="SmolLM2-135M-Instruct", path="/nowhere")
    config = SimpleNamespace(max_queued_requests=4)

    def __init__(self, *errors):
        self.errors, self.asked = list(errors), []

    async def generate(self, prompt, **options):
        self.asked.append((prompt, options))
        if self.errors:
            raise self.errors.pop(0)
        return [Output(**REPLY)] * options.get("n", 1)


def answer(engine, **how):
    asked = sgl.function(lambda s: s.__iadd__("2+2=" + sgl.gen("x", **how)))
    return asked.run(backend=EngineBackend(engine))["x"]


def test_a_full_engine_is_waited_for():
    engine = FakeEngine(Overloaded("full"), Overloaded("full"))
    assert answer(engine) == "four" and len(engine.asked) == 3
    for error in (Overloaded("going down", status=503), EngineDown("gone"), RequestError("wrong")):
        with pytest.raises(sgl.ProgramError) as caught:
            answer(FakeEngine(error))
        assert caught.value.__cause__ is error


def test_parameters_reach_the_engine_by_its_names():
    engine = FakeEngine()
    assert answer(engine, n=2, max_tokens=5, dtype=int, return_logprob=True, top_logprobs_num=3) == ["four", "four"]
    prompt, options = engine.asked[0]
    expected = {"n": 2, "max_new_tokens": 5, "temperature": 1.0, "logprobs": 3, "priority": 0}
    assert prompt == ["2+2="] and expected.items() <= options.items() and options["regex"].startswith("[-+]?")
    assert not {"dtype", "return_logprob", "json_schema"} & set(options)


@pytest.mark.parametrize("name, value", [("stop_regex", "a+"), ("logprob_start_len", 0)])
def test_what_the_engine_does_not_have_is_refused(name, value):
    engine = FakeEngine()
    with pytest.raises(sgl.ProgramError, match=name):
        answer(engine, **{name: value})
    assert engine.asked == []
