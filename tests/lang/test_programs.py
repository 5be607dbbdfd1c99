"""What programs mean: on a backend that answers by a script, so that every text can be told beforehand."""

import asyncio
import re
import threading
import time
from dataclasses import dataclass

import anyio
import jsonschema
import msgspec
import pytest
from scripted_backend import ScriptedBackend, echo

import actorserve.lang as sgl
from actorserve.errors import RequestError
from actorserve.lang.expressions import Argument, Fork, Gen, Join, Literal, Sampling, Variable
from actorserve.lang.tracing import constant_prefix


@pytest.fixture
def backend():
    backend = ScriptedBackend()
    sgl.set_default_backend(backend)
    yield backend
    sgl.set_default_backend(None)


@sgl.function
def two_turns(s, first, second="bye"):
    s += sgl.system("Be brief.")
    s += sgl.user(first)
    s += sgl.assistant(sgl.gen("a", max_tokens=5))
    with s.user():
        s += second
    with s.assistant():
        s += "So: " + sgl.gen("b")
    return s["a"] + s["b"]


def test_text_messages_and_variables(backend):
    s = two_turns.run("hi")
    assert s.text() == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
        "<<|im_start|>assistant><|im_end|>\n<|im_start|>user\nbye<|im_end|>\n"
        "<|im_start|>assistant\nSo: <So:><|im_end|>\n"
    )
    assert s.messages()[-1] == {"role": "assistant", "content": "So: <So:>"}
    assert [m["role"] for m in s.messages()] == ["system", "user", "assistant", "user", "assistant"]
    assert s.ret_value == s["a"] + "<So:>" and "b" in s and "c" not in s
    assert s.get_meta_info("a") == {"prompt_tokens": len(backend.prompts[0])}
    assert backend.prompts[1].endswith("So: ")


def test_defaults_of_the_run_and_of_gen(backend):
    @sgl.function
    def program(s, seed):
        s += "a" + sgl.gen("x", temperature=0.3, stop=["u", "v"]) + sgl.gen("y")
        s += sgl.gen_int("z") + str(seed)

    program.run(seed=7, temperature=0.5, max_new_tokens=9, stop="w").sync()
    x, y, z = backend.sampling
    assert (x.temperature, x.max_new_tokens, x.stop) == (0.3, 9, ("u", "v", "<|im_end|>"))
    assert (y.temperature, y.top_p, y.stop) == (0.5, 1.0, ("w", "<|im_end|>"))
    assert y.seed is None, "`seed` is the program's argument"
    assert re.fullmatch(z.regex, "-12 ") and z.stop == ("w", " ", "\n", "<|im_end|>")


def test_n_gives_a_list_and_appends_the_first(backend):
    @sgl.function
    def program(s):
        s += "word " + sgl.gen("x", n=3)

    s = program.run()
    assert s["x"] == ["<word>", "<word1>", "<word2>"] and s.text() == "word <word>"


def test_choices_and_select(backend):
    @sgl.function
    def program(s):
        s += "pick " + sgl.gen("x", choices=["a", "b"], choices_method=sgl.greedy_token_selection)
        s += sgl.select("y", ["c", "d"])

    s = program.run()
    assert (s["x"], s["y"], s.text()) == ("b", "d", "pick bd")
    assert s.get_meta_info("x")["method"] == "greedy_token_selection"
    assert s.get_meta_info("y")["method"] == "token_length_normalized"
    with pytest.raises(RequestError, match="choices"):
        sgl.select("z", [])


def test_fork_shares_the_prefix_and_join_gathers(backend):
    @sgl.function
    def program(s):
        s += "top "
        s["own"] = 1
        forks = s.fork(3)
        forks += lambda i: f"branch{i} " + sgl.gen("x")
        forks[1] += sgl.gen("only")
        forks.join()
        s += "end " + sgl.gen("y") + "".join(s["x"])

    s = program.run()
    assert s["x"] == ["<branch0>", "<branch1>", "<branch2>"] and s["only"] == ["<<branch1>>"]
    assert s["own"] == 1 and s.text() == "top end <end><branch0><branch1><branch2>"
    assert backend.cached == ["top "], "the prefix is committed once"
    assert len(s.get_meta_info("x")["branches"]) == 3


