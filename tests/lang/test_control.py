"""`when`, `repeat` and `var`: what they mean on a client, and that a server makes the same of them as data."""

import itertools
import zlib
from dataclasses import dataclass

import msgspec
import pydantic
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from program_server import ProgramServer, both
from scripted_backend import ScriptedBackend, echo

import actorserve.lang as sgl
from actorserve.errors import RequestError
from actorserve.lang.expressions import sequence
from actorserve.lang.loop import LOOP
from actorserve.lang.recording import record
from actorserve.lang.remote import ProgramRequest
from actorserve.lang.replay import replay
from examples import examples


@pytest.fixture
def server():
    return ProgramServer()


def said(server, *replies):
    """Let the server say these, again and again."""
    following = itertools.cycle(replies)
    server.answer = lambda *_: next(following)


def test_a_loop_ends_where_its_condition_holds_or_after_its_turns(server):
    @sgl.function
    def program(s):
        s += "Guess:" + sgl.repeat(" is it " + sgl.gen("word") + "?", 3, until=sgl.var("word") == "red")
        s += " So: " + sgl.var("word")

    said(server, "blue", "red")
    text, _, variables, _ = both(program, server)
    assert text == "Guess: is it blue? is it red? So: red" and variables == {"word": "red"}
    said(server, "blue", "green", "pink")
    assert both(program, server)[0] == "Guess: is it blue? is it green? is it pink? So: pink"


def test_a_loop_whose_turns_are_different(server):
    @sgl.function
    def program(s):
        s += sgl.repeat(lambda i: f"Step {i + 1}: " + sgl.gen(f"step_{i}") + "\n", 3)
        return s["step_0"]

    said(server, "a", "b", "c")
    text, _, variables, returned = both(program, server)
    assert (
        text == "Step 1: a\nStep 2: b\nStep 3: c\n" and list(variables.values()) == ["a", "b", "c"] and returned == "a"
    )


@pytest.mark.parametrize("answer", ["yes", "no"])
def test_one_of_two_parts(server, answer):
    server.answer = lambda text, *_: answer if text.endswith("? ") else "that"

    @sgl.function
    def program(s):
        s["why"] = "unknown"
        s += sgl.user("Healthy? " + sgl.gen("healthy"))
        s += sgl.when(
            sgl.var("healthy") == "yes",
            sgl.assistant("Because " + sgl.gen("why") + sgl.gen("more")),
            sgl.assistant("Instead " + sgl.select("other", ["a", "b"])),
        )
        s += sgl.var("why")

    _, messages, variables, _ = both(program, server)
    assert messages[-1]["content"] == {"yes": "Because thatthat", "no": "Instead b"}[answer]
    made = {"yes": {"why": "that", "more": "that"}, "no": {"why": "unknown", "other": "b"}}[answer]
    assert variables == {"healthy": answer} | made, "what was not made is not there"


def test_what_was_not_made_is_missing(server):
    @sgl.function
    def program(s):
        s += "a " + sgl.gen("x") + sgl.when(sgl.var("x").contains("b"), sgl.gen("y"))

    for remote in (False, True):
        s = program.run(backend=server, remote=remote)
        assert "x" in s and "y" not in s and s.text() == "a <a>"
        with pytest.raises(KeyError, match="'y'"):
            s["y"]


@pytest.mark.parametrize(
    "test, holds",
    [
        (sgl.var("x") == "12", True),
        (sgl.var("x") != "12", False),
        (sgl.var("x") == 12, True),
        (sgl.var("x") < 13, True),
        (sgl.var("x") >= 12.5, False),
        (sgl.var("x") > "100", True),
        (sgl.var("x").startswith("1") & sgl.var("x").endswith("2"), True),
        (sgl.var("x").contains("3") | ~(sgl.var("x") <= 12), False),
        (sgl.var("x"), True),
        (sgl.var("none"), False),
        (sgl.var("flag") == True, True),  # noqa: E712
        (sgl.var("list")[1] == "b", True),
        (sgl.var("list").contains("c"), False),
        (sgl.var("json")["age"] > 30, True),
        (sgl.var("json")["names"][0] == sgl.var("list")[0], True),
    ],
)
def test_conditions(server, test, holds):
    values = {"x": "12", "none": "", "flag": " True", "list": ["a", "b"], "json": '{"age": 31, "names": ["a"]}'}

    @sgl.function
    def program(s):
        for name, value in values.items():
            s[name] = value
        s += sgl.when(test, "it holds", "it does not")

    assert both(program, server)[0] == ("it holds" if holds else "it does not")


