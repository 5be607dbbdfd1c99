"""A ReAct agent: thought, action, observation, in turns, with a calculator that is really called.

Yao et al., arXiv 2210.03629. The action is a `select`, so that it always exists; its input is held to arithmetic by a
regular expression, and the calculator walks the expression's syntax tree: nothing that the model says is executed.

    python -m actorserve.examples.react_agent
"""

import ast
import operator
from collections.abc import Callable
from typing import Any, Final

import actorserve.lang as sgl

EXAMPLE = """\
Answer the question by turns of Thought, Action and Observation. The actions are calculate and finish.

Question: A shirt costs 12 dollars. How much are 3 shirts and a hat for 9 dollars?
Thought: 3 shirts cost 3*12, and the hat 9 more.
Action: calculate
Input: 3*12+9
Observation: 45
Thought: The total is 45 dollars.
Action: finish
Answer: 45

"""
QUESTION = "A box has 24 eggs. How many eggs are in 7 boxes, if 5 eggs are broken?"
ARITHMETIC: Final = r"[0-9]{1,4}([-+*/][0-9]{1,4}){1,3}"
OPERATIONS: Final[dict[type[ast.operator], Callable[[float, float], float]]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


def calculate(expression: str) -> str:
    """The value of a sum, difference, product or quotient of numbers, as text; what is wrong with it otherwise."""

    def value(node: ast.expr) -> float:
        match node:
            case ast.Constant(value=int() | float() as number):
                return number
            case ast.BinOp(left=left, op=op, right=right) if type(op) in OPERATIONS:
                return OPERATIONS[type(op)](value(left), value(right))
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                return -value(operand)
            case _:
                raise ValueError(ast.unparse(node))

    try:
        return f"{value(ast.parse(expression.strip(), mode='eval').body):.10g}"
    except ZeroDivisionError:
        return "error: division by zero"
    except (SyntaxError, ValueError):
        return f"error: {expression!r} is not arithmetic"


@sgl.function
def agent(s: Any, question: str, most_steps: int = 4) -> list[dict[str, str]]:
    s += EXAMPLE + "Question: " + question
    steps = []
    for i in range(most_steps):
        s += "\nThought:" + sgl.gen(f"thought_{i}", stop="\n")
        s += "\nAction: "
        if i + 1 == most_steps:
            s += "finish"
            break
        s += sgl.select(f"action_{i}", ("calculate", "finish"))
        if s[f"action_{i}"] == "finish":
            break
        s += "\nInput: " + sgl.gen(f"input_{i}", regex=ARITHMETIC)
        observation = calculate(s[f"input_{i}"])
        s += "\nObservation: " + observation
        steps.append({"thought": s[f"thought_{i}"], "input": s[f"input_{i}"], "observation": observation})
    s += "\nAnswer: " + sgl.gen("answer", regex="-?[0-9]{1,6}")
    return steps


def main(backend: Any) -> None:
    state = agent.run(QUESTION, backend=backend, temperature=0, max_new_tokens=32)
    print(state.text()[len(EXAMPLE) :])


if __name__ == "__main__":
    with sgl.Engine() as engine:
        main(engine)
