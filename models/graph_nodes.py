"""What a call would launch, as nodes of a CUDA graph, and the kernel of one by itself: CUDA's driver by ctypes.

Used by cublaslt.py. Names, numbers and structures are those of NVIDIA's cuda.h (12 and 13).
Invariant: a node is used only while the graph that it is of exists.
"""

import contextlib
import ctypes
from collections.abc import Callable, Iterator
from ctypes import byref, c_char, c_int, c_size_t, c_ubyte, c_uint, c_uint64, c_void_p
from typing import Final

import torch

KERNEL, MEMSET = 0, 2
"""CUgraphNodeType"""
THREAD_LOCAL: Final = 1
"""CUstreamCaptureMode"""
COPIED: Final = (2, 4, 5)
"""CUlaunchAttributeID: cooperative, the cluster's dimensions, how clusters are scheduled."""


class KernelNode(ctypes.Structure):
    """CUDA_KERNEL_NODE_PARAMS_v2"""

    _fields_ = (
        ("function", c_void_p), ("grid", c_uint * 3), ("block", c_uint * 3), ("shared", c_uint),
        ("arguments", c_void_p), ("extra", c_void_p), ("kernel", c_void_p), ("context", c_void_p),
    )  # fmt: skip


class MemsetNode(ctypes.Structure):
    """CUDA_MEMSET_NODE_PARAMS_v1"""

    _fields_ = (
        ("place", c_uint64), ("pitch", c_size_t), ("value", c_uint), ("element", c_uint), ("width", c_size_t),
        ("height", c_size_t),
    )  # fmt: skip


class Attribute(ctypes.Structure):
    """CUlaunchAttribute"""

    _fields_ = (("id", c_int), ("padding", c_char * 4), ("value", c_ubyte * 64))


class Launch(ctypes.Structure):
    """CUlaunchConfig"""

    _fields_ = (
        ("grid", c_uint * 3), ("block", c_uint * 3), ("shared", c_uint), ("stream", c_void_p),
        ("attributes", c_void_p), ("count", c_uint),
    )  # fmt: skip


def driver(name: str, *arguments: object) -> None:
    """Call a function of CUDA's driver; raises RuntimeError with its status if it fails."""
    status = getattr(ctypes.CDLL("libcuda.so.1"), name)(*arguments)
    if status:
        raise RuntimeError(f"{name}: status {status}")


@contextlib.contextmanager
def nodes_of(run: Callable[[], None], device: torch.device) -> Iterator[list[c_void_p]]:
    """The nodes that `run` leaves in a graph, in the order of their making. Nothing runs; the graph ends with this."""
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    handle, graph, count = c_void_p(stream.cuda_stream), c_void_p(), c_size_t()
    driver("cuStreamBeginCapture_v2", handle, THREAD_LOCAL)
    try:
        with torch.cuda.stream(stream):
            run()
    finally:
        driver("cuStreamEndCapture", handle, byref(graph))
    try:
        driver("cuGraphGetNodes", graph, None, byref(count))
        nodes = (c_void_p * count.value)()
        driver("cuGraphGetNodes", graph, nodes, byref(count))
        yield [c_void_p(node) for node in nodes]
    finally:
        driver("cuGraphDestroy", graph)


def kind_of(node: c_void_p) -> int:
    """Its CUgraphNodeType."""
    kind = c_int()
    driver("cuGraphNodeGetType", node, byref(kind))
    return kind.value


def set_by(node: c_void_p) -> tuple[int, int, int]:
    """What a MEMSET sets, where it is one row: (address, bytes, value); no bytes for several rows."""
    memset = MemsetNode()
    driver("cuGraphMemsetNodeGetParams", node, byref(memset))
    return memset.place, memset.width * memset.element if memset.height == 1 else 0, memset.value


def launch(node: c_void_p) -> None:
    """Launch the kernel of a KERNEL in the current stream, with the arguments that it has there."""
    kernel, attributes = KernelNode(), (Attribute * len(COPIED))()
    driver("cuGraphKernelNodeGetParams_v2", node, byref(kernel))
    for attribute, number in zip(attributes, COPIED, strict=True):
        attribute.id = number
        driver("cuGraphKernelNodeGetAttribute", node, number, byref(attribute, Attribute.value.offset))
    given = [a for a in attributes if any(a.value)]
    passed = (Attribute * max(1, len(given)))(*given)
    config = Launch(
        kernel.grid, kernel.block, kernel.shared, torch.cuda.current_stream().cuda_stream, ctypes.addressof(passed),
        len(given),
    )  # fmt: skip
    function = kernel.function or kernel.kernel
    driver("cuLaunchKernelEx", byref(config), c_void_p(function), c_void_p(kernel.arguments), c_void_p(kernel.extra))