@pytest.mark.parametrize(
    "test, message",
    [
        (sgl.var("x") > 1, "compared with a number, but is 'a'"),
        (sgl.var("x")[0] == "b", "has no 0 at that place"),
        (sgl.var("y") == "b", "no variable 'y' at this place"),
        (sgl.var("list") > "b", "cannot be compared"),
        (sgl.var("list").startswith("b"), "cannot be compared"),
    ],
)
def test_conditions_that_cannot_be_decided(server, test, message):
    @sgl.function
    def program(s):
        s["x"], s["list"] = "a", ["a"]
        s += sgl.when(test, sgl.gen("z"))

    for remote in (False, True):
        s = program.run(backend=server, remote=remote)
        with pytest.raises(sgl.ProgramError, match=rf"{message}.*\(test_control.py:\d+\)"):
            s.text()
        with pytest.raises(sgl.ProgramError, match=message):
            s["z"]


def test_variables_are_read_as_they_were_where_the_program_says_so(server):
    @sgl.function
    def program(s):
        s += "a " + sgl.gen("x") + sgl.var("x")
        s += sgl.when(sgl.var("x") == "one", " first")
        s += " b " + sgl.gen("x")
        s += sgl.when(sgl.var("x") == "two", " second")

    said(server, "one", "two")
    assert both(program, server)[0] == "a oneone first b two second"


def test_each_branch_decides_for_itself(server):
    server.answer = lambda text, *_: "stop" if text.count("go") == 1 + text.count("branch1") else "go"

    @sgl.function
    def program(s):
        forks = s.fork(3)
        forks += lambda i: f"branch{i} " + sgl.repeat(sgl.gen("x") + " ", 9, until=sgl.var("x") == "stop")
        forks += sgl.when(sgl.var("x") == "never", sgl.gen("y"))
        forks[1] += sgl.when(sgl.var("x") == "stop", sgl.gen("only"))
        forks.join("gather_variable")
        more = s.fork(2)
        more += sgl.var("x")[1]
        more.join("concate_and_append")
        return [f.text() for f in forks] if not s.__class__.__name__.startswith("Record") else None

    s = program.run(backend=server)
    assert s.ret_value == ["branch0 go stop ", "branch1 go go stop stop", "branch2 go stop "]
    assert s["x"] == ["stop"] * 3 and s["only"] == ["stop"] and "y" not in s and s.text() == "stopstop"


class Person(msgspec.Struct):
    name: str
    age: int = 0


@dataclass
class Pair:
    left: int


class Model(pydantic.BaseModel):
    left: int


def test_instances_are_read_as_the_json_that_the_model_wrote(server):
    server.answer = lambda text, sampling, i: '{"left": 3}' if "left" in (sampling.json_schema or "") else "{}"

    @sgl.function
    def program(s):
        s += sgl.gen("pair", json_schema=Pair) + sgl.gen("model", json_schema=Model)
        s += sgl.when((sgl.var("pair")["left"] == 3) & (sgl.var("model")["left"] == 3), " three")
        s += sgl.repeat(sgl.gen("again", json_schema=Model), 2)
        forks = s.fork(2)
        forks += sgl.gen("each", json_schema=Pair)
        forks.join()
        s += sgl.when(sgl.var("each")[1]["left"] == 3, " all")

    text, _, variables, _ = both(program, server)
    assert text == '{"left": 3}{"left": 3} three{"left": 3}{"left": 3} all'
    assert (variables["pair"], variables["again"], variables["each"]) == (Pair(3), Model(left=3), [Pair(3)] * 2)
    assert b'output_type":null' in server.sent