def test_concatenate_and_append(backend):
    @sgl.function
    def program(s):
        s += "top "
        forks = s.fork(2)
        forks += ["one " + sgl.gen("x"), " two "]
        forks.join("concate_and_append")
        s += sgl.gen("y")

    assert program.run().text() == "top one <one> two <two>"
    with pytest.raises(RequestError, match="join takes"):
        program.run().fork(1).join("other")


def test_copy_and_nested_forks(backend):
    @sgl.function
    def program(s):
        s += "a "
        with s.copy() as c:
            c += "b " + sgl.gen("x")
            inner = c.fork(2)
            inner += " c " + sgl.gen("y")
            inner.join()
        s += "d " + sgl.gen("z")

    s = program.run()
    assert (s["x"], s["y"], s["z"]) == (["<b>"], [["<c>", "<c>"]], "<d>")
    assert s.text() == "a d <d>"


def test_what_a_join_made_is_there_for_later_branches_and_is_kept(backend):
    @sgl.function
    def program(s):
        s += "a "
        for word in ("b ", "c "):
            forks = s.fork(2)
            forks += word + sgl.gen("x")
            forks.join()
        later = s.fork(1)
        later += "d " + sgl.gen("y")
        return later[0]["x"]

    s = program.run()
    assert s.ret_value == s["x"] == ["<b>", "<b>"]


def test_var_scope(backend):
    @sgl.function
    def program(s):
        s += "before "
        with s.var_scope("all"):
            s += "in " + sgl.gen("x")
        s += " after"

    assert program.run()["all"] == "in <in>"


def test_failed_variables_name_the_line_and_the_branch():
    def answer(text, sampling, i):
        if "bad" in text:
            raise RequestError("no such luck", param="regex")
        return echo(text, sampling, i)

    @sgl.function
    def program(s):
        s += "top "
        forks = s.fork(3)
        forks += [word + sgl.gen("x") for word in ("good ", "bad ", "fine ")]  # here
        forks.join()
        s += sgl.gen("y")
        return list(forks)

    s = program.run(backend=ScriptedBackend(answer))
    line = program.func.__code__.co_firstlineno + 4
    with pytest.raises(sgl.ProgramError, match=rf"'x' in branch 1: no such luck \(test_programs.py:{line}\)") as caught:
        s["x"]
    assert (caught.value.status, caught.value.param) == (400, "regex")
    assert s["y"] == "<top>", "the rest goes on"
    assert [f["x"] for f in (s.ret_value[0], s.ret_value[2])] == ["<good>", "<fine>"]
    assert s.error() is None and isinstance(s.ret_value[1].error(), sgl.ProgramError)
    with pytest.raises(sgl.ProgramError):
        s.ret_value[1].text()


def test_after_a_failure_the_rest_of_the_state_fails_too():
    def answer(text, sampling, i):
        raise RequestError("down")

    @sgl.function
    def program(s):
        s += "a" + sgl.gen("x")
        s += sgl.gen("y")
        s += sgl.user("late")

    s = program.run(backend=ScriptedBackend(answer))
    for name in ("x", "y"):
        with pytest.raises(sgl.ProgramError, match=r"'x'.*down"):
            s[name]
    with pytest.raises(KeyError, match="has x, y"):
        program.run(backend=ScriptedBackend())["z"]


def test_nested_roles_and_text_that_is_none(backend):
    @sgl.function
    def nested(s):
        s += sgl.user("a" + sgl.assistant("b"))

    with pytest.raises(sgl.ProgramError, match="roles do not nest"):
        nested.run().text()
    with pytest.raises(RequestError, match="cannot be appended"):
        sgl.user(object())
    with pytest.raises(RequestError, match="must be `s`"):
        sgl.function(lambda state: None)


def test_pictures_and_videos_without_vision(backend):
    @sgl.function
    def program(s, expr):
        s += sgl.user(expr + "What is it?")

    for expr in (sgl.image("cat.png"), sgl.video("cat.mp4", 4)):
        with pytest.raises(sgl.ProgramError, match=r"scripted (has no vision|takes no videos)"):
            program.run(expr).text()


class Person(msgspec.Struct):
    name: str
    age: int


@dataclass
class Pair:
    left: int
    right: int


