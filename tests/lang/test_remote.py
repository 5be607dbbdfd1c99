"""Programs as data: recorded, encoded, run by replay.py on a scripted backend; beside a run of the body itself."""

import random
import re
from pathlib import Path

import msgspec
import pytest
from program_server import ProgramServer, both
from scripted_backend import ScriptedBackend, echo

import actorserve.lang as sgl
from actorserve.errors import EngineDown, RequestError
from actorserve.examples import essay_judge, llm_judge, multi_turn, parallel_tips, react_agent, self_consistency
from actorserve.lang.loop import LOOP
from actorserve.lang.recording import record
from actorserve.lang.remote import Append, Assign, Branch, Condition, If, Merge, ProgramRequest, Reference, Return
from actorserve.lang.replay import replay


@pytest.fixture
def server():
    return ProgramServer()


def test_turns_branches_and_variables(server):
    @sgl.function
    def program(s, topic):
        s += sgl.system("Be brief.")
        with s.user():
            s += "About " + topic + sgl.gen("a", max_tokens=3, stop=["x"])
        s["fixed"] = [1, "two"]
        forks = s.fork(3)
        forks += lambda i: f"branch{i} " + sgl.gen("b") + sgl.gen("n", n=2)
        forks[1] += sgl.select("only", ["c", "d"])
        with forks[2].copy() as c:
            c += "deep " + sgl.gen("deep")
        forks.join()
        with s.var_scope("scope"):
            for i, b in enumerate(s["b"]):
                s += f"\n{i}: " + b
        more = s.fork(2)
        more += ["one " + sgl.gen("x"), "two "]
        more.join("concate_and_append")
        return {"b": s["b"][1], "all": [s["scope"], (s["only"], 5)], "branch": more[0]["x"]}

    text, messages, variables, returned = both(program, server, "cats", temperature=0.5)
    assert variables["b"] == ["<branch0>", "<branch1>", "<branch2>"] and "cats" in messages[1]["content"]
    scope = "\n0: <branch0>\n1: <branch1>\n2: <branch2>"
    assert returned == {"b": "<branch1>", "all": [scope, (["d"], 5)], "branch": "<<branch2>one>"}
    assert variables["deep"] == [["<<branch2><<branch2>>deep>"]] and text.endswith("one <<branch2>one>two ")
    assert server.sampling[-1].temperature == 0.5


def test_conditions_and_loops_go_every_way(server):
    @sgl.function
    def program(s, tries=3):
        for i in range(tries):
            s += f"try{i} " + sgl.gen("word")
            if s["word"] == "<good>" or "end" in s["word"]:
                s += " found"
                return i
            elif not s["word"]:
                s += " nothing"
        s["last"] = "none"

    answers = {"good": ["<bad>", "<good>"], "end": ["<end>"], "empty": ["", "", ""], "never": ["<a>", "<b>", "<c>"]}
    returned = {}
    for name, said in answers.items():
        replies = iter(said * 2)
        server.answer = lambda *_, replies=replies: next(replies)
        returned[name] = both(program, server)[3]
        assert next(replies, None) is None, "as many calls there as here"
    assert returned == {"good": 1, "end": 0, "empty": None, "never": None}


def test_two_variables_can_be_compared(server):
    @sgl.function
    def program(s):
        forks = s.fork(2)
        forks += lambda i: f"side{i} " + sgl.gen("x")
        forks.join()
        s += "same" if s["x"][0] == s["x"][1] else "other"
        s += " and more" if s["x"][0] < s["x"][1] else " and less"

    assert both(program, server)[0] == "other and more"
    server.answer = lambda *_: "equal"
    assert both(program, server)[0] == "same and less"


