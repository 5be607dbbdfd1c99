"""Variables of a program: values that are being made, and the error that a reader meets where one could not be.

Used by the interpreter, which fills them, and by states, which read them. Invariant: a variable is filled or failed
exactly once, then never changes; `text` only grows before that.
"""

from typing import Any

from ..errors import ActorserveError
from .loop import Signal


class ProgramError(ActorserveError):
    """A part of a program failed. `__cause__` is what went wrong; `line` is where the program asked for it."""

    code = "program_failed"

    def __init__(self, message: str, line: str) -> None:
        super().__init__(f"{message} ({line})" if line else message)
        self.line = line


def failure(cause: Exception, what: str, line: str) -> ProgramError:
    """The error of a variable or branch, with the status and the code of its cause."""
    if isinstance(cause, ProgramError):
        error = ProgramError(f"{what}: {cause.message}", "")
        error.line = cause.line
    else:
        error = ProgramError(f"{what}: {cause or type(cause).__name__}", line)
    if isinstance(cause, ActorserveError):
        error.code, error.status, error.param = cause.code, cause.status, cause.param
    error.__cause__ = cause
    return error


class Slot:
    """One variable on its way. `line` is "file:line" of the program, `where` tells its branch in errors."""

    __slots__ = (
        "changed", "done", "error", "line", "meta", "missing", "name", "optional", "said", "text", "value", "where"
    )  # fmt: skip

    def __init__(self, name: str, line: str = "", where: str = "", optional: bool = False) -> None:
        self.name = name
        self.line = line
        self.where = where
        self.optional = optional
        """It may come to nothing: it is made in a part of `when` or `repeat`."""
        self.missing = False
        """It has come to nothing."""
        self.value: Any = None
        self.said: Any = None
        """What the model said where the value is an instance of a type: its text, or a list of texts."""
        self.meta: dict[str, Any] | None = None
        self.error: ProgramError | None = None
        self.text = ""
        """What has been streamed so far."""
        self.done = Signal()
        self.changed = Signal()
        """Set at the next piece, and then another one takes its place: look at `text` after taking it."""

    def grow(self, piece: str, meta: dict[str, Any]) -> None:
        """Append streamed text."""
        self.text += piece
        self.meta = meta
        self._notify()

    def fill(self, value: Any, meta: dict[str, Any] | None = None, said: Any = None) -> None:
        self.value = value
        self.meta = meta
        self.said = said
        self._end()

    def take(self, other: "Slot | None") -> None:
        """Become what another one is, which is done; None: come to nothing."""
        if other is None or other.missing:
            self.missing = True
        else:
            self.error, self.value, self.meta, self.said = other.error, other.value, other.meta, other.said
        self._end()

    def fail(self, cause: Exception) -> None:
        if not self.done.is_set:
            self.error = failure(cause, f"variable {self.name!r}{self.where}", self.line)
            self._end()

    def result(self) -> Any:
        """The value of a variable that is done. Raises ProgramError where it failed, KeyError if it was not made."""
        if self.error is not None:
            raise self.error.with_traceback(None)
        if self.missing:
            raise KeyError(f"the program has not made the variable {self.name!r}: it did not come to its place")
        return self.value

    def _end(self) -> None:
        if isinstance(self.value, str):
            self.text = self.value
        self.done.set()
        self._notify()

    def _notify(self) -> None:
        changed, self.changed = self.changed, Signal()
        changed.set()


def filled(name: str, value: Any) -> Slot:
    """A variable that has its value."""
    slot = Slot(name)
    slot.fill(value)
    return slot
