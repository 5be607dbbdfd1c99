"""Our C kernels for CPUs with AVX2 or AVX-512, compiled at the first use, as Python calls them.

Used by quantized.py, cpu_ops.py and cpu_attention.py, which say what each computes. All run on one pool of threads
(thread_pool.c), as many as torch's. Invariant: what is called is declared here, so that ctypes checks the arguments'
number and kinds; pointers are those of contiguous tensors that the caller keeps alive.
"""

import ctypes
import functools
from pathlib import Path
from typing import Any, Final

import torch

from .c_library import load_library

FILES: Final = (
    "block_kernels.c", "cpu_layers.c", "cpu_attention.c", "thread_pool.c", "cpu_kernels.h",
)  # fmt: skip
_KINDS: Final = {"i": ctypes.c_int, "n": ctypes.c_long, "f": ctypes.c_float, "p": ctypes.c_void_p}
_SIGNATURES: Final = {
    "linear": "ipnnpnpi",
    "rms_norm": "pppnnffi",
    "rotate_and_write": "pnnnnnppppi",
    "silu_mul": "ppnni",
    "attend": "ppppppnnnnnfni",
}
"""Argument by argument: int, long (n), float, pointer."""


class Kernels:
    """The compiled library."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.lanes: int = library.lanes()
        """float32 numbers of a vector."""
        self.linear: Any = library.linear
        self.rms_norm: Any = library.rms_norm
        self.rotate_and_write: Any = library.rotate_and_write
        self.silu_mul: Any = library.silu_mul
        self.attend: Any = library.attend
        for name, arguments in _SIGNATURES.items():
            function = getattr(library, name)
            function.argtypes = [_KINDS[letter] for letter in arguments]
            function.restype = None


@functools.cache
def kernels() -> Kernels:
    """The kernels, compiled if they are not in the cache. Raises StartupError where they cannot be had."""
    folder = Path(__file__).parent
    return Kernels(load_library(*(folder / name for name in FILES)))


def threads() -> int:
    """How many threads a kernel may use."""
    return torch.get_num_threads()
