"""JSON that always parses: by a regular expression, and by the schema of a Python type, which gives an instance.

What the form forces (braces, names, quotes) is computed at once instead of token by token; `forced_tokens` counts it.

    python -m actorserve.examples.json_decoding
"""

from typing import Any, Literal

import msgspec

import actorserve.lang as sgl

CHARACTER = (
    r'\{"name": "[A-Z][a-z]{1,12}( [A-Z][a-z]{1,12})?", "house": "(Gryffindor|Slytherin|Ravenclaw|Hufflepuff)", '
    r'"age": [1-9][0-9]?\}'
)


class City(msgspec.Struct):
    name: str
    country: str
    population: int
    climate: Literal["cold", "mild", "hot"]


@sgl.function
def character(s: Any, name: str) -> None:
    s += name + " is a character of a book. Here are some facts as JSON:\n"
    s += sgl.gen("json", max_tokens=80, regex=CHARACTER)


@sgl.function
def city(s: Any, name: str) -> None:
    s += sgl.user("Describe the city " + name + " as JSON: name, country, population, climate.")
    s += sgl.assistant(sgl.gen("city", max_tokens=80, json_schema=City))


def main(backend: Any) -> None:
    first = character.run("Hermione", backend=backend, temperature=0)
    print(first["json"], f"({first.get_meta_info('json')['forced_tokens']} tokens forced)")
    print(city.run("Lisbon", backend=backend, temperature=0)["city"])


if __name__ == "__main__":
    with sgl.Engine() as engine:
        main(engine)