def test_types_as_schemas():
    @sgl.function
    def program(s):
        s += sgl.gen("p", json_schema=Person) + sgl.gen("q", json_schema=Pair) + sgl.gen("r", json_schema={})

    replies = iter(['{"name": "Ann", "age": 3}', '{"left": 1, "right": 2}', "5", '{"name": "Bo'])
    backend = ScriptedBackend(lambda *_: next(replies))
    s = program.run(backend=backend)
    assert (s["p"], s["q"], s["r"]) == (Person("Ann", 3), Pair(1, 2), "5")
    assert msgspec.json.decode(backend.sampling[0].json_schema)["$defs"]["Person"]["additionalProperties"] is False
    with pytest.raises(sgl.ProgramError, match="is no Person"):
        program.run(backend=backend)["p"]


class Box(msgspec.Struct):
    side: int


def test_tools_are_a_schema_for_models_behind_text(backend):
    def grow(box: Box, by: int = 1) -> None: ...
    def shrink(box: Box) -> None: ...

    @sgl.function
    def program(s, tools):
        s += "Do it: " + sgl.gen("call", tools=tools)

    backend.answer = lambda *_: '{"name": "grow", "arguments": {"box": {"side": 2}}}'
    s = program.run([grow, shrink])
    assert s["call"] == sgl.ToolCall("grow", {"box": {"side": 2}}) and s.text().startswith('Do it: {"name": "grow"')
    schema = msgspec.json.decode(backend.sampling[0].json_schema)
    assert backend.sampling[0].tools is None and set(schema["$defs"]) == {"0_Box", "1_Box"}
    for value in ({"box": {"side": 1}, "by": 2}, {"box": {"side": 1}}):
        jsonschema.validate({"name": "grow", "arguments": value}, schema)
    for call in (
        {"name": "shrink", "arguments": {"box": {"side": 1}, "by": 2}},
        {"name": "grow", "arguments": {"box": {"side": "1"}}},
        {"name": "other", "arguments": {"box": {"side": 1}}},
    ):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(call, schema)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"tools": []}, "one at least"),
        ({"tools": "weather"}, "must be a list"),
        ({"tools": [{"type": "function"}]}, "with a name"),
        ({"tools": [lambda x: x]}, "'x' of <lambda> needs a type"),
        ({"tools": [{"name": "a"}, {"name": "a"}]}, "have one name"),
        ({"tools": [{"name": "a"}], "regex": "b"}, "exclude each other"),
    ],
)
def test_tools_that_are_wrong(options, message):
    with pytest.raises(RequestError, match=message) as caught:
        sgl.gen("call", **options)
    assert caught.value.param == "tools"


def test_separate_reasoning(backend):
    backend.answer = lambda *_: "<think>two and two</think>four"

    @sgl.function
    def program(s):
        s += sgl.user("2+2?")
        s += sgl.assistant(sgl.separate_reasoning(sgl.gen("a"), model_type="deepseek-r1"))

    s = program.run()
    assert (s["a"], s["a_reasoning_content"]) == ("four", "two and two")
    assert s.messages()[-1]["content"] == "four"


def test_streams(backend):
    @sgl.function
    def program(s):
        s += "one " + sgl.gen("x") + " two " + sgl.gen("y")

    backend.gate.clear()
    pieces = program.run(stream=True).text_iter("x")
    assert next(pieces) == "<", "before the rest is there"
    backend.gate.set()
    assert "".join(pieces) == "one>"
    assert "".join(program.run(stream=True).text_iter()) == "one <one> two <two>"
    assert list(program.run().text_iter("x")) == ["<one>"]

    async def read():
        return [piece async for piece in program.run(stream=True).text_async_iter("x", return_meta_data=True)]

    got = anyio.run(read)
    assert "".join(text for text, _ in got) == "<one>" and got[-1][1] == {"completion_tokens": 5}
    backend.answer = lambda *_: 1 / 0
    with pytest.raises(sgl.ProgramError, match="division"):
        list(program.run(stream=True).text_iter())


def test_a_stream_whose_body_raises(backend):
    @sgl.function
    def program(s):
        s += sgl.gen("x")
        raise ValueError("in the body")

    with pytest.raises(ValueError, match="in the body"):
        program.run()
    s = program.run(stream=True)
    with pytest.raises(sgl.ProgramError, match=r"in the body \(test_programs.py"):
        list(s.text_iter())


