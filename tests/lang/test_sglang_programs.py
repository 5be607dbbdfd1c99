"""Programs as SGLang's users write them, taken as text: they run with the name in their imports changed, no more."""

import asyncio
import json
import re
from typing import Any

import pytest
from scripted_backend import ScriptedBackend

import actorserve.lang as sgl

CHAT = """
from sglang import assistant, assistant_begin, assistant_end, function, gen, set_default_backend, system, user

@function
def basic_qa(s, question):
    s += system("You are a helpful assistant that can answer questions.")
    s += user(question)
    s += assistant(gen("answer", max_tokens=512))

@function
def multi_turn_qa(s):
    s += system("You are a helpful assistant that can answer questions.")
    s += user("Please give me a list of 3 countries and their capitals.")
    s += assistant(gen("first_answer", max_tokens=512))
    s += user("Please give me another list of 3 countries and their capitals.")
    s += assistant_begin()
    s += "Sure: " + gen("second_answer", max_tokens=512)
    s += assistant_end()
    return s

set_default_backend(backend)
state = basic_qa("List 3 countries and their capitals.")
answer = state["answer"]
turns = multi_turn_qa()
second = turns["second_answer"]
messages = turns.messages()
states = basic_qa.run_batch(
    [{"question": "What is the capital of the United Kingdom?"}, {"question": "What is the capital of France?"}],
    progress_bar=True,
)
answers = [state["answer"] for state in states]
pieces = []
for out in basic_qa.run(question="What is the capital of France?", temperature=0.1, stream=True).text_iter():
    pieces.append(out)
"""

FORK = """
import sglang as sgl

@sgl.function
def tip_suggestion(s):
    s += sgl.system("You are a helpful assistant.")
    s += sgl.user("Here are two tips for staying healthy: 1. Balanced Diet. 2. Regular Exercise. Expand each.")
    forks = s.fork(2)
    for i, f in enumerate(forks):
        f += sgl.assistant(f"Tip {i + 1}: " + sgl.gen("detailed_tip", max_tokens=256, stop="\\n"))
    s += sgl.user("Tip 1:" + forks[0]["detailed_tip"] + "\\n" + "Tip 2:" + forks[1]["detailed_tip"])
    s += sgl.assistant("To summarize the above two tips, " + sgl.gen("summary", max_tokens=512))

@sgl.function
def pair(s):
    s += "a "
    s1, s2 = s.fork(2)
    s1 += "b " + sgl.gen("x")
    s2 += "c " + sgl.gen("x")
    with s.copy() as tmp:
        tmp += "d " + sgl.gen("y")
    s += s1["x"] + s2["x"]

sgl.set_default_backend(backend)
state = tip_suggestion()
summary = state["summary"]
text = pair.run().text()
"""

PAPER = r"""
import sglang as sgl
from sglang import function, gen

dimensions = ["Clarity", "Originality", "Evidence"]

@function
def essay_judge(s, essay):
    s += "Please evaluate the following essay. " + essay
    forks = s.fork(len(dimensions))
    for f, dim in zip(forks, dimensions):
        f += "Evaluate based on the following dimension: " + dim
        f += ". End your judgment with the word 'END'. "
        f += "Judgment: " + gen("judgment", stop="END")
    judgment = "\n".join(f["judgment"] for f in forks)
    s += "Here are the judgments of " + judgment + " "
    schema = r'\{"summary": "[\w\d\s]+\.", "grade": "[ABCD][+-]?"\}'
    s += "In summary, " + gen("output", regex=schema)

@sgl.function
def tool_use(s, question):
    s += "To answer this question: " + question + ". "
    s += "I need to use a " + sgl.gen("tool", choices=["calculator", "search engine"]) + ". "
    if s["tool"] == "calculator":
        s += "The math expression is" + sgl.gen("expression")
    elif s["tool"] == "search engine":
        s += "The key word to search is" + sgl.gen("word")

@sgl.function
def character_gen(s, name):
    s += sgl.user(name + " is a character in Harry Potter. Please fill in the following information.")
    with s.assistant():
        with s.var_scope("json_output"):
            s += '{"name": "' + name + '", "age": ' + sgl.gen_int("age", max_tokens=4) + "}"
        s += sgl.gen("alive", dtype=bool)

state = essay_judge.run("Trees.", backend=backend, temperature=0)
output = state["output"]
tools = tool_use.run("12 * 12?", backend=backend)
word = tools["word"]
character = character_gen.run(name="Harry", backend=backend)
json_output = character["json_output"]
"""