@pytest.mark.parametrize("branch", [0, 1])
def test_conditions_inside_branches(server, branch):
    server.answer = lambda text, *_: "yes" if f"branch{branch}" in text else "no"

    @sgl.function
    def program(s):
        forks = s.fork(2)
        forks += lambda i: f"branch{i} " + sgl.gen("x")
        for fork in forks:
            if fork["x"] == "yes":
                fork += " more " + sgl.gen("y")
        forks.join("concate_and_append")

    assert both(program, server)[0].count("more") == 1


class Point(msgspec.Struct):
    x: int


def test_types_come_back_as_instances(server):
    server.answer = lambda *_: '{"x": 3}'

    @sgl.function
    def program(s):
        s += sgl.gen("p", json_schema=Point)
        forks = s.fork(2)
        forks += sgl.gen("q", json_schema=Point)
        forks.join()
        return [s["q"][1]]

    _, _, variables, returned = both(program, server)
    assert variables == {"p": Point(3), "q": [Point(3)] * 2} and returned == [Point(3)]
    assert b'output_type":null' in server.sent, "types stay here"


@pytest.mark.parametrize(
    "example, args",
    [
        (multi_turn.conversation, (multi_turn.QUESTIONS,)),
        (essay_judge.judge, (essay_judge.ESSAY,)),
        (parallel_tips.tips, ("health",)),
    ],
)
def test_examples_are_sent_as_they_are(server, example, args):
    both(example, server, *args)
    assert len(server.sent) < 6000


async def test_awaited_and_in_batches(server, anyio_backend):
    @sgl.function
    async def program(s, word):
        s += word + " " + sgl.gen("x")
        await s
        s += "then " + sgl.gen("y")
        return await s.aget_var("y")

    state = await program.arun("one", backend=server, remote=True)
    await state
    assert state.remote and state.ret_value == "<<one>then>" and await state.aget_var("x") == "<one>"
    states = await program.arun_batch([(f"w{i}",) for i in range(50)], backend=server, remote=True, num_threads=4)
    assert [s["x"] for s in states] == [f"<w{i}>" for i in range(50)] and all(s.remote for s in states)


def test_batches(server):
    states = multi_turn.conversation.run_batch([(("a",),), (("b", "c"),)], backend=server, remote=True)
    assert ["answer_1" in s for s in states] == [False, True] and all(s.remote for s in states)


def refused(body):
    @sgl.function
    def program(s, q="w"):
        s += "a " + sgl.gen("x") + sgl.gen("p", json_schema={}, n=2)
        return body(s)

    return program


@pytest.mark.parametrize(
    "body, reason",
    [
        (lambda s: s.__iadd__(f"{s['x']}") and None, "is put into a string"),
        (lambda s: len(s["x"]) and None, "is counted"),
        (lambda s: list(s["x"]) and None, "is counted"),
        (lambda s: {"w": 1}.get(s["x"]), "is looked up"),
        (lambda s: s["x"].upper() and None, r"is asked for \.upper"),
        (lambda s: "".join([s["x"]]) and None, "TypeError"),
        (lambda s: s.text() and None, r"uses s\.text"),
        (lambda s: s["x"][0:1] and None, "is cut"),
        (lambda s: s.__iadd__(sgl.image("cat.png")) and None, "pictures"),
        (lambda s: [s.__iadd__("b") for _ in range(20_000)] and None, "more than 10000 statements"),
        (lambda s: s, "returns a RecordState"),
        (lambda s: [f.join() for f in [s.fork(2)] * 2] and None, "joined twice"),
        (lambda s: None if s.__iadd__(str(random.random())) and s["x"] == "y" else 1, "does not do the same"),
        (lambda s: (s["x"] == Point(1)) and None, "compared with a Point"),
        (lambda s: multi_turn.conversation.run(()) and None, "runs another program"),
    ],
)
def test_what_cannot_be_sent_runs_here_and_says_why(server, body, reason):
    server.answer = lambda *_: "w"
    server.takes_pictures = True
    state = None
    try:
        state = refused(body).run(backend=server, remote=True)
    except Exception:  # the body itself fails, with values as well
        with pytest.raises(RequestError, match=reason):
            record(refused(body).func, {})
        return
    assert not state.remote and not server.sent
    assert re.search(reason, state.local_reason), state.local_reason


