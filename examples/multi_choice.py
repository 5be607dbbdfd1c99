"""Multiple choice by `select`, in the way of HellaSwag: the likeliest ending by the model's own probabilities.

The examples in front are the same for all questions: a batch computes them once.

    python -m actorserve.examples.multi_choice
"""

from typing import Any, NamedTuple

import actorserve.lang as sgl


class Item(NamedTuple):
    """The beginning of a text, four endings, and the number of the right one."""

    begin: str
    endings: tuple[str, ...]
    right: int


SHOTS = (
    "The boy kicks the ball. The ball flies into the goal and the team cheers.\n"
    "She puts the kettle on the stove. When the water boils, she makes tea.\n"
    "It starts to rain in the park. The people open their umbrellas and walk home.\n"
)
ITEMS = (
    Item("He turns the key and", (" the door opens.", " the soup sings.", " a fish drives.", " the moon reads."), 0),
    Item("The baby is tired and", (" flies the plane.", " falls asleep.", " paints the sea.", " sells a car."), 1),
    Item("The cook tastes the soup and", (" sinks it.", " runs it.", " adds some salt.", " reads it aloud."), 2),
    Item("The sun goes down and", (" the desk laughs.", " bread walks.", " a shoe sleeps.", " it gets dark."), 3),
)


@sgl.function
def choose(s: Any, begin: str, endings: tuple[str, ...], shots: str = SHOTS) -> None:
    s += shots + begin
    s += sgl.select("ending", endings)


def main(backend: Any) -> None:
    states = choose.run_batch([{"begin": i.begin, "endings": i.endings} for i in ITEMS], backend=backend)
    for item, state in zip(ITEMS, states, strict=True):
        print(f"{'right' if state['ending'] == item.endings[item.right] else 'wrong'}: {item.begin}{state['ending']}")


if __name__ == "__main__":
    with sgl.Engine() as engine:
        main(engine)
