"""Which line of a program is at work, for errors that a reader can act on. Used by the interpreter.

Invariant: a line is never one of this package's own.
"""

import sys
from traceback import walk_tb
from types import FrameType
from typing import Final

PACKAGE: Final = __name__.rpartition(".")[0]


def program_line() -> str:
    """ "file:line" of the program's statement: the nearest caller outside of this package."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and not _is_program(frame):
        frame = frame.f_back
    return "" if frame is None else _place(frame, frame.f_lineno)


def error_line(error: Exception) -> str:
    """ "file:line" of the innermost line outside of this package that an exception went through."""
    steps = [(frame, line) for frame, line in walk_tb(error.__traceback__) if _is_program(frame)]
    return _place(*steps[-1]) if steps else ""


def _is_program(frame: FrameType) -> bool:
    name = frame.f_globals.get("__name__", "")
    return not name.startswith(PACKAGE) and name != "contextlib"


def _place(frame: FrameType, line: int) -> str:
    return f"{frame.f_code.co_filename.rpartition('/')[2]}:{line}"
