"""The Jinja environment for chat templates: whatever a template does, it ends soon and stays small.

Used by template.py only. Templates come with models from the internet. On top of Jinja's immutable sandbox (no access
to Python's internals), loops and macros check a budget of CPU time, and every operation that can make a large string
out of small ones checks its size before it runs. Invariant: a render that would go on for ever, or allocate much more
than MAX_CHARS characters, raises TooMuch instead.
"""

import json
import re
import time
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime
from functools import wraps
from typing import Any, Final

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

MAX_CHARS: Final = 16 << 20
"""Characters of a rendered conversation, and of every string on the way."""
NODE: Final = 64
"""What each value counts beside its characters, so that counting itself stays fast."""
MAX_RANGE: Final = 10_000
MAX_WIDTH: Final = 1000
"""Largest width, indent or precision."""
MAX_INSERT: Final = 16
"""Longest string that a filter puts at each line."""
RENDER_SECONDS: Final = 0.25
"""CPU time for one render. Real templates take well below 1 ms for an ordinary conversation."""

_BUDGET: Final = "render budget"  # a key that no template can name, for it is no identifier
_LISTS: Final = frozenset(
    "batch count d default dictsort first groupby items last length list map max min random reject rejectattr reverse"
    " select selectattr slice sort unique attr sum".split()
)
"""Filters that do not turn their value into a string."""
_NO_METHODS: Final = frozenset({"expandtabs", "format_map", "translate"})


class TooMuch(jinja2.TemplateRuntimeError):
    """The template takes too long or makes too much text."""


class Budget:
    """CPU time of the rendering thread; a busy machine does not make a template fail."""

    def __init__(self, seconds: float = RENDER_SECONDS) -> None:
        self._end = time.thread_time() + seconds

    def spend(self) -> None:
        if time.thread_time() > self._end:
            raise TooMuch("it takes too long")


class Sandbox(ImmutableSandboxedEnvironment):
    """Jinja as Hugging Face sets it up for chat templates, with limits."""

    intercepted_binops = frozenset({"+", "*", "%", "**"})

    def __init__(self, keep_ascii: Callable[[str], str] = json.dumps) -> None:
        """`keep_ascii` writes one JSON string with ASCII only (masked characters may have to stay as they are)."""
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols], finalize=_output)
        self.filters = {name: _bounded(name, function) for name, function in self.filters.items()}
        self.filters["tojson"] = _tojson(keep_ascii)
        del self.globals["lipsum"]
        self.globals |= {"range": _range, "raise_exception": _raise_exception, "strftime_now": _strftime_now}

    def load(self, source: str) -> jinja2.Template:
        """Compile `source`. Raises jinja2.TemplateSyntaxError and, for monsters, RecursionError or SyntaxError."""
        tree = _Limits(self).visit(self.parse(source))
        return jinja2.Template.from_code(self, self.compile(tree), self.make_globals(None))

    def run(self, template: jinja2.Template, variables: Mapping[str, Any]) -> str:
        """Render with `variables`; raises what the template raises, and TooMuch."""
        context = template.new_context({**variables, _BUDGET: Budget()})
        return self.concat(template.root_render_func(context))

    # ------------------------------------------------------------------ called by compiled templates

    @staticmethod
    def concat(parts: Iterable[str]) -> str:
        """Join the output of a template, a macro or a block."""
        kept, size = [], 0
        for part in parts:
            size += len(part)
            if size > MAX_CHARS:
                raise TooMuch("its output is too large")
            kept.append(part)
        return "".join(kept)

    def tilde(self, *values: Any) -> str:
        """The operator `~`."""
        return self.concat(map(_output_text, values))

    def tick(self, context: Context) -> None:
        """At each turn of a loop and each call of a macro."""
        context.parent[_BUDGET].spend()

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        if isinstance(obj, str) and attr in _NO_METHODS:
            return False
        return super().is_safe_attribute(obj, attr, value)

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        text = getattr(__obj, "__self__", None)
        if isinstance(text, str):
            _check_method(__obj.__name__, text, args)
        elif hasattr(__obj, "__wrapped__") and args:
            _check_format(str(getattr(__obj.__wrapped__, "__self__", "")), "{", (*args, *kwargs.values()))
        return super().call(__context, __obj, *args, **kwargs)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "**":
            _check(abs(right) <= 64 and abs(left) < 1 << 32)
        elif operator == "*":
            sized, times = (right, left) if isinstance(left, int) else (left, right)
            if isinstance(sized, str | list | tuple):
                _check(isinstance(times, int) and len(sized) * times <= MAX_CHARS)
            elif isinstance(sized, int):
                _check(abs(sized) < 1 << 64 and abs(times) < 1 << 64)
        elif operator == "+" and isinstance(left, str | list | tuple) and isinstance(right, str | list | tuple):
            _check(len(left) + len(right) <= MAX_CHARS)
        elif operator == "%" and isinstance(left, str):
            _check_format(left, "%", right if isinstance(right, tuple) else (right,))
        return super().call_binop(context, operator, left, right)


class Generation(Extension):
    """The tag `{% generation %}` of training templates: its body is rendered as it is."""

    tags: Final = {"generation"}  # type: ignore[misc]

    def parse(self, parser: Any) -> nodes.Node | list[nodes.Node]:
        next(parser.stream)
        body: list[nodes.Node] = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return body


