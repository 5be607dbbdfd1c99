"""Skeleton of thought: first the points of an answer in a few words each, then all points are written out at once.

Ning et al., arXiv 2307.15337: a long answer in the time of its longest part.

    python -m actorserve.examples.skeleton_of_thought
"""

from typing import Any

import actorserve.lang as sgl

QUESTION = "How do I learn a new language?"


@sgl.function
def answer(s: Any, question: str, points: int = 3) -> str:
    s += "Question: " + question + "\nThe points of a good answer, a few words each:"
    for i in range(points):
        s += f"\n{i + 1}." + sgl.gen(f"point_{i}", stop="\n")
    branches = s.fork(points)
    for i, branch in enumerate(branches):
        branch += f"\n\nPoint {i + 1} in one or two sentences:" + sgl.gen("text", stop="\n")
    branches.join()
    return "\n".join(f"{i + 1}.{s[f'point_{i}']}\n  {text}" for i, text in enumerate(s["text"]))


def main(backend: Any) -> None:
    print(QUESTION)
    print(answer.run(QUESTION, backend=backend, temperature=0, max_new_tokens=40).ret_value)


if __name__ == "__main__":
    with sgl.Engine() as engine:
        main(engine)