BENCHMARK = """
import asyncio
import sglang as sgl

@sgl.function
def few_shot_hellaswag(s, question, choices):
    s += few_shot_examples + question
    s += sgl.select("answer", choices=choices)

@sgl.function
def propose_plan(s, question, num_branches):
    s += sgl.user("Please generate a high-level plan for solving the following question. " + question)
    forks = s.fork(num_branches)
    forks += sgl.assistant(sgl.gen("plan", max_tokens=256, temperature=0.3))
    return forks

@sgl.function
def reflect_solution(s, question, num_branches):
    plan_forks = propose_plan_inner(s, question, num_branches)
    for f in plan_forks:
        f += sgl.user("Now rate it.") + sgl.assistant(sgl.gen("rate", choices=["1", "2"]))
    return [f["rate"] for f in plan_forks]

def propose_plan_inner(s, question, num_branches):
    s += sgl.user("Plan for: " + question)
    forks = s.fork(num_branches)
    forks += sgl.assistant(sgl.gen("plan", max_tokens=256, temperature=0.3))
    return forks

few_shot_examples = "Q: 1+1? A: 2 " * 8
arguments = [{"question": f"Q: {i}? A: ", "choices": ["one", "two"]} for i in range(8)]
rets = few_shot_hellaswag.run_batch(arguments, temperature=0, num_threads=4, backend=backend, progress_bar=False)
preds = [ret["answer"] for ret in rets]
forks = propose_plan.run("why?", 3, backend=backend).ret_value
plans = [fork["plan"] for fork in forks]
rates = reflect_solution.run("why?", 2, backend=backend).ret_value
bound = few_shot_hellaswag.bind(choices=["x", "y"])
last = bound.run(question="Q: 9?", backend=backend)["answer"]

@sgl.function
def answer_mt_bench(s, question_1, question_2):
    s += sgl.system()
    s += sgl.user(question_1)
    s += sgl.assistant(sgl.gen("answer_1"))
    s += sgl.user(question_2)
    s += sgl.assistant(sgl.gen("answer_2"))

async def stream():
    state = answer_mt_bench.run("one", "two", backend=backend, max_new_tokens=256, stream=True)
    return [out async for out in state.text_async_iter(var_name="answer_2")]

pieces = asyncio.run(stream())
"""

REASONING = """
import sglang as sgl
from sglang import assistant, function, gen, separate_reasoning, system, user

@function
def basic_qa_separate_reasoning(s, question):
    s += system("You are a helpful assistant than can answer questions.")
    s += user(question)
    s += assistant_begin()
    s += separate_reasoning(gen("answer", max_tokens=512), model_type="qwen3")
    s += assistant_end()

from sglang import assistant_begin, assistant_end

@function
def image_qa(s, image_file, question):
    s += user(sgl.image(image_file) + question)
    s += assistant(gen("answer", max_tokens=256))

@function
def regular_expression_gen(s):
    s += user("What is the IP address of the Google DNS servers?")
    s += assistant(gen("answer", temperature=0, regex=r"((25[0-5]|2[0-4]\\\\d|[01]?\\\\d\\\\d?).){3}(25[0-5]|\\\\d)"))

state = basic_qa_separate_reasoning.run("List 3 countries.", backend=backend)
reasoning, answer = state["answer_reasoning_content"], state["answer"]
error = image_qa.run("cat.png", "What is it?", backend=backend).error()
ip = regular_expression_gen.run(backend=backend)["answer"]
"""


def ran(source: str, backend: Any) -> dict[str, Any]:
    """The names that the program leaves."""
    changed = re.sub(r"^(import|from) sglang\b", r"\1 actorserve.lang", source, flags=re.MULTILINE)
    names: dict[str, Any] = {"__name__": "program", "backend": backend}
    try:
        exec(compile(changed, "program.py", "exec"), names)
    finally:
        sgl.set_default_backend(None)
    return names


@pytest.fixture
def backend():
    return ScriptedBackend()


def test_chats(backend):
    names = ran(CHAT, backend)
    assert names["answer"] == "<<|im_start|>assistant>" and names["second"] == "<Sure:>"
    assert [m["role"] for m in names["messages"]] == ["system", "user", "assistant", "user", "assistant"]
    assert len(names["answers"]) == 2 and backend.sampling[0].max_new_tokens == 512
    assert "".join(names["pieces"]).endswith("assistant><|im_end|>\n")


def test_forks(backend):
    names = ran(FORK, backend)
    assert names["summary"] == "<tips,>" and "Tip 1:<1:>\nTip 2:<2:>" in names["state"].text()
    assert names["text"] == "a <b><c>"


def test_the_papers_programs(backend):
    backend.answer = lambda text, sampling, i: f"said{len(sampling.regex or '') % 7}"
    names = ran(PAPER, backend)
    assert names["state"].text().count("said0") == 3 and names["output"].startswith("said")
    assert names["tools"]["tool"] == "search engine" and names["word"] == "said0" and "expression" not in names["tools"]
    assert re.fullmatch(r'\{"name": "Harry", "age": said\d\}', names["json_output"])
    assert names["character"].text().endswith("<|im_end|>\n")  # it has ended: its JSON is there before that
    assert backend.sampling[0].stop == ("END", "<|im_end|>") and backend.sampling[-1].regex == "(True|False)"


def test_benchmarks(backend):
    names = ran(BENCHMARK, backend)
    assert names["preds"] == ["two"] * 8 and names["last"] == "y" and names["rates"] == ["2", "2"]
    assert names["plans"] == ["<<|im_start|>assistant>"] * 3
    assert "".join(names["pieces"]) == "<<|im_start|>assistant>"
    assert any(text.startswith("Q: 1+1? A: 2 ") for text in backend.cached), "the examples, before the batch"


def test_thoughts_pictures_and_patterns(backend):
    backend.answer = lambda *_: "<think>hm</think>France"
    names = ran(REASONING, backend)
    assert (names["reasoning"], names["answer"]) == ("hm", "France")
    assert "no vision" in str(names["error"]) and names["ip"] and backend.sampling[-1].regex


def test_a_program_runs_on_the_engine(engine):
    names = ran(CHAT.replace("max_tokens=512", "max_tokens=6"), engine)
    assert len(names["answers"]) == 2 and all(names["answers"]) and "".join(names["pieces"])
    assert json.dumps(names["messages"]) and asyncio.run(names["state"]._settled()) is names["state"]
