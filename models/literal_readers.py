"""Readers of tool calls that are not JSON: Python calls in a list, and XML parameters. Their values become JSON.

ToolParser hands the text to them, as to call_readers.py. Invariant: nothing is executed; Python source is parsed by
`ast` and only literals are accepted; what cannot be JSON makes the call malformed. Values are written once they are
complete, so a list of Python calls comes at its `]`, an XML parameter at its end tag.
"""

import ast
import json
import re
import warnings
from typing import Any, Final

from .call_sink import CallSink, Verdict
from .parse_events import SPACE

MAX_DEPTH: Final = 64
"""Deeper nested Python counts as malformed."""

_HEAD: Final = re.compile(r"\[\s*[^\W\d][\w.]*\s*\(")
_HEAD_BEGUN: Final = re.compile(r"\[\s*([^\W\d][\w.]*\s*)?\Z")
_MAX_HEAD: Final = 256
"""Characters from [ to ( in which a list of calls must show that it is one."""
_OPENS: Final = {"(": ")", "[": "]", "{": "}"}
_PLAIN: Final = re.compile(r"[\w\s.,=:+-]+")
_NO_NAME: Final = frozenset(" \t\n\r<")
_CONSTANTS: Final = (str, int, float, bool, type(None))


class PythonReader:
    """[f(a=1), g(b="x")]"""

    __slots__ = ("_begin", "_headed", "_quote", "_sink", "_stack", "verdict")

    def __init__(self, sink: CallSink) -> None:
        self.verdict = Verdict.MORE
        self._sink = sink
        self._begin = -1
        self._headed = False
        self._stack: list[str] = []
        """The brackets that are open, as the ones that close them."""
        self._quote = ""
        """The quote of the string that is open; with a backslash after it if the next character is escaped."""

    def read(self, text: str, at: int) -> int:
        if self._begin < 0:
            self._begin = at
        if not self._headed and not self._head(text):
            return at
        while at < len(text) and self.verdict is Verdict.MORE:
            if not self._quote and (plain := _PLAIN.match(text, at)):
                at = plain.end()
                continue
            self._step(text[at])
            at += 1
        if self.verdict is Verdict.DONE:
            self._emit(text[self._begin : at])
        return at

    def _head(self, text: str) -> bool:
        """Whether the text so far shows that this is a list of calls; if it cannot be one, fail."""
        head = _HEAD.match(text, self._begin)
        if head is not None and head.end() - self._begin <= _MAX_HEAD:
            self._headed = True
        elif len(text) - self._begin > _MAX_HEAD or not _HEAD_BEGUN.match(text, self._begin):
            self.verdict = Verdict.FAIL
        return self._headed

    def _step(self, char: str) -> None:
        """Follow brackets and strings; other characters that no literal has, outside of strings, fail."""
        if self._quote:
            if len(self._quote) == 2:
                self._quote = self._quote[0]
            elif char == "\\":
                self._quote += char
            elif char == self._quote:
                self._quote = ""
        elif char in "\"'":
            self._quote = char
        elif char in _OPENS and len(self._stack) < MAX_DEPTH:
            self._stack.append(_OPENS[char])
        elif self._stack and char == self._stack[-1]:
            self._stack.pop()
            self.verdict = Verdict.MORE if self._stack else Verdict.DONE
        else:
            self.verdict = Verdict.FAIL

    def _emit(self, source: str) -> None:
        calls = python_calls(source)
        if calls is None or not all(self._sink.accepts(name) for name, _ in calls):
            self.verdict = Verdict.FAIL
            return
        for name, arguments in calls:
            self._sink.whole_call(name, arguments)