def test_scopes_thoughts_and_several_in_loops(server):
    server.answer = lambda text, sampling, i: f"<think>t{i}</think>a{i}"

    @sgl.function
    def program(s):
        s += sgl.repeat(
            sgl.assistant(sgl.separate_reasoning(sgl.gen("x"), model_type="deepseek-r1")) + sgl.gen("n", n=2), 2
        )
        with s.var_scope("all"):
            s += sgl.when(sgl.var("x") == "a0", sgl.var("x") + "!")

    _, messages, variables, _ = both(program, server)
    assert [m["content"] for m in messages if m["role"] == "assistant"] == ["a0", "a0"]
    assert variables["x_reasoning_content"] == "t0" and variables["all"] == "a0!" and len(variables["n"]) == 2


def test_a_failure_inside_names_the_variable_the_branch_and_the_line(server):
    def answer(text, sampling, i):
        if text.endswith("bad "):
            raise RequestError("no luck", param="regex")
        return echo(text, sampling, i)

    server.answer = answer

    @sgl.function
    def program(s):
        forks = s.fork(2)
        forks += ["good ", "bad "]
        forks += sgl.repeat(sgl.gen("x") + sgl.gen("y"), 2)
        forks.join()

    for remote in (False, True):
        s = program.run(backend=server, remote=remote)
        with pytest.raises(sgl.ProgramError, match=r"^variable 'x' in branch 1: no luck \(test_control.py:\d+\)$"):
            s["x"]
        with pytest.raises(sgl.ProgramError, match=r"^variable 'y' in branch 1: variable 'x' in branch 1: no luck"):
            s["y"]


def test_loops_are_no_ways_and_their_bodies_are_data_once(server):
    @sgl.function
    def program(s):
        for i in range(20):
            s += f"{i} " + sgl.gen("x")
            s += sgl.when(sgl.var("x") == "<0>", " zero")
        s += sgl.repeat(" word" + sgl.gen("z"), 50)

    both(program, server)
    assert server.sent.count(b'" word"') == 1, "a Python condition would have needed a million ways"


@pytest.mark.parametrize(
    "expr, reason",
    [
        (lambda s: sgl.repeat(sgl.gen("x") + s["x"], 2), r"s\['x'\] is used inside of"),
        (lambda s: sgl.when(sgl.var("x") == "w", sgl.image("cat.png")), "pictures"),
        (lambda s: sgl.when(sgl.var("x") == "w", sgl.gen("x", json_schema=Person)), "one kind or another"),
        (lambda s: sgl.when(sgl.var("x") == s["x"], "y"), "is compared with a Value"),
        (lambda s: sgl.when(sgl.var("x") == "a", sgl.gen("y")) + ("y" if "x" in s else "n"), None),
    ],
)
def test_what_is_not_sent(expr, reason):
    def body(s):
        s += "a " + sgl.gen("x")
        s += expr(s)

    if reason is None:
        record(body, {})
        return
    with pytest.raises(RequestError, match=reason):
        record(body, {})


def test_whether_a_variable_was_made_is_not_known_before(server):
    @sgl.function
    def program(s):
        s += "a " + sgl.gen("x") + sgl.when(sgl.var("x") == "b", sgl.gen("y"))
        return "y" in s

    s = program.run(backend=server, remote=True)
    assert "asks whether 'y' is there" in s.local_reason and s.ret_value is False


