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

    __slots__ = ("changed", "done", "error", "line", "meta", "name", "text", "value", "where")

    def __init__(self, name: str, line: str = "", where: str = "") -> None:
        self.name = name
        self.line = line
        self.where = where
        self.value: Any = None
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

    def fill(self, value: Any, meta: dict[str, Any] | None = None) -> None:
        self.value = value
        self.meta = meta
        self._end()

    def fail(self, cause: Exception) -> None:
        if not self.done.is_set:
            self.error = failure(cause, f"variable {self.name!r}{self.where}", self.line)
            self._end()

    def result(self) -> Any:
        """The value of a variable that is done. Raises ProgramError where it failed."""
        if self.error is not None:
            raise self.error.with_traceback(None)
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
