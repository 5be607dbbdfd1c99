"""The embedded engine as a backend: what is asked of it, and what is refused; see test_real_model for the real one."""

import math
import re
from types import SimpleNamespace

import pytest

import actorserve.lang as sgl
from actorserve.errors import EngineDown, Overloaded, RequestError
from actorserve.lang.engine_backend import EngineBackend
from actorserve.outputs import Output, TokenLogprob

REPLY = {"index": 0, "text": "four", "ids": [4], "finish_reason": "stop", "matched": 2, "prompt_tokens": 3}
BY_GAIN = sgl.unconditional_likelihood_normalized
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
    asked = {"dtype": int, "return_logprob": True, "top_logprobs_num": 3, "logprob_start_len": 2}
    assert answer(engine, n=2, max_tokens=5, **asked) == ["four", "four"]
    prompt, options = engine.asked[0]
    expected = {"n": 2, "max_new_tokens": 5, "temperature": 1.0, "logprobs": 3, "priority": 0}
    expected |= {"logprob_start_len": 2}
    assert prompt == ["2+2="] and expected.items() <= options.items() and options["regex"].startswith("[-+]?")
    assert not {"dtype", "return_logprob", "json_schema"} & set(options)


def test_what_the_engine_does_not_have_is_refused():
    engine = FakeEngine()
    with pytest.raises(sgl.ProgramError, match="stop_regex"):
        answer(engine, stop_regex="a+")
    assert engine.asked == []


class TokenEngine(FakeEngine):
    """A token is a character, but "\n" and spaces before it are one; the logprob of one at place i is -i."""

    async def generate(self, prompt, **options):
        self.asked.append((prompt, options))
        tokens = re.findall(r" *\n| *\S| ", prompt[0]) if isinstance(prompt[0], str) else list(map(chr, prompt[0]))
        start, rows = options.get("logprob_start_len"), []
        if start is not None:
            if start >= len(tokens):
                raise RequestError("too far", param="logprob_start_len")
            rows = [TokenLogprob(ord(t[-1]), -float(i), t.encode(), []) for i, t in enumerate(tokens)][start:]
            rows[0] = TokenLogprob(rows[0].token, math.nan, rows[0].text, [])
        return [Output(**REPLY | {"text": "", "prompt_tokens": len(tokens), "prompt_logprobs": rows})]


@pytest.mark.parametrize(
    "prompt, choices, logprobs",
    [
        ("ab", ["c", "de\N{HOT BEVERAGE}"], [[-2], [-2, -3, -4]]),
        ("ab ", ["c", "d"], [[-2], [-2]]),  # the space is the choice's now
        ("ab    ", ["c", "\ne"], [[-2], [-2, -3]]),  # there are fewer tokens than before
        ("a", ["b"], [[-1]]),
    ],
)
def test_choices_are_scored_by_how_they_are_spelt(prompt, choices, logprobs):
    engine = TokenEngine()
    program = sgl.function(lambda s: s.__iadd__(prompt + sgl.select("x", choices)))
    meta = program.run(backend=EngineBackend(engine)).get_meta_info("x")
    assert [[row[0] for row in rows] for rows in meta["input_token_logprobs"]] == logprobs


def test_choices_alone_are_scored_as_prompts():
    program = sgl.function(lambda s: s.__iadd__("ab" + sgl.select("x", ["cd", "e"], choices_method=BY_GAIN)))
    meta = program.run(backend=EngineBackend(TokenEngine())).get_meta_info("x")
    assert [[row[0] for row in rows] for rows in meta["unconditional_token_logprobs"]] == [[0, -1], [0]]
