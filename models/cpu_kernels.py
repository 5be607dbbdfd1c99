"""Our C kernels for CPUs with AVX2 or AVX-512, compiled at the first use, as Python calls them.

Used by quantized.py, slots.py and the cpu_ files. All run on one pool of threads
(thread_pool.c), as many as torch's. Invariant: what is called is declared here as the C files declare it
(cpu_kernels.h), so that ctypes checks the number and kinds of arguments; pointers are those of contiguous tensors that
the caller keeps alive.
"""

import ctypes
import functools
from ctypes import POINTER, Structure, c_float, c_int, c_long, c_void_p
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from ..errors import StartupError
from .c_library import load_library

FILES: Final = (
    "linear.c", "block_kernels.c", "dense_kernels.c", "pair_kernels.c", "matrix_kernels.c", "cpu_layers.c",
    "cpu_attention.c", "cpu_decoder.c", "cpu_draw.c", "thread_pool.c", "cpu_kernels.h", "linear.h",
)  # fmt: skip


CACHED: Final = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
"""enum cached: dtypes of KV caches that the kernels read and write."""


class Map(Structure):
    """struct map."""

    _fields_ = (("kind", c_int), ("weight", c_void_p), ("bias", c_void_p), ("outputs", c_long), ("inputs", c_long))


class Rotation(Structure):
    """struct rotation."""

    _fields_ = (
        ("qkv", c_void_p), ("tokens", c_long), ("heads", c_long), ("kv_heads", c_long), ("dim", c_long),
        ("qk_norm", c_void_p), ("eps", c_float), ("rotated", c_long), ("cos", c_void_p), ("sin", c_void_p),
        ("slots", c_void_p), ("cache", c_void_p), ("kind", c_int),
    )  # fmt: skip


class Attention(Structure):
    """struct attention."""

    _fields_ = (
        ("q", c_void_p), ("stride", c_long), ("cache", c_void_p), ("kind", c_int), ("out", c_void_p),
        ("pages", c_void_p), ("first", c_void_p), ("end", c_void_p), ("tokens", c_long), ("heads", c_long),
        ("kv_heads", c_long), ("dim", c_long), ("page_size", c_long), ("scale", c_float), ("keys", c_long),
        ("reader", c_void_p), ("packed", c_void_p),
    )  # fmt: skip


class Layer(Structure):
    """struct layer."""

    _fields_ = (
        ("qkv", Map), ("o", Map), ("gate_up", Map), ("down", Map),
        ("qk_norm", c_void_p), ("mlp_norm", c_void_p), ("next_norm", c_void_p), ("first", c_void_p), ("keys", c_long),
        ("cache", c_void_p), ("rotates", c_int),
    )  # fmt: skip


class Draw(Structure):
    """struct draw."""

    _fields_ = (
        ("logits", c_void_p), ("rows", c_long), ("vocab", c_long), ("masks", c_void_p), ("words", c_long),
        ("slots", c_void_p), ("positions", c_void_p), ("ints", c_void_p), ("ints_width", c_long), ("needs", c_long),
        ("floats", c_void_p), ("floats_width", c_long), ("stop_ids", c_void_p), ("stops", c_long), ("ids", c_void_p),
        ("finish", c_void_p),
    )  # fmt: skip


class Slots(Structure):
    """struct slots."""

    _fields_ = (
        ("numbers", c_void_p), ("tables", c_void_p), ("count", c_long), ("pages", c_long), ("page_size", c_long),
        ("scratch", c_long), ("row", c_void_p), ("rows", c_long),
    )  # fmt: skip


_FUNCTIONS: Final = {
    "linear": [POINTER(Map), c_void_p, c_long, c_void_p, c_void_p, c_void_p, c_int],
    "rms_norm": [c_void_p, c_void_p, c_void_p, c_long, c_long, c_float, c_float, c_int],
    "rotate_and_write": [POINTER(Rotation), c_int],
    "silu_mul": [c_void_p, c_void_p, c_long, c_long, c_int],
    "attend": [POINTER(Attention), c_int],
    "draw": [POINTER(Draw), c_int],
    "prepare": [POINTER(Slots), c_void_p, c_void_p],
    "advance": [POINTER(Slots), c_void_p, c_void_p, c_void_p, c_void_p],
    "rotation_table": [c_void_p, c_long, c_void_p, c_long, c_float, c_void_p, c_void_p],
    "run_layers": [
        POINTER(Layer), c_long, c_void_p, c_void_p, POINTER(Rotation), POINTER(Attention), c_void_p, c_void_p,
        c_long, c_void_p, c_long, c_float, c_float, c_int,
    ],
}  # fmt: skip


class Kernels:
    """The compiled library. cpu_kernels.h and cpu_decoder.c say what each function does."""

    def __init__(self, library: ctypes.CDLL) -> None:
        for name, arguments in _FUNCTIONS.items():
            function = getattr(library, name)
            function.argtypes = arguments
            function.restype = None
        self.lanes: int = library.lanes()
        """float32 numbers of a vector."""
        self.matrices = bool(library.has_matrices())
        """bfloat16 weights are multiplied by matrix instructions."""
        self.pairs = bool(library.has_pairs())
        """Two bfloat16 inputs of an output are multiplied by one instruction."""
        self.linear: Any = library.linear
        self.rms_norm: Any = library.rms_norm
        self.rotate_and_write: Any = library.rotate_and_write
        self.silu_mul: Any = library.silu_mul
        self.attend: Any = library.attend
        self.draw: Any = library.draw
        self.prepare: Any = library.prepare
        self.advance: Any = library.advance
        self.rotation_table: Any = library.rotation_table
        self.run_layers: Any = library.run_layers


@functools.cache
def kernels() -> Kernels:
    """The kernels, compiled if they are not in the cache. Raises StartupError where they cannot be had."""
    folder = Path(__file__).parent
    return Kernels(load_library(*(folder / name for name in FILES)))


def cpu_kernels_or_none() -> Kernels | None:
    """The kernels; None where they cannot be had, and plain torch must do."""
    try:
        return kernels()
    except StartupError:
        return None


def scratch(rows: int, inputs: int) -> Tensor:
    """Memory in which `linear` packs rows of so many inputs: as many float32 numbers and half as many again."""
    return torch.empty(rows, inputs + inputs // 2)


def threads() -> int:
    """How many threads a kernel may use."""
    return torch.get_num_threads()