def test_arguments_that_have_no_names_run_here(server):
    """None is lost on the way, and what the body would refuse is refused."""

    @sgl.function
    def program(s, first="", *words):
        for word in (first, *words):
            s += word

    s = program.run("a", "b", "c", backend=server, remote=True)
    assert (s.text(), s.remote) == ("abc", False) and "no names" in s.local_reason
    with pytest.raises(TypeError, match="multiple values"):
        program.run("a", first="b", backend=server, remote=True)


def test_a_value_that_has_not_what_a_condition_asks_for_is_the_programs_error(server):
    """As in a body: `[...].startswith` is an AttributeError there."""
    statements = (Assign(0, "x", ["a"]), If(Condition(Reference(0, "x"), "startswith", "a"), ()))
    reply = LOOP.call(replay, ProgramRequest(statements), server)
    assert reply.error is not None and reply.error.status == 400 and "startswith" in reply.error.message


def test_loops_without_a_bound_and_swallowed_refusals(server):
    def endless(s):
        while s["x"] != "done":
            s += sgl.gen("x")

    def swallowing(s):
        s += sgl.gen("x")
        try:
            int(s["x"])
        except Exception:
            s += "no number"

    def many_ways(s):
        for i in range(9):
            s += sgl.gen("x")
            if s["x"] == "a":
                s += f"{i}"

    for body, reason in ((endless, "decides more than 64"), (swallowing, "becomes a number"), (many_ways, "256 ways")):
        with pytest.raises(RequestError, match=reason):
            record(body, {})
    assert not react_agent.agent.run("q", most_steps=1, backend=server, remote=True).local_reason
    state = react_agent.agent.run("q", most_steps=2, backend=ProgramServer(lambda *_: "1"), remote=True)
    assert "asked for .strip" in state.local_reason and not state.remote
    state = self_consistency.vote.run("q", backend=server, remote=True)
    assert "is looked up" in state.local_reason and state.ret_value
    assert "is looked up" in llm_judge.compare.run("q", ("a", "b"), backend=server, remote=True).local_reason


def test_backends_without_programs_and_streams(server):
    plain = ScriptedBackend()
    state = parallel_tips.tips.run("x", backend=plain, remote=True)
    assert state.local_reason == "ScriptedBackend (scripted) runs no programs" and state["summary"]
    state = parallel_tips.tips.run("x", backend=server, remote=True, stream=True)
    assert "stream" in state.local_reason and "".join(state.text_iter("summary"))


def test_errors_come_back_with_the_programs_lines(server):
    def answer(text, sampling, i):
        if "branch1" in text:
            raise RequestError("no luck", param="regex", code="told")
        return echo(text, sampling, i)

    server.answer = answer

    @sgl.function
    def program(s):
        s += "a " + sgl.gen("ok")
        forks = s.fork(2)
        forks += lambda i: f"branch{i} " + sgl.gen("x")
        forks.join()
        s += "b " + sgl.gen("after")
        return s["x"][1]

    s = program.run(backend=server, remote=True)
    assert s["ok"] == "<a>"
    with pytest.raises(sgl.ProgramError, match=r"variable 'x' in branch 1: no luck \(test_remote.py:\d+\)") as caught:
        s["x"]
    assert (caught.value.code, caught.value.status, caught.value.param) == ("told", 400, "regex")
    with pytest.raises(sgl.ProgramError, match="no luck"):
        print(s.ret_value)
    assert s["after"] == "<<a>b>", "the state itself goes on, as it does here"


