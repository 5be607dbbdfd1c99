"""The programs of examples/ on the real model: the structure of what comes out, whatever the model says."""

import json
import re

import pytest

from actorserve.examples import (
    essay_judge,
    json_decoding,
    llm_judge,
    multi_choice,
    multi_turn,
    parallel_tips,
    rag,
    react_agent,
    self_consistency,
    skeleton_of_thought,
    tree_of_thought,
)

EXAMPLES = (
    essay_judge,
    json_decoding,
    llm_judge,
    multi_choice,
    multi_turn,
    parallel_tips,
    rag,
    react_agent,
    self_consistency,
    skeleton_of_thought,
    tree_of_thought,
)


@pytest.fixture
def few(engine):
    """How the tests run programs: on the shared engine, a few tokens each."""
    return {"backend": engine, "max_new_tokens": 4}


def test_multi_turn(few):
    s = multi_turn.conversation.run(multi_turn.QUESTIONS[:2], temperature=0, **few)
    assert [turn["role"] for turn in s.messages()] == ["system", "user", "assistant", "user", "assistant"]
    assert [turn["content"] for turn in s.messages()[1::2]] == list(multi_turn.QUESTIONS[:2])
    first, second = (s.get_meta_info(f"answer_{i}") for i in range(2))
    assert second["cached_tokens"] >= first["prompt_tokens"], "the first turn is not computed twice"


def test_essay_judge(few):
    s = essay_judge.judge.run("Trees cool the streets. " * 3, essay_judge.DIMENSIONS[:2], temperature=0, **few)
    judgments = s["judgment"]
    assert len(judgments) == 2 and s["grade"] in essay_judge.GRADES
    assert f"\nclarity: {judgments[0]}\noriginality: {judgments[1]}\nSum up" in s.text()
    assert s.text().endswith(f"{s['summary']}\nGrade: {s['grade']}<|im_end|>\n")
    assert "Judge the" not in s.text(), "the branches' own text stays theirs"
    for meta in s.get_meta_info("judgment")["branches"]:
        assert meta["cached_tokens"] > 30 > meta["prompt_tokens"] - meta["cached_tokens"], "the essay is computed once"


def test_tree_of_thought(few):
    found = tree_of_thought.solve.run(tree_of_thought.QUESTION, depth=1, width=2, keep=1, **few).ret_value
    assert len(found["steps"]) == 1 and len(found["ratings"]) == 2 and found["answer"]
    assert all(1 <= rating <= 5 for rating in found["ratings"])


def test_self_consistency(few):
    s = self_consistency.vote.run(self_consistency.QUESTION, samples=3, **few)
    assert len(s["reasoning"]) == 3 and all(re.fullmatch("[0-9]{1,4}", answer) for answer in s["answer"])
    assert s["answer"].count(s.ret_value) == max(map(s["answer"].count, s["answer"]))


def test_skeleton_of_thought(few):
    s = skeleton_of_thought.answer.run(skeleton_of_thought.QUESTION, points=2, temperature=0, **few)
    assert len(s["text"]) == 2 and "\n" not in s["point_0"] + s["point_1"]
    assert s.ret_value == f"1.{s['point_0']}\n  {s['text'][0]}\n2.{s['point_1']}\n  {s['text'][1]}"


def test_react_agent_calls_its_tool(few):
    s = react_agent.agent.run(react_agent.QUESTION, most_steps=2, temperature=0, **few)
    steps, text = s.ret_value, s.text()
    assert re.fullmatch("-?[0-9]+", s["answer"]) and text.endswith("\nAnswer: " + s["answer"])
    assert len(steps) == 1, "the model calculates in the first step, and the second is the last"
    assert steps[0]["observation"] == react_agent.calculate(s["input_0"])
    assert f"\nInput: {s['input_0']}\nObservation: {steps[0]['observation']}\nThought:" in text


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("3*12+9", "45"),
        ("2+3*4-6/3", "12"),
        ("-(2+3)*4", "-20"),
        ("1/3", "0.3333333333"),
        ("1/0", "error: division by zero"),
        ("2**9999", "error: '2**9999' is not arithmetic"),
        ("__import__('os')", "error: \"__import__('os')\" is not arithmetic"),
        ("'a'*9", "error: \"'a'*9\" is not arithmetic"),
        ("007*2", "error: '007*2' is not arithmetic"),
        ("", "error: '' is not arithmetic"),
    ],
)
def test_the_calculator_calculates_and_does_nothing_else(expression, value):
    assert react_agent.calculate(expression) == value


def test_json_by_regex_and_by_schema(engine):
    first = json_decoding.character.run("Hermione", backend=engine, temperature=0)
    facts = json.loads(first["json"])
    assert set(facts) == {"name", "house", "age"} and re.fullmatch(json_decoding.CHARACTER, first["json"])
    meta = first.get_meta_info("json")
    assert meta["forced_tokens"] > 0
    city = json_decoding.city.run("Lisbon", backend=engine, temperature=0)["city"]
    assert isinstance(city, json_decoding.City) and city.climate in ("cold", "mild", "hot")


def test_rag_finds_the_passages(few):
    found = [rag.best(question, rag.passages(rag.NOTES)) for question in rag.QUESTIONS]
    assert [name for name, _ in found] == ["lighthouse.txt", "village.txt", "ferry.txt"]
    assert ["1874" in found[0][1], "Fridays" in found[1][1], "35 minutes" in found[2][1]] == [True] * 3
    s = rag.ask.run(found[2][1], rag.QUESTIONS[2], temperature=0, **few)
    assert s["answer"] and found[2][1] in s.messages()[1]["content"]


def test_parallel_tips(few):
    s = parallel_tips.tips.run("sleeping well", temperature=0, **few)
    first, second = s["detail"]
    assert s.text().endswith(f"Tip 1:{first}\nTip 2:{second}\nIn summary,{s['summary']}") and s["summary"]


def test_multi_choice(engine):
    item = multi_choice.ITEMS[3]
    s = multi_choice.choose.run(item.begin, item.endings, backend=engine)
    assert s["ending"] == item.endings[item.right], "even a small model knows this one"
    assert s.text() == multi_choice.SHOTS + item.begin + s["ending"]


def test_llm_judge(few):
    s = llm_judge.compare.run(llm_judge.QUESTION, llm_judge.ANSWERS, temperature=0, **few)
    a, b = s["verdict"]
    assert {a, b} <= {"A", "B"} and len(s["reason"]) == 2
    assert s.ret_value == ("tie" if a == b else "first" if a == "A" else "second")


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.__name__.rpartition(".")[2])
def test_examples_print_what_they_found(example, engine, capsys, thorough):
    if not thorough:
        pytest.skip("minutes; with --thorough")
    example.main(engine.endpoint)
    assert len(capsys.readouterr().out) > 20