class _Limits(NodeTransformer):
    """Puts `tick` into loops and macros, and `tilde` in place of `~`."""

    def __init__(self, environment: Sandbox) -> None:
        self._environment = environment

    def _looping(self, node: Any) -> nodes.Node:
        self.generic_visit(node)
        tick = nodes.ExprStmt(self._call("tick", [nodes.ContextReference()], node.lineno), lineno=node.lineno)
        node.body.insert(0, tick.set_environment(self._environment))
        return node  # type: ignore[no-any-return]

    visit_For = visit_Macro = visit_CallBlock = _looping

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return self._call("tilde", node.nodes, node.lineno).set_environment(self._environment)

    def _call(self, name: str, args: list[Any], line: int) -> nodes.Call:
        call = nodes.Call(nodes.EnvironmentAttribute(name), args, [], None, None)
        call.set_lineno(line)
        return call


def weigh(value: Any, limit: int = MAX_CHARS) -> int:
    """Characters that `value` takes as text, roughly and without building it; TooMuch above `limit`.

    Nested lists that share their parts ("billion laughs") are counted as often as they would be written.
    """
    size = NODE
    if isinstance(value, str):
        size += len(value)
    elif isinstance(value, Mapping):
        for key, item in value.items():
            size += weigh(key, limit - size)
            size += weigh(item, limit - size)
    elif isinstance(value, list | tuple | set | frozenset):
        for item in value:
            size += weigh(item, limit - size)
    _check(size <= limit)
    return size


def _check(fits: bool) -> None:
    if not fits:
        raise TooMuch("it makes too much text")


def _check_width(args: Iterable[Any]) -> None:
    _check(not any(isinstance(a, int) and abs(a) > MAX_WIDTH for a in args))


def _check_method(name: str, text: str, args: tuple[Any, ...]) -> None:
    """Before a method of a string runs."""
    if name in ("ljust", "rjust", "center", "zfill"):
        _check_width(args)
    elif name == "join" and args:
        _check_join(text, args[0])
    elif name == "replace":
        _check_replace(text, args)


def _check_join(separator: str, parts: Any) -> None:
    if isinstance(parts, list | tuple | set | dict):
        _check(weigh(list(parts)) + len(separator) * len(parts) <= MAX_CHARS)


def _check_replace(text: str, args: tuple[Any, ...]) -> None:
    if len(args) >= 2:
        old, new = str(args[0]), str(args[1])
        _check(len(text) + text.count(old) * len(new) <= MAX_CHARS)


def _check_format(text: str, mark: str, args: Iterable[Any]) -> None:
    """Before `%` or str.format runs: no wide fields, no widths taken from arguments, no large argument many times."""
    _check(re.search(r"\d{4}|%[^%\s\w]*\*|\{[^{}]*\{", text) is None)
    largest = max((weigh(a) for a in args), default=0)
    _check(len(text) + text.count(mark) * largest <= MAX_CHARS)


def _bounded(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter that checks before it runs. Its first argument may be Jinja's context, which has no size here."""

    @wraps(function)  # keeps Jinja's mark of what it passes as the first argument
    def bounded(*args: Any, **kwargs: Any) -> Any:
        values = (*args[1:], *kwargs.values()) if hasattr(function, "jinja_pass_arg") else (*args, *kwargs.values())
        if name in ("center", "indent", "wordwrap", "batch", "slice", "round", "truncate"):
            _check_width(values[1:])
            _check(name == "batch" or all(len(v) <= MAX_INSERT for v in values[1:] if isinstance(v, str)))
        if name == "join":
            values = (list(values[0]), *values[1:])
            _check_join(str(values[1]) if len(values) > 1 else "", values[0])
            args = (args[0], values[0], *args[2:]) if hasattr(function, "jinja_pass_arg") else (values[0], *args[1:])
        elif name == "replace":
            _check_replace(str(values[0]), values[1:])
        elif name == "format":
            _check_format(str(values[0]), "%", values[1:])
        elif name == "sum":
            values = (list(values[0]), *values[1:])
            _check(all(isinstance(v, int | float | Mapping) for v in values[0]))
            args = (args[0], values[0], *args[2:]) if hasattr(function, "jinja_pass_arg") else (values[0], *args[1:])
        elif name not in _LISTS:
            weigh(values)
        result = function(*args, **kwargs)
        _check(not isinstance(result, str) or len(result) <= MAX_CHARS)
        return result

    return bounded


def _output(value: Any) -> Any:
    """Jinja's `finalize`: every value that is printed."""
    if not isinstance(value, str):
        weigh(value)
    return value


def _output_text(value: Any) -> str:
    return value if isinstance(value, str) else str(_output(value))


def _tojson(ascii_string: Callable[[str], str]) -> Callable[..., str]:
    def tojson(
        value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
    ) -> str:
        weigh(value)
        _check_width((indent,))
        text = json.dumps(value, ensure_ascii=False, indent=indent, separators=separators, sort_keys=sort_keys)
        return ascii_string(text) if ensure_ascii else text

    return tojson


def _range(*args: int) -> range:
    numbers = range(*args)
    _check(len(numbers) <= MAX_RANGE)
    return numbers


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    _check(len(form) < 256 and re.search(r"\d{3}", form) is None)
    return datetime.now().strftime(form)
