"""cuBLASLt by ctypes: matrix products by an algorithm of the caller's choice, which torch does not let one choose.

Used by tuned_gemm.py. Names, numbers and structures are those of NVIDIA's cublasLt.h (12 and 13); the library is the
one that torch has loaded. Row-major tensors are its column-major matrices transposed: out [rows, outputs] = x [rows,
inputs] @ weight [outputs, inputs].T is an outputs x rows product of the transposed weight with x.
Invariant: an algorithm runs on a product only after the library has said that it can.
"""

import ctypes
from ctypes import byref, c_float, c_int, c_int32, c_int64, c_size_t, c_uint64, c_void_p
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

NAMES: Final = ("libcublasLt.so.13", "libcublasLt.so.12")
TYPES: Final = {torch.float32: 0, torch.float16: 2, torch.bfloat16: 14}
"""cudaDataType_t"""
COMPUTE_FLOAT32: Final = 68
"""cublasComputeType_t"""
TRANSPOSE_A, EPILOGUE, BIAS_POINTER = 3, 7, 8
"""cublasLtMatmulDescAttributes_t"""
TRANSPOSED, ADD_BIAS = 1, 4
"""cublasOperation_t, cublasLtEpilogue_t"""
MAX_WORKSPACE: Final = 1
"""cublasLtMatmulPreferenceAttributes_t"""
MOST: Final = 32
"""Candidates of one question."""
KERNEL, MEMSET = 0, 2
"""CUgraphNodeType"""
THREAD_LOCAL: Final = 1
"""CUstreamCaptureMode"""


class Algorithm(ctypes.Structure):
    """cublasLtMatmulAlgo_t"""

    _fields_ = (("data", c_uint64 * 8),)


