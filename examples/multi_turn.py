"""A conversation of several turns.

Each answer is computed on top of the turns before it, which stay in the cache.

    python -m actorserve.examples.multi_turn
"""

from typing import Any

import actorserve.lang as sgl

QUESTIONS = ("What is the capital of France?", "Which river runs through it?", "Name one museum there.")


@sgl.function
def conversation(s: Any, questions: tuple[str, ...]) -> None:
    s += sgl.system("You are a travel guide. Answer in one sentence.")
    for i, question in enumerate(questions):
        s += sgl.user(question)
        s += sgl.assistant(sgl.gen(f"answer_{i}"))


def main(backend: Any) -> None:
    state = conversation.run(QUESTIONS, backend=backend, temperature=0, max_new_tokens=40)
    for i, question in enumerate(QUESTIONS):
        meta = state.get_meta_info(f"answer_{i}")
        print(f"{question}\n  {state[f'answer_{i}']}")
        print(f"  ({meta['prompt_tokens']} prompt tokens, {meta['cached_tokens']} of them from the cache)")


if __name__ == "__main__":
    with sgl.Engine() as engine:
        main(engine)