def test_a_value_read_before_is_what_a_part_appends(server):
    @sgl.function
    def program(s):
        s += "a " + sgl.gen("x")
        s += sgl.when(sgl.var("x") == "<a>", " b " + s["x"] + sgl.gen("y"))

    assert both(program, server)[0] == "a <a> b <a><<a>>"


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: sgl.repeat("a", 0), "times must be"),
        (lambda: sgl.repeat("a", 10_001), "times must be"),
        (lambda: sgl.repeat("a", sgl.var("n")), "times must be"),
        (lambda: sgl.when("yes", "a"), "made of sgl.var"),
        (lambda: bool(sgl.var("x") == "a"), "use sgl.when"),
        (lambda: f"{sgl.var('x')}", "put into a string"),
        (lambda: [*sgl.var("x")], "walked through"),
        (lambda: "a" in sgl.var("x"), r"\.contains"),
        (lambda: bool(sgl.var("x")), "decides in Python"),
        (lambda: sgl.var("x") == object(), "compared with a object"),
        (lambda: sgl.separate_reasoning(sgl.when(sgl.var("x"), sgl.gen("y")), "deepseek-r1"), "goes inside of"),
    ],
)
def test_what_is_no_condition(make, message):
    with pytest.raises(RequestError, match=message):
        make()


def turns(times, *nodes, inside=None):
    items = nodes if inside is None else (inside,)
    return {"type": "Repeat", "times": times, "bodies": [{"type": "Sequence", "items": items}]}


TEXT = {"type": "Literal", "text": "a"}
SCOPED = (
    {"type": "VarScopeBegin", "name": "x"},
    TEXT,
    {"type": "Var", "name": "x"},
    {"type": "Var", "name": "x"},
    {"type": "VarScopeEnd", "name": "x"},
)


@pytest.mark.parametrize(
    "node, message",
    [
        (turns(10_000, inside=turns(10_000, inside=turns(10_000, TEXT))), "do more than a server lets them"),
        (turns(10_000, inside=turns(10_000)), "do more than a server lets them"),
        (turns(40, *SCOPED), "do more than a server lets them"),
    ],
)
def test_a_server_bounds_what_loops_do(node, message):
    first = {"type": "Assign", "state": 0, "name": "x", "value": "a"}
    request = msgspec.convert({"program": [first, {"type": "Append", "state": 0, "nodes": [node]}]}, ProgramRequest)
    reply = LOOP.call(replay, request, ScriptedBackend())
    assert message in reply.error.message and len(reply.text) < 1 << 25


@pytest.mark.parametrize(
    "node",
    [
        turns(2, {"type": "Image", "source": "/etc/passwd"}),
        turns(2, {"type": "Gen", "name": "x", "sampling": {}, "output_type": "int"}),
        {"type": "When", "test": {"type": "Check", "left": {"type": "Var", "name": "x"}, "operator": "truth"},
         "then": {"type": "Sequence", "items": [{"type": "Commit"}]}},
    ],
)  # fmt: skip
def test_a_server_looks_inside(node):
    request = msgspec.convert({"program": [{"type": "Append", "state": 0, "nodes": [node]}]}, ProgramRequest)
    with pytest.raises(RequestError, match=r"cannot be in a When|output_type"):
        LOOP.call(replay, request, ScriptedBackend())


def nested(depth, inner, around):
    for _ in range(depth):
        inner = around(inner)
    return inner


CHECK = {"type": "Check", "left": {"type": "Var", "name": "x"}, "operator": "truth"}


@pytest.mark.parametrize(
    "node",
    [
        nested(40, TEXT, lambda inner: turns(1, inside=inner)),
        turns(1, TEXT) | {"until": nested(40, CHECK, lambda inner: {"type": "Not", "part": inner})},
        turns(1, TEXT) | {"until": nested(40, CHECK, lambda inner: {"type": "AllOf", "parts": [inner, CHECK]})},
    ],
)
def test_a_server_takes_no_towers(node):
    request = msgspec.convert({"program": [{"type": "Append", "state": 0, "nodes": [node]}]}, ProgramRequest)
    with pytest.raises(RequestError, match="nested more than 32 deep"):
        LOOP.call(replay, request, ScriptedBackend())


@pytest.mark.parametrize("times, bodies", [(0, 1), (10_001, 1), (3, 2), (1, 0)])
def test_loops_that_are_none_are_not_decoded(times, bodies):
    loop = {"type": "Repeat", "times": times, "bodies": [{"type": "Sequence", "items": [TEXT]}] * bodies}
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert({"program": [{"type": "Append", "state": 0, "nodes": [loop]}]}, ProgramRequest)