def test_a_server_that_is_gone(server):
    async def gone(request):
        raise EngineDown("the server cannot be reached")

    server.run_program = gone
    s = parallel_tips.tips.run("x", backend=server, remote=True)
    for read in (lambda: s["summary"], s.text, lambda: s.ret_value):
        with pytest.raises((sgl.ProgramError, EngineDown), match="cannot be reached"):
            read()
    assert s.error().status == 503


FORK = {"type": "Branch", "state": 0, "branches": [1]}


def scope(*nodes):
    """Statement: x becomes the text of these nodes."""
    around = ({"type": "VarScopeBegin", "name": "x"}, *nodes, {"type": "VarScopeEnd", "name": "x"})
    return {"type": "Append", "state": 0, "nodes": around}


REFERENCE = {"type": "Reference", "state": 0, "name": "x"}
GEN = {"type": "Gen", "name": "x", "sampling": {}}


@pytest.mark.parametrize(
    "program, message",
    [
        ([{"type": "Append", "state": 3, "nodes": []}], "no state 3"),
        ([{"type": "Branch", "state": 0, "branches": [0]}], "number of another state"),
        ([{"type": "Branch", "state": 0, "branches": [1, 1]}], "number of another state"),
        ([{"type": "Branch", "state": 0, "branches": list(range(1, 5000))}], "more than 4096 states"),
        ([{"type": "Merge", "state": 0, "branches": [1]}], "no state 1"),
        ([FORK, {"type": "Merge", "state": 0, "branches": [1, 1]}], "state 1 is joined .* twice"),
        (
            [FORK, {"type": "Branch", "state": 1, "branches": [2]}, {"type": "Merge", "state": 0, "branches": [2]}],
            "state 2",
        ),
        (
            [scope({"type": "Literal", "text": "a"}), *[scope(REFERENCE, REFERENCE)] * 30],
            "reads more than 16777216 characters",
        ),
        ([{"type": "Append", "state": 0, "nodes": [GEN | {"output_type": "int"}]}], "types are the client's"),
    ],
)
def test_data_that_is_no_program(server, program, message):
    request = msgspec.convert({"program": program}, ProgramRequest)
    with pytest.raises(RequestError, match=message) as caught:
        LOOP.call(replay, request, server)
    assert caught.value.param == "program"


@pytest.mark.parametrize(
    "statement",
    [
        {"type": "Append", "state": 0, "nodes": [{"type": "Image", "source": "/etc/passwd"}]},
        {"type": "Append", "state": 0, "nodes": [{"type": "Fork", "size": 2}]},
        {
            "type": "If",
            "condition": {"left": {"type": "Reference", "state": 0, "name": "x"}, "operator": "call"},
            "then": [],
        },
        {"type": "Loop"},
    ],
)
def test_data_of_other_kinds_is_not_decoded(statement):
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert({"program": [statement]}, ProgramRequest)


def test_what_a_program_looks_like():
    def body(s):
        s += "a"
        forks = s.fork(2)
        forks.join()
        if s["x"] == "y":
            s += "b"

    recorded = record(body, {})
    append, branch, merge, decision = recorded.statements
    assert isinstance(append, Append) and append.line.startswith("test_remote.py:")
    assert (branch.branches, merge.mode) == ((1, 2), "gather_variable")
    assert isinstance(branch, Branch) and isinstance(merge, Merge) and isinstance(decision, If)
    assert [type(s) for s in decision.then] == [Append, Return] and decision.otherwise == (Return(1),)


def test_the_introductions_data_is_a_program(server):
    text = (Path(__file__).parents[2] / "docs" / "language.md").read_text(encoding="utf-8")
    (block,) = re.findall(r'```\n(\{"program".*?)```', text, re.DOTALL)
    server.answer = lambda text, *_: "the end" if text.count("more") else "more"
    reply = LOOP.call(replay, msgspec.json.decode(block, type=ProgramRequest), server)
    assert reply.error is None and reply.text == "Two names:morethe end"
    assert reply.variables["x"].value == ["more", "more"]
