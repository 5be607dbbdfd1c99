"""Parallel tips: a few short tips are written out at once, each by a branch, and then summed up.

The first example of SGLang's paper: the branches share what stands before them.

    python -m actorserve.examples.parallel_tips
"""

from typing import Any

import actorserve.lang as sgl


@sgl.function
def tips(s: Any, topic: str) -> None:
    s += "Here are two tips for " + topic + ": 1. Balanced diet. 2. Regular exercise.\n\n"
    branches = s.fork(2)
    branches += lambda i: f"Tip {i + 1} in a paragraph:" + sgl.gen("detail", stop="\n\n")
    branches.join()
    for i in range(2):
        s += f"Tip {i + 1}:" + s["detail"][i] + "\n"
    s += "In summary," + sgl.gen("summary")


def main(backend: Any) -> None:
    print(tips.run("staying healthy", backend=backend, temperature=0, max_new_tokens=48).text())


if __name__ == "__main__":
    with sgl.Engine() as engine:
        main(engine)
