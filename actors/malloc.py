"""What glibc's malloc is told at the start of a process that is the engine's own; other libraries are left alone.

Used by the executor and by the fsm actor. Invariant: nothing here changes what a program computes.
"""

import ctypes
from typing import Final

_KEEPING: Final = {"M_MMAP_THRESHOLD": (-3, 32 << 20), "M_TRIM_THRESHOLD": (-1, 1 << 30), "M_TOP_PAD": (-2, 64 << 20)}
"""(parameter's number, bytes); 32 MiB is the most that it takes as a threshold for mmap."""
_ARENA_MAX: Final = -8
ARENAS: Final = 2


def keep_freed_memory() -> None:
    """Keep what is freed instead of handing it back to the kernel after each step.

    A step on a CPU allocates the same tensors again and again; fresh pages each time cost a tenth of a decode step and
    a quarter of a prefill (measured by perf.cpu).
    """
    for parameter, value in _KEEPING.values():
        _mallopt(parameter, value)


def share_arenas() -> None:
    """Let all threads take memory from ARENAS places.

    By itself malloc has up to eight for each core. Where threads come and go, as those of match_crew.py, each works in
    another one than the thread before, and every one of them comes to hold the remains of the largest grammars.
    """
    _mallopt(_ARENA_MAX, ARENAS)


def _mallopt(parameter: int, value: int) -> None:
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(parameter, value)
