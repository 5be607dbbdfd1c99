"""The public words of the language, with SGLang's names, parameters and defaults: what programs are written in.

Invariant: a function here only makes data (expressions.py); nothing runs before it is appended to a state.
"""

import re
from collections.abc import Sequence as Texts
from typing import Any, Final

from ..errors import RequestError
from .choices import ChoicesMethod, token_length_normalized
from .expressions import (
    MOST_TIMES,
    AnyTest,
    Check,
    Expr,
    Gen,
    Image,
    Repeat,
    RoleBegin,
    RoleEnd,
    Sampling,
    Select,
    SeparateReasoning,
    Sequence,
    Test,
    Var,
    Video,
    When,
    sequence,
)
from .structured import schema_of
from .tools import ToolCall, tools_of

DTYPE_NAMES: Final = {int: "int", float: "float", bool: "bool", str: "str"}


def gen(
    name: str | None = None,
    max_tokens: int | None = None,
    min_tokens: int | None = None,
    n: int | None = None,
    stop: str | Texts[str] | None = None,
    stop_token_ids: Texts[int] | None = None,
    stop_regex: str | Texts[str] | None = None,
    temperature: float | None = None,
    top_p: float | None = None,
    top_k: int | None = None,
    min_p: float | None = None,
    frequency_penalty: float | None = None,
    presence_penalty: float | None = None,
    ignore_eos: bool | None = None,
    return_logprob: bool | None = None,
    logprob_start_len: int | None = None,
    top_logprobs_num: int | None = None,
    return_text_in_logprobs: bool | None = None,
    dtype: type | str | None = None,
    choices: Texts[str] | None = None,
    choices_method: ChoicesMethod | None = None,
    regex: str | None = None,
    json_schema: Any = None,
    *,
    repetition_penalty: float | None = None,
    seed: int | None = None,
    logit_bias: dict[int, float] | None = None,
    priority: int | None = None,
    ebnf: str | None = None,
    tools: Texts[Any] | None = None,
) -> Expr:
    """The model continues the text, and what it says becomes the variable `name`.

    Parameters that are None are those of the run. n above 1: the variable is a list, and the first of it is appended.
    `choices`: as `select`. `dtype`: int, float, bool or str, the form of the text, which stays text. `json_schema`:
    JSON text, a parsed schema, or a type (msgspec struct, dataclass, pydantic model), of which the variable is then an
    instance. `tools`: functions, or tools in OpenAI's form; the model calls one, and the variable is a ToolCall. Raises
    RequestError and re.error for parameters that are wrong.
    """
    if choices:
        return select(name, choices, temperature or 0.0, choices_method or token_length_normalized)
    if regex is not None:
        re.compile(regex)
    schema, output_type = (None, None) if json_schema is None else schema_of(json_schema)
    if tools is not None:
        if any(given is not None for given in (regex, json_schema, ebnf, dtype)):
            raise RequestError("tools and regex, json_schema, ebnf or dtype exclude each other", param="tools")
        output_type = ToolCall
    sampling = Sampling(
        max_new_tokens=max_tokens,
        min_new_tokens=min_tokens,
        n=n,
        stop=strings(stop),
        stop_token_ids=None if stop_token_ids is None else tuple(stop_token_ids),
        stop_regex=strings(stop_regex),
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        frequency_penalty=frequency_penalty,
        presence_penalty=presence_penalty,
        repetition_penalty=repetition_penalty,
        ignore_eos=ignore_eos,
        return_logprob=return_logprob,
        logprob_start_len=logprob_start_len,
        top_logprobs_num=top_logprobs_num,
        return_text_in_logprobs=return_text_in_logprobs,
        seed=seed,
        logit_bias=logit_bias,
        priority=priority,
        dtype=dtype if isinstance(dtype, str) or dtype is None else DTYPE_NAMES.get(dtype, dtype.__name__),
        regex=regex,
        json_schema=schema,
        ebnf=ebnf,
        tools=None if tools is None else tools_of(tools),
    )
    return Gen(name, sampling, output_type)


def gen_int(name: str | None = None, max_tokens: int | None = None, **sampling: Any) -> Expr:
    """`gen` of the digits of an integer."""
    return gen(name, max_tokens, dtype=int, **sampling)


def gen_string(name: str | None = None, max_tokens: int | None = None, **sampling: Any) -> Expr:
    """`gen` of a string in double quotes."""
    return gen(name, max_tokens, dtype=str, **sampling)


