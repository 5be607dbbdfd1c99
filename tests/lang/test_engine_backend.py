"""The embedded engine as a backend: what is asked of it, and what is refused; see test_real_model for the real one."""

import math
import re
from types import SimpleNamespace

import msgspec
import pytest

import actorserve
import actorserve.lang as sgl
from actorserve.errors import EngineDown, Overloaded, RequestError
from actorserve.lang.engine_backend import EngineBackend
from actorserve.lang.remote import ProgramRequest
from actorserve.lang.replay import ServedBackend, ServedEngine, replay
from actorserve.outputs import Output, TokenLogprob

REPLY = {"index": 0, "text": "four", "ids": [4], "finish_reason": "stop", "matched": 2, "prompt_tokens": 3}
BY_GAIN = sgl.unconditional_likelihood_normalized
REPLY |= {"completion_tokens": 1, "cached_tokens": 0, "logprobs": []}


class FakeEngine:
    """Refuses with `errors`, one a call, then answers."""

    model = SimpleNamespace(name="SmolLM2-135M-Instruct", path="/nowhere", image_token_id=None)
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
    assert answer(engine, n=2, max_tokens=5, stop_regex="a+", **asked) == ["four", "four"]
    prompt, options = engine.asked[0]
    expected = {"n": 2, "max_new_tokens": 5, "temperature": 1.0, "logprobs": 3, "priority": 0}
    expected |= {"logprob_start_len": 2, "stop_regex": ("a+",)}
    assert prompt == ["2+2="] and expected.items() <= options.items() and options["regex"].startswith("[-+]?")
    assert not {"dtype", "return_logprob", "json_schema"} & set(options)


def test_pictures_reach_a_model_that_takes_images():
    engine = FakeEngine()
    asked = sgl.function(lambda s: s.__iadd__("Look: " + sgl.image("data:image/png;base64,AQID") + sgl.gen("x")))
    with pytest.raises(sgl.ProgramError, match="no vision"):
        asked.run(backend=EngineBackend(engine))["x"]
    engine.model = SimpleNamespace(**vars(FakeEngine.model) | {"image_token_id": 7})
    assert asked.run(backend=EngineBackend(engine))["x"] == "four"
    ((prompt, options),) = engine.asked
    assert (prompt, options["image_data"]) == (["Look: <image>"], [["data:image/png;base64,AQID"]])


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


class Crowded(ServedBackend):
    """After each call others use all of the cache."""

    pinned = True

    async def generate(self, context, sampling):
        reply = await super().generate(context, sampling)
        for i in range(4):
            await self._engine.generate([[2 + i, *range(50, 450)]], max_new_tokens=1)
        return reply

    def _pin(self, context):
        return super()._pin(context) if self.pinned else 0


def append(state, name, text):
    gen = {"type": "Gen", "name": name, "sampling": {"max_new_tokens": 4, "temperature": 0, "ignore_eos": True}}
    return {"type": "Append", "state": state, "nodes": [{"type": "Literal", "text": text}, gen]}


@pytest.mark.anyio
@pytest.mark.parametrize("anyio_backend", ["asyncio"])
@pytest.mark.parametrize("pinned", [True, False])
async def test_what_a_served_program_said_stays_in_the_cache_between_its_calls(smollm, pinned, anyio_backend):
    program = [
        append(0, "a", "one two three four five six seven " * 6),
        append(0, "b", " and so on"),
        {"type": "Branch", "state": 0, "branches": [1, 2]},
        *(append(i, "c", f" branch {i}") for i in (1, 2)),
        {"type": "Merge", "state": 0, "branches": [1, 2]},
        append(0, "d", " at last"),
    ]
    request = msgspec.convert({"program": program}, ProgramRequest)
    async with actorserve.Engine(smollm, load_format="stub", placement="inline", max_total_tokens=640) as running:
        backend = Crowded(ServedEngine(running._client, running.config, running.model), None)
        backend.pinned = pinned
        reply = await replay(request, backend)
        await backend.close()
        metas = {name: outcome.meta for name, outcome in reply.variables.items()}
        found = [metas["b"], *metas["c"]["branches"], metas["d"]]
        missing = [meta["prompt_tokens"] - meta["cached_tokens"] for meta in found]
        assert reply.error is None and (max(missing) < 16 if pinned else min(missing[0], missing[-1]) > 40), missing
