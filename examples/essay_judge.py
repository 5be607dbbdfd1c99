"""Branch-solve-merge: an essay is judged in several dimensions at once, and the judgments become one grade.

The judges are branches of one state, so that the essay is computed once (Saha et al., arXiv 2310.15123, as in SGLang's
paper).

    python -m actorserve.examples.essay_judge
"""

from typing import Any

import actorserve.lang as sgl

DIMENSIONS = ("clarity", "originality", "evidence")
GRADES = ("A", "B", "C", "D")
ESSAY = """\
Cities should plant more trees. Trees cool the streets in summer: under a closed canopy the air is up to five degrees
cooler than over bare asphalt. They hold back rain that would flood the sewers, and they filter dust. A tree costs less
than a year of cleaning up after floods. Some say that roots break pavements; with the right species they do not."""


@sgl.function
def judge(s: Any, essay: str, dimensions: tuple[str, ...] = DIMENSIONS) -> None:
    s += sgl.system("You judge essays. Be fair and short.")
    s += sgl.user_begin() + "Here is an essay:\n" + essay + "\n\n"
    branches = s.fork(len(dimensions))
    branches += lambda i: f"Judge the {dimensions[i]} of this essay in one sentence." + sgl.user_end()
    branches += sgl.assistant(sgl.gen("judgment", stop="\n"))
    branches.join()
    s += "Judges say about it:"
    for i, dimension in enumerate(dimensions):
        s += f"\n{dimension}: " + s["judgment"][i]
    s += "\nSum up what they say in one sentence, and give a grade from A (best) to D." + sgl.user_end()
    s += sgl.assistant(sgl.gen("summary", stop="\n") + "\nGrade: " + sgl.select("grade", GRADES))


def main(backend: Any) -> None:
    state = judge.run(ESSAY, backend=backend, temperature=0, max_new_tokens=40)
    for dimension, judgment in zip(DIMENSIONS, state["judgment"], strict=True):
        print(f"{dimension}: {judgment}")
    print(f"Summary: {state['summary']}\nGrade: {state['grade']}")


if __name__ == "__main__":
    with sgl.Engine() as engine:
        main(engine)