def select(
    name: str | None = None,
    choices: Texts[str] | None = None,
    temperature: float = 0.0,
    choices_method: ChoicesMethod = token_length_normalized,
) -> Expr:
    """The model chooses one of the texts, by their log-probabilities (choices.py). Raises RequestError for none."""
    if not choices or isinstance(choices, str):
        raise RequestError("choices must be a list of texts, one at least", param="choices")
    return Select(name, tuple(choices), temperature, choices_method.name)


def image(source: str) -> Expr:
    """A picture: a path or an address. Models without vision fail at it."""
    return Image(source)


def video(path: str, num_frames: int) -> Expr:
    """A film. No backend takes one yet: the program fails at it."""
    return Video(path, num_frames)


def system(expr: Any = None) -> Sequence:
    """A system turn."""
    return _turn("system", expr)


def user(expr: Any = None) -> Sequence:
    """A user's turn."""
    return _turn("user", expr)


def assistant(expr: Any = None) -> Sequence:
    """A turn of the model's."""
    return _turn("assistant", expr)


def system_begin() -> Expr:
    return RoleBegin("system")


def system_end() -> Expr:
    return RoleEnd("system")


def user_begin() -> Expr:
    return RoleBegin("user")


def user_end() -> Expr:
    return RoleEnd("user")


def assistant_begin() -> Expr:
    return RoleBegin("assistant")


def assistant_end() -> Expr:
    return RoleEnd("assistant")


def separate_reasoning(expr: Any = None, model_type: str | None = None) -> Sequence:
    """Split each variable that `expr` generates: `name` is the answer, `name_reasoning_content` the thoughts.

    `model_type` is a name that `--reasoning-parser` takes, like "deepseek-r1". Raises RequestError without one.
    """
    if model_type is None:
        raise RequestError("separate_reasoning needs model_type, such as 'deepseek-r1'", param="model_type")
    inner = _optional(expr)
    if any(isinstance(node, When | Repeat) for node in inner.items):
        raise RequestError("separate_reasoning goes inside of sgl.when and sgl.repeat, around what they append")
    names = tuple(node.name for node in inner.items if isinstance(node, Gen) and node.name is not None)
    return sequence((inner, SeparateReasoning(names, model_type)))


def var(name: str) -> Var:
    """The variable of that name as it is when the program comes here: append it, or compare it for `when` and `repeat`.

    `var("x")[0]` is an item of a list, `var("x")["age"]` a member of JSON.
    """
    return Var(name)


def when(test: "Test | Var", then: Any, otherwise: Any = None) -> Expr:
    """One of two expressions, by a condition on variables: `when(var("answer") == "yes", sgl.gen("why"), "So be it.")`.

    It is decided when the state comes to it, in each branch for itself, and nobody waits for it. A variable that is
    made in the part that is not taken keeps its value, if it has one. A bare `var` holds if it is not empty.
    """
    return When(_test(test), _optional(then), _optional(otherwise))


def repeat(body: Any, times: int, until: "Test | Var | None" = None) -> Expr:
    """An expression up to `times` times (1 to 10,000), until a condition holds after a turn.

    `body` may be a function of the turn's number, from 0 on, which is called for all turns beforehand. Variables have
    the values of the last turn that made them. Raises RequestError.
    """
    if not isinstance(times, int) or isinstance(times, bool) or not 1 <= times <= MOST_TIMES:
        raise RequestError(f"times must be a number from 1 to {MOST_TIMES}; conditions are `until`'s", param="times")
    bodies = tuple(sequence((body(i),)) for i in range(times)) if callable(body) else (sequence((body,)),)
    return Repeat(bodies, times, None if until is None else _test(until))


def _test(given: Any) -> AnyTest:
    if isinstance(given, Var):
        return Check(given, "truth")
    if not isinstance(given, Test):
        raise RequestError("a condition is made of sgl.var(...), as in sgl.var('x') == 'yes'")
    return given  # type: ignore[return-value]  # every Test is one of the union


def _optional(expr: Any) -> Sequence:
    return sequence(() if expr is None else (expr,))


def strings(given: "str | Texts[str] | None") -> tuple[str, ...] | None:
    """One string or several, as several."""
    if given is None:
        return None
    return (given,) if isinstance(given, str) else tuple(given)


def _turn(role: str, expr: Any) -> Sequence:
    return sequence((RoleBegin(role), *(() if expr is None else (expr,)), RoleEnd(role)))
