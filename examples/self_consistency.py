"""Self-consistency: several lines of reasoning are drawn for one question, and the most frequent answer wins.

Wang et al., arXiv 2203.11171. The answer is held to digits by a regular expression, so that votes can be counted.

    python -m actorserve.examples.self_consistency
"""

from collections import Counter
from typing import Any

import actorserve.lang as sgl

EXAMPLE = """\
Question: Tom has 4 apples and buys 3 more. How many apples does he have?
Reasoning: He starts with 4. He buys 3. 4 + 3 = 7.
Answer: 7

"""
QUESTION = "A bus has 12 people. 5 get off and 2 get on. How many people are on the bus?"


@sgl.function
def vote(s: Any, question: str, samples: int = 5) -> str:
    s += EXAMPLE + "Question: " + question + "\nReasoning:"
    branches = s.fork(samples)
    branches += lambda i: sgl.gen("reasoning", stop="\n", temperature=0.8, seed=i)
    branches += "\nAnswer: " + sgl.gen("answer", regex="[0-9]{1,4}", temperature=0)
    branches.join()
    return str(Counter(s["answer"]).most_common(1)[0][0])


def main(backend: Any) -> None:
    state = vote.run(QUESTION, backend=backend, max_new_tokens=40)
    for reasoning, answer in zip(state["reasoning"], state["answer"], strict=True):
        print(f"{answer:>5} :{reasoning}")
    print(f"Most of them say {state.ret_value}.")


if __name__ == "__main__":
    with sgl.Engine() as engine:
        main(engine)