class Found(ctypes.Structure):
    """cublasLtMatmulHeuristicResult_t"""

    _fields_ = (
        ("algorithm", Algorithm), ("workspace", c_size_t), ("state", c_int), ("waves", c_float),
        ("reserved", c_int * 4),
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Product:
    """out [rows, outputs] = x [rows, inputs] @ weight [outputs, inputs].T (+ bias [outputs]); `result`: out's dtype."""

    outputs: int
    inputs: int
    rows: int
    bias: bool
    dtype: torch.dtype
    result: torch.dtype


class CublasLt:
    """The library on one device, with a workspace of its own: its products run one after another, in one stream."""

    def __init__(self, device: torch.device, workspace: int) -> None:
        """Raises OSError if it cannot be loaded, RuntimeError if it fails."""
        self.lib = _load()
        self.workspace = torch.empty(workspace, dtype=torch.uint8, device=device)
        self.handle = c_void_p()
        self.call("cublasLtCreate", byref(self.handle))

    @property
    def version(self) -> int:
        """Like 130100."""
        return int(self.lib.cublasLtGetVersion())

    def call(self, name: str, *arguments: object) -> None:
        """Call a function; raises RuntimeError with its status if it fails."""
        status = getattr(self.lib, name)(*arguments)
        if status:
            raise RuntimeError(f"{name}: status {status}")


def _load() -> ctypes.CDLL:
    for name in NAMES:
        try:
            lib = ctypes.CDLL(name)
        except OSError:
            continue
        lib.cublasLtGetVersion.restype = c_size_t
        return lib
    raise OSError(f"none of {', '.join(NAMES)} can be loaded")


def _driver(name: str, *arguments: object) -> None:
    """Call a function of CUDA's driver; raises RuntimeError with its status if it fails."""
    status = getattr(ctypes.CDLL("libcuda.so.1"), name)(*arguments)
    if status:
        raise RuntimeError(f"{name}: status {status}")


class Plan:
    """A product as the library knows it. To be closed."""

    def __init__(self, library: CublasLt, product: Product) -> None:
        p = product
        self.library = library
        self.product = product
        self._description, self._a, self._b, self._d = c_void_p(), c_void_p(), c_void_p(), c_void_p()
        self._one, self._zero = c_float(1.0), c_float(0.0)
        call = library.call
        call("cublasLtMatmulDescCreate", byref(self._description), COMPUTE_FLOAT32, TYPES[torch.float32])
        self._set(TRANSPOSE_A, c_int32(TRANSPOSED))
        if p.bias:
            self._set(EPILOGUE, c_int32(ADD_BIAS))
        for layout, dtype, height, width in (
            (self._a, p.dtype, p.inputs, p.outputs), (self._b, p.dtype, p.inputs, p.rows),
            (self._d, p.result, p.outputs, p.rows),
        ):  # fmt: skip
            sizes = c_uint64(height), c_uint64(width), c_int64(height)
            call("cublasLtMatrixLayoutCreate", byref(layout), TYPES[dtype], *sizes)

    def _set(self, attribute: int, value: c_int32 | c_void_p) -> None:
        size = c_size_t(ctypes.sizeof(value))
        self.library.call("cublasLtMatmulDescSetAttribute", self._description, attribute, byref(value), size)

    def candidates(self) -> list[bytes]:
        """What the library would run, its first choice first."""
        found, count = (Found * MOST)(), c_int()
        call, preference = self.library.call, c_void_p()
        call("cublasLtMatmulPreferenceCreate", byref(preference))
        try:
            limit = c_uint64(self.library.workspace.numel())
            call("cublasLtMatmulPreferenceSetAttribute", preference, MAX_WORKSPACE, byref(limit), c_size_t(8))
            layouts = self._a, self._b, self._d, self._d
            call(
                "cublasLtMatmulAlgoGetHeuristic", self.library.handle, self._description, *layouts, preference, MOST,
                found, byref(count),
            )  # fmt: skip
        finally:
            call("cublasLtMatmulPreferenceDestroy", preference)
        return [bytes(f.algorithm) for f in found[: count.value] if f.state == 0]

    def algorithm(self, candidate: bytes) -> Algorithm | None:
        """The candidate, if the library can run it on this product in its workspace."""
        if len(candidate) != ctypes.sizeof(Algorithm):
            return None
        algorithm, found = Algorithm.from_buffer_copy(candidate), Found()
        status = self.library.lib.cublasLtMatmulAlgoCheck(
            self.library.handle, self._description, self._a, self._b, self._d, self._d, byref(algorithm), byref(found)
        )
        fits = status == 0 and found.state == 0 and found.workspace <= self.library.workspace.numel()
        return algorithm if fits else None

    def run(self, algorithm: Algorithm, x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
        """Launch the product in the current stream; all tensors contiguous, as the product says."""
        if bias is not None:
            self._set(BIAS_POINTER, c_void_p(bias.data_ptr()))
        space = self.library.workspace
        self.library.call(
            "cublasLtMatmul", self.library.handle, self._description, byref(self._one), c_void_p(weight.data_ptr()),
            self._a, c_void_p(x.data_ptr()), self._b, byref(self._zero), c_void_p(out.data_ptr()), self._d,
            c_void_p(out.data_ptr()), self._d, byref(algorithm), c_void_p(space.data_ptr()), c_size_t(space.numel()),
            c_void_p(torch.cuda.current_stream().cuda_stream),
        )  # fmt: skip

    def nodes(self, algorithm: Algorithm, x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> list[int]:
        """What `run` launches: CUgraphNodeTypes. Nothing runs."""
        stream = torch.cuda.Stream(x.device)  # type: ignore[no-untyped-call]
        handle, graph, count, kind = c_void_p(stream.cuda_stream), c_void_p(), c_size_t(), c_int()
        _driver("cuStreamBeginCapture_v2", handle, THREAD_LOCAL)
        try:
            with torch.cuda.stream(stream):
                self.run(algorithm, x, weight, bias, out)
        finally:
            _driver("cuStreamEndCapture", handle, byref(graph))
        _driver("cuGraphGetNodes", graph, None, byref(count))
        nodes, kinds = (c_void_p * count.value)(), []
        _driver("cuGraphGetNodes", graph, nodes, byref(count))
        for node in nodes:
            _driver("cuGraphNodeGetType", c_void_p(node), byref(kind))
            kinds.append(kind.value)
        _driver("cuGraphDestroy", graph)
        return kinds

    def close(self) -> None:
        """Free what the library keeps of it."""
        for layout in (self._a, self._b, self._d):
            self.library.call("cublasLtMatrixLayoutDestroy", layout)
        self.library.call("cublasLtMatmulDescDestroy", self._description)
