"""Tree of thought: several next steps are proposed, each is rated by the model, and the best go on.

A beam search over texts (Yao et al., arXiv 2305.10601): every step is a fork, so that all share what led to them.

    python -m actorserve.examples.tree_of_thought
"""

from typing import Any

import actorserve.lang as sgl

QUESTION = "Ann has 3 boxes with 4 pens each. She gives away 5 pens. How many pens are left?"
RATINGS = ("1", "2", "3", "4", "5")


def rating_of(state: Any) -> Any:
    """The model's opinion of a state, in a branch that leaves the state as it is."""
    judge = state.fork(1)[0]
    judge += "\nHow sound is this reasoning so far, from 1 to 5? " + sgl.select("rating", RATINGS)
    return judge


@sgl.function
def solve(s: Any, question: str, depth: int = 2, width: int = 3, keep: int = 2) -> dict[str, Any]:
    s += "Question: " + question + "\nLet us think step by step."
    beam = [s]
    for level in range(depth):
        thoughts = []
        for state in beam:
            branches = state.fork(width)
            branches += lambda i, n=level: f"\nStep {n + 1}:" + sgl.gen(f"step_{n}", stop="\n", temperature=0.8, seed=i)
            thoughts += list(branches)
        judges = [rating_of(state) for state in thoughts]  # all are at work before the first is read
        ratings = [int(judge["rating"]) for judge in judges]
        best = sorted(range(len(thoughts)), key=lambda i: -ratings[i])
        beam = [thoughts[i] for i in best[:keep]]
    winner = beam[0]
    winner += "\nSo the answer is" + sgl.gen("answer", stop="\n", temperature=0)
    steps = [winner[f"step_{level}"] for level in range(depth)]
    return {"steps": steps, "ratings": ratings, "answer": winner["answer"]}


def main(backend: Any) -> None:
    found = solve.run(QUESTION, backend=backend, max_new_tokens=32).ret_value
    print(QUESTION)
    for i, step in enumerate(found["steps"]):
        print(f"  step {i + 1}:{step}")
    print(f"  ratings of the last level: {found['ratings']}\n  answer:{found['answer']}")


if __name__ == "__main__":
    with sgl.Engine() as engine:
        main(engine)