def test_batches_keep_order_and_failures_stay_alone(backend):
    @sgl.function
    def program(s, word, times=1):
        s += f"{word} " + sgl.gen("x")
        if word == "b":
            raise ValueError("not b")
        return s["x"] * times

    states = program.run_batch([{"word": "a"}, {"word": "b"}, {"word": "c", "times": 2}], progress_bar=True)
    assert [s["x"] for s in states] == ["<a>", "<b>", "<c>"]
    assert [states[i].ret_value for i in (0, 2)] == ["<a>", "<c><c>"]
    with pytest.raises(ValueError, match="not b"):
        _ = states[1].ret_value
    assert [s["x"] for s in program.run_batch([("d",), ("e", 3)], generator_style=True)] == ["<d>", "<e>"]
    with pytest.raises(RequestError, match="1 to 2 arguments"):
        program.run_batch([("a", 1, 2)])
    assert program.run_batch([]) == []


def test_a_body_that_exits_has_not_returned(backend):
    @sgl.function
    def program(s, i):
        if i == 1:
            raise SystemExit(3)
        return i

    states = program.run_batch([(0,), (1,), (2,)], backend=backend)
    assert [states[i].ret_value for i in (0, 2)] == [0, 2] and "ended by SystemExit" in str(states[1].error())
    with pytest.raises(RequestError, match="ended by SystemExit"):
        _ = states[1].ret_value
    with pytest.raises(SystemExit):
        program.run(1, backend=backend)


@pytest.mark.parametrize("in_loop", [False, True])
def test_a_batch_whose_states_are_kept_runs_to_its_end(backend, in_loop):
    """Programs that wait for a thread when the last state is given out, too."""

    @sgl.function
    def program(s, i):
        s += f"{i} " + sgl.gen("x")

    async def kept():
        return [state async for state in program.arun_batch_iter([(i,) for i in range(30)], num_threads=2)]

    kept_states = program.run_batch([(i,) for i in range(30)], generator_style=True, num_threads=2)
    states = asyncio.run(kept()) if in_loop else list(kept_states)
    assert [s["x"] for s in states] == [f"<{i}>" for i in range(30)]


@pytest.mark.parametrize("in_loop", [False, True])
def test_a_batch_that_is_left_waits_for_nobody(backend, in_loop):
    """Nor do programs begin that had not begun."""
    go_on, began, ended = threading.Event(), [], []

    @sgl.function
    def program(s, i):
        if i:
            began.append(i)
            assert go_on.wait(20)
        s += f"{i} " + sgl.gen("x")
        ended.append(i)

    def first():
        states = program.run_batch([(i,) for i in range(9)], generator_style=True, num_threads=3)
        found = next(states)["x"]
        states.close()
        return found

    async def first_in_loop():
        states = program.arun_batch_iter([(i,) for i in range(9)], num_threads=3)
        found = (await anext(states))["x"]
        await states.aclose()
        return found

    assert (asyncio.run(first_in_loop()) if in_loop else first()) == "<0>"
    assert ended == [0], "it was not waited for"
    go_on.set()
    while len(ended) <= len(began):
        time.sleep(0.001)
    assert len(began) <= 4


@pytest.mark.parametrize("is_async", [False, True])
def test_num_threads_bounds_what_runs_at_once(backend, is_async):
    def body(s, i):
        s += f"{i} " + sgl.gen("x")

    async def async_body(s, i):
        body(s, i)

    program = sgl.function(async_body if is_async else body)
    backend.hold_until = 3
    program.run_batch([(i,) for i in range(12)], num_threads=3)
    assert backend.most_live == 3
    backend.hold_until = 12
    program.run_batch([(i,) for i in range(12)])
    assert backend.most_live == 12


def test_many_states_with_forks_hold_no_threads(backend):
    backend.hold_until = 4000
    seen = []

    def answer(text, sampling, i):
        seen.append(threading.active_count())
        if text.startswith("7 branch1"):
            raise RequestError("no luck")
        return echo(text, sampling, i)

    backend.answer = answer

    @sgl.function
    async def program(s, i):
        s += f"{i} "
        forks = s.fork(2)
        forks += lambda k: f"branch{k} " + sgl.gen("x")
        forks.join()
        if i == 7:
            return await forks[0].aget_var("x")
        return "".join(await s.aget_var("x"))

    before = threading.active_count()
    states = program.run_batch([(i,) for i in range(2000)])
    failed = states.pop(7)
    assert [s.ret_value for s in states] == ["<branch0><branch1>"] * 1999
    assert failed.ret_value == "<branch0>", "the branch beside the one that fails"
    with pytest.raises(sgl.ProgramError, match=r"variable 'x' in branch 1: no luck \(test_programs.py:\d+\)"):
        failed["x"]
    assert backend.most_live == 4000
    assert max(seen) <= before + 1, "at most the loop's own"


