"""A model as the judge of two answers, asked twice with the answers changed over: only what it says both times counts.

Zheng et al., arXiv 2306.05685, section 3.4, on the bias for a position.

    python -m actorserve.examples.llm_judge
"""

from typing import Any

import actorserve.lang as sgl

QUESTION = "Why is the sky blue?"
ANSWERS = ("Air scatters blue light more than red light.", "Because it likes the sea.")


@sgl.function
def compare(s: Any, question: str, answers: tuple[str, str]) -> str:
    """Returns "first", "second" or "tie"."""
    s += sgl.system("You compare two answers to a question.")
    s += sgl.user_begin() + "The question is: " + question
    branches = s.fork(2)
    for branch, (a, b) in zip(branches, (answers, answers[::-1]), strict=True):
        branch += "\nAnswer A: " + a + "\nAnswer B: " + b + "\nWhich is better, and why?" + sgl.user_end()
        with branch.assistant():
            branch += "Reason:" + sgl.gen("reason", stop="\n")
            branch += "\nThe better answer is " + sgl.select("verdict", ("A", "B"))
    branches.join()
    return {("A", "B"): "first", ("B", "A"): "second"}.get(tuple(s["verdict"]), "tie")


def main(backend: Any) -> None:
    state = compare.run(QUESTION, ANSWERS, backend=backend, temperature=0, max_new_tokens=32)
    for reason, verdict in zip(state["reason"], state["verdict"], strict=True):
        print(f"{verdict}:{reason}")
    print(f"The better answer of the two: {state.ret_value}")


if __name__ == "__main__":
    with sgl.Engine() as engine:
        main(engine)