NAMES = ("x", "y", "z")


def reply(text: str) -> str:
    """What the model says: a digit that depends on all before it."""
    return str(zlib.crc32(text.encode()) % 3)


checks = st.tuples(st.sampled_from(["eq", "lt"]), st.sampled_from(NAMES), st.integers(0, 2))
conditions = (
    checks | st.tuples(st.sampled_from(["and", "or"]), checks, checks) | st.tuples(st.just("not"), checks)
)  # fmt: skip


def parts(depth):
    """Expressions with so many more inside of each other."""
    plain = (
        st.sampled_from([("text", "a"), ("text", "b ")])
        | st.tuples(st.just("gen"), st.sampled_from(NAMES))
        | st.tuples(st.just("var"), st.sampled_from(NAMES))
    )
    if not depth:
        return plain
    inner = st.lists(parts(depth - 1), max_size=3)
    when = st.tuples(st.just("when"), conditions, inner, inner)
    repeat = st.tuples(st.just("repeat"), inner, st.integers(1, 3), st.none() | conditions)
    return plain | when | repeat


def holds(test, values):
    """The slow reference of a condition."""
    match test:
        case ("and", a, b):
            return holds(a, values) and holds(b, values)
        case ("or", a, b):
            return holds(a, values) or holds(b, values)
        case ("not", a):
            return not holds(a, values)
        case (op, name, value):
            return int(values[name]) == value if op == "eq" else int(values[name]) < value


def said_by(part, text, values):
    """The slow reference of an expression: the text behind it; `values` change."""
    match part:
        case ("text", more):
            return text + more
        case ("gen", name):
            values[name] = reply(text)
            return text + values[name]
        case ("var", name):
            return text + values[name]
        case ("when", test, then, otherwise):
            for inner in then if holds(test, values) else otherwise:
                text = said_by(inner, text, values)
        case ("repeat", body, times, until):
            for _ in range(times):
                for inner in body:
                    text = said_by(inner, text, values)
                if until is not None and holds(until, values):
                    break
    return text


def condition_of(test):
    match test:
        case ("and", a, b):
            return condition_of(a) & condition_of(b)
        case ("or", a, b):
            return condition_of(a) | condition_of(b)
        case ("not", a):
            return ~condition_of(a)
        case (op, name, value):
            return sgl.var(name) == value if op == "eq" else sgl.var(name) < value


def expr(part):
    match part:
        case ("text", more):
            return more
        case ("gen", name):
            return sgl.gen(name)
        case ("var", name):
            return sgl.var(name)
        case ("when", test, then, otherwise):
            return sgl.when(condition_of(test), joined(then), joined(otherwise))
        case ("repeat", body, times, until):
            return sgl.repeat(joined(body), times, None if until is None else condition_of(until))


def joined(items):
    return sequence([expr(item) for item in items])


@settings(max_examples=examples(1000, 60), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(items=st.lists(parts(3), max_size=4))
def test_any_program_does_what_the_slow_reference_does(server, items):
    server.answer = lambda text, *_: reply(text)
    values = dict.fromkeys(NAMES, "1")
    text = "start "
    for item in items:
        text = said_by(item, text, values)

    @sgl.function
    def program(s):
        for name in NAMES:
            s[name] = "1"
        s += "start "
        for item in items:
            s += expr(item)

    said, _, variables, _ = both(program, server)
    assert said == text and variables == values


def test_traces_have_them_as_data():
    trace = sgl.function(lambda s, q: s.__iadd__(q + sgl.repeat(sgl.gen("x"), 3, until=sgl.var("x") == "a"))).trace()
    encoded = msgspec.json.decode(msgspec.json.encode(trace.nodes))["items"]
    assert [item["type"] for item in encoded] == ["Argument", "Repeat"] and encoded[1]["until"]["value"] == "a"