def python_calls(source: str) -> list[tuple[str, str]] | None:
    """The calls of a list of Python calls as (name, arguments as JSON); None if it is anything else."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # "\d" in a string is the model's business
            tree = ast.parse(source, mode="eval").body
        if not isinstance(tree, ast.List) or not tree.elts:
            return None
        return [_call(node) for node in tree.elts]
    except (SyntaxError, ValueError, RecursionError, MemoryError):  # all of them what ast.parse says of bad source
        return None


def _call(node: ast.expr) -> tuple[str, str]:
    """Raises ValueError if it is no call, or an argument is no literal or has no name."""
    if not isinstance(node, ast.Call) or node.args:
        raise ValueError
    arguments: dict[str, Any] = {}
    for keyword in node.keywords:
        if keyword.arg is None or keyword.arg in arguments:
            raise ValueError
        arguments[keyword.arg] = _literal(keyword.value)
    return _dotted(node.func), to_json(arguments)


def _dotted(node: ast.expr) -> str:
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        return f"{_dotted(node.value)}.{node.attr}"
    raise ValueError


def _literal(node: ast.expr) -> Any:
    match node:
        case ast.Constant(value=value) if isinstance(value, _CONSTANTS):
            return value
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as number)):
            return -number
        case ast.List(elts=items) | ast.Tuple(elts=items):
            return [_literal(item) for item in items]
        case ast.Dict(keys=keys, values=values):
            names = [_literal(key) if key is not None else None for key in keys]
            if not all(isinstance(name, str) for name in names):
                raise ValueError
            return dict(zip(names, map(_literal, values), strict=True))
    raise ValueError


class XmlReader:
    """name>, then <parameter=key>value</parameter>..., then </function>.

    A line end after the start tag and one before the end tag are no part of a value. Its type is the schema's; without
    one it is JSON if it can be read as JSON, else a string.
    """

    __slots__ = ("_looked", "_name", "_seen", "_sink", "verdict")

    NEXT: Final = "<parameter="
    LAST: Final = "</function>"
    END: Final = "</parameter>"

    def __init__(self, sink: CallSink) -> None:
        self.verdict = Verdict.MORE
        self._sink = sink
        self._name = ""
        self._seen: set[str] = set()
        self._looked = 0
        """How much of the open parameter, from its tag on, cannot hold the beginning of its end tag."""

    def read(self, text: str, at: int) -> int:
        """Return where the first part begins that is not complete: text after it comes again."""
        while self.verdict is Verdict.MORE:
            after = self._parameter(text, at) if self._name else self._function(text, at)
            if after == at:
                break
            at = after
        return at

    def _function(self, text: str, at: int) -> int:
        """The function's name up to its `>`."""
        end = text.find(">", at)
        name = text[at : end if end >= 0 else len(text)]
        if any(char in _NO_NAME for char in name) or (end >= 0 and not self._sink.accepts(name)):
            self.verdict = Verdict.FAIL
        if end < 0 or self.verdict is Verdict.FAIL:
            return at
        self._name = name
        return end + 1

    def _parameter(self, text: str, at: int) -> int:
        """A parameter, or the end of the call."""
        tag = at
        while tag < len(text) and text[tag] in SPACE:
            tag += 1
        for literal in (self.NEXT, self.LAST):
            if text.startswith(literal, tag):
                break
            if literal.startswith(text[tag:]):
                return at
        else:
            self.verdict = Verdict.FAIL
            return at
        if not self._sink.open:
            self._sink.start(self._name)
        if literal == self.LAST:
            self._sink.arguments("}" if self._seen else "{}")
            self._sink.whole = True
            self._sink.end()
            self.verdict = Verdict.DONE
            return tag + len(literal)
        return self._value(text, at, tag + len(literal))

    def _value(self, text: str, at: int, begin: int) -> int:
        """The parameter whose tag begins at `at` and whose key begins at `begin`."""
        end = text.find(self.END, max(begin, at + self._looked))
        if end < 0:
            self._looked = max(0, len(text) - at - len(self.END) + 1)
            return at
        self._looked = 0
        key, closed, value = text[begin:end].partition(">")
        if not closed or not key or key in self._seen:
            self.verdict = Verdict.FAIL
            return at
        typed = typed_value(value.removeprefix("\n").removesuffix("\n"), self._types(key))
        self._sink.arguments((", " if self._seen else "{") + f"{to_json(key)}: {to_json(typed)}")
        self._seen.add(key)
        return end + len(self.END)

    def _types(self, key: str) -> frozenset[str]:
        """The types that the schema allows for this parameter; none if it does not say."""
        schema = (self._sink.known or {}).get(self._name, {})
        properties = schema.get("properties")
        one = properties.get(key) if isinstance(properties, dict) else None
        types = one.get("type", ()) if isinstance(one, dict) else ()
        return frozenset([types] if isinstance(types, str) else types)


def typed_value(text: str, types: frozenset[str]) -> Any:
    """A parameter's text as a value. What cannot be of its type is a string: the function will complain better."""
    if "string" in types:
        return None if text == "null" and "null" in types else text
    if text in ("True", "False", "None"):  # Python's spelling, which models mix in
        return {"True": True, "False": False}.get(text)
    try:
        value = json.loads(text)
        to_json(value)
    except (ValueError, RecursionError):
        return text
    return value


def to_json(value: Any) -> str:
    """JSON text that can be sent. Raises ValueError for what JSON lacks: NaN, infinities."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    try:
        text.encode()
    except UnicodeEncodeError:  # half a surrogate pair
        return json.dumps(value, allow_nan=False)
    return text