def test_the_constant_prefix_is_cached_before_a_batch(backend):
    long = "Examples: " + "one two three " * 8

    @sgl.function
    def program(s, question, style="plain"):
        s += sgl.system(long)
        s += sgl.user("Q: " + question)
        s += sgl.assistant(sgl.gen("a"))

    prefix = f"<|im_start|>system\n{long}<|im_end|>\n<|im_start|>user\nQ: "
    assert constant_prefix(program, backend.chat_template) == prefix
    program.run_batch([("a",), ("b",)])
    assert backend.cached == [prefix] and all(p.startswith(prefix) for p in backend.prompts)
    assert sgl.flush_cache() is True and backend.cached == []
    program.cache()
    assert backend.cached == [prefix]
    assert constant_prefix(program.bind(question="why"), backend.chat_template).startswith(prefix + "why<|im_end|>")


def test_a_prefix_ends_where_arguments_decide(backend):
    @sgl.function
    def formatted(s, q):
        s += "fixed "
        s += f"then {q}"

    @sgl.function
    def branching(s, q):
        s += "fixed "
        if q:
            s += "more"

    for program in (formatted, branching):
        assert constant_prefix(program, backend.chat_template) == "fixed "
        assert "the argument 'q'" in program.trace().reason


def test_trace(backend):
    @sgl.function
    def program(s, q):
        s += "Q: " + q + sgl.gen("a", max_tokens=3)
        forks = s.fork(2)
        forks += lambda i: f"{i}" + sgl.gen("b")
        forks.join()
        s += s["b"]

    trace = program.trace()
    assert trace.reason is None and backend.prompts == []
    gen = Gen("b", Sampling())
    assert trace.nodes.items == (
        Literal("Q: "),
        Argument("q"),
        Gen("a", Sampling(max_new_tokens=3)),
        Fork(2, tuple(Literal(str(i)) + gen for i in range(2))),
        Join("gather_variable"),
        Variable("b"),
    )
    assert msgspec.json.decode(msgspec.json.encode(trace.nodes))["items"][3]["size"] == 2, "data that can be sent"


def test_bind(backend):
    bound = two_turns.bind(second="ciao")
    assert "ciao" in bound.run("hi").text() and "bye" in two_turns.run("hi").text()
    with pytest.raises(RequestError, match="no argument"):
        two_turns.bind(third=1)


def test_use_thread_false_runs_step_by_step(backend):
    @sgl.function
    def program(s):
        s += "a " + sgl.gen("x")
        return len(backend.prompts)

    assert program.run(use_thread=False).ret_value == 1


def test_no_backend():
    with pytest.raises(RequestError, match="set_default_backend"):
        two_turns.run("hi")


@pytest.mark.anyio
@pytest.mark.parametrize("anyio_backend", ["asyncio", "trio"])
async def test_everything_can_be_awaited(backend, anyio_backend):
    @sgl.function
    async def program(s, word):
        s += f"{word} " + sgl.gen("x")
        if await s.aget_var("x") == "<b>":
            s += " again " + sgl.gen("y")
        return (await s)["x"]

    s = await program.arun("b")
    assert s.ret_value == "<b>" and await s.aget_var("y") == "<again>" and await s.aget_meta_info("y")
    assert [s.ret_value for s in await program.arun_batch([("a",), ("b",)])] == ["<a>", "<b>"]
    assert [s["x"] async for s in program.arun_batch_iter([("c",)])] == ["<c>"]
    plain = await two_turns.arun("hi")
    assert plain.ret_value.endswith("<So:>")
    assert "".join([p async for p in (await two_turns.arun("hi", stream=True)).text_async_iter("b")]) == "<So:>"
    await two_turns.acache()
    assert await sgl.aflush_cache() is True and (await sgl.aget_server_info())["model"] == "scripted"
    forks = s.fork(2)
    forks += " c " + sgl.gen("c")
    assert [f.stream_executor.slots["c"].value for f in await forks] == ["<c>", "<c>"], "no further waiting"
    with pytest.raises(KeyError):
        await s.aget_var("z")


def test_an_async_body_that_would_block_the_loop_is_told(backend):
    @sgl.function
    async def program(s):
        s += "a " + sgl.gen("x")
        return s["x"]

    with pytest.raises(RuntimeError, match="await"):
        program.run()
    assert program.run_batch([{}])[0].body_error is not None
