"""The emulator of Gluon finds what is wrong on purpose: each mistake in a kernel that without it is right."""

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

import triton.language as tl
from gluon_emulator import Emulated
from gluon_memory import Fault
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from actorserve.models.primed_gemm import blocks_of
from actorserve.models.primed_kernels import all_threads, barriers, load_block, reinterpreted


@gluon.jit
def product(x, w_blocks, out, rows, WRONG: gl.constexpr):
    """out [rows, 64] = x [rows, 192] @ w [64, 192].T, rows <= 64, with two buffers for three steps."""
    L: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    row = gl.arange(0, 64, gl.SliceLayout(1, L))[:, None]
    column = gl.arange(0, 64, gl.SliceLayout(0, L))[None, :]
    live = (row < rows + (WRONG == "rows")) & (column < 64)
    w = gl.allocate_shared_memory(w_blocks.dtype, [2, 64, 64], w_blocks.layout)
    left = gl.allocate_shared_memory(w_blocks.dtype, [64, 64], w_blocks.layout)
    bars = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(2):
        mbarrier.init(bars.index(i), count=1)
    if WRONG != "barrier fence":
        fence_async_shared()
    for i in gl.static_range(2):
        mbarrier.expect(bars.index(i), 8192 + (WRONG == "bytes"))
        load_block(w_blocks, [0, i * 64], bars.index(i), w.index(i))
    if WRONG == "early store":
        gl.store(out + row * 64 + column, 0.0, live)
    if WRONG != "late":
        tl.extra.cuda.gdc_wait()
    acc = gl.zeros([64, 64], gl.float32, ACC)
    for s in gl.static_range(3):
        if s == 2 and WRONG != "store in use":
            acc = warpgroup_mma_wait(0, deps=[acc])
        left.store(gl.load(x + row * 192 + s * 64 + column, live, other=0.0))
        if WRONG != "fence":
            fence_async_shared()
        if WRONG != "wait":
            mbarrier.wait(bars.index(s % 2), s // 2 if WRONG != "phase" else 0)
        acc = warpgroup_mma(left, w.index(s % 2).permute((1, 0)), acc, use_acc=s > 0, is_async=True)
        if s == 0:
            if WRONG != "load in use":
                acc = warpgroup_mma_wait(0, deps=[acc])
            if WRONG != "arm":
                mbarrier.expect(bars.index(0), 8192)
            if WRONG == "armed twice":
                mbarrier.expect(bars.index(0), 8192)
            load_block(w_blocks, [0, 128], bars.index(0), w.index(0))
    if WRONG != "accumulator":
        acc = warpgroup_mma_wait(0, deps=[acc])
    if WRONG == "late":
        tl.extra.cuda.gdc_wait()
    gl.store(out + row * 64 + column, gl.convert_layout(acc * 1.0, L), live)
    if WRONG == "twice":
        gl.store(out + row * 64 + column, 0.0, live)
    if WRONG == "under way":
        load_block(w_blocks, [0, 0], bars.index(0), w.index(0))


def randn(rows: int, columns: int) -> Tensor:
    """Not at the begin of its memory."""
    return torch.randn(rows + 2, columns, generator=torch.Generator().manual_seed(0)).bfloat16()[1:-1]


def multiply(wrong: str, rows: int = 50, x: Tensor | None = None) -> None:
    x, w, out = randn(rows, 192) if x is None else x, randn(64, 192), torch.full((rows, 64), float("nan"))
    launch = Emulated(product, {"x": None})[(1,)]
    launch(x, blocks_of(w, [64, 64]), out, rows, WRONG=wrong, num_warps=4, launch_pdl=True)
    torch.testing.assert_close(out, x.float() @ w.float().T, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("rows", [1, 50, 64])
def test_what_is_right(rows: int) -> None:
    multiply("", rows)


@pytest.mark.parametrize(
    ("wrong", "fault"),
    [
        ("rows", "access beyond x"),
        ("barrier fence", "no fence after a barrier's initialisation"),
        ("bytes", "never completes: 0 arrivals and 1 bytes are missing"),
        ("arm", "never completes: 1 arrivals and -8192 bytes are missing"),
        ("armed twice", "armed again before its phase has been waited for"),
        ("early store", "out is written before gdc_wait"),
        ("late", "nan"),
        ("store in use", "written while a product reads it"),
        ("load in use", "written while a product reads it"),
        ("fence", "no fence between a store and its use"),
        ("wait", "read before it is loaded"),
        ("phase", "read before it is loaded"),
        ("accumulator", "read while its product is under way"),
        ("twice", "out is written twice"),
        ("under way", "ends while something of it is under way"),
    ],
)
def test_what_is_wrong(wrong: str, fault: str) -> None:
    with pytest.raises(AssertionError, match=fault):
        multiply(wrong)


def test_what_lies_between_rows_is_not_theirs() -> None:
    with pytest.raises(Fault, match="access between the rows of x"):
        multiply("", x=randn(50, 200)[:, :192])


@gluon.jit
def total(values, parts, arrived, out, COUNT: gl.constexpr, WRONG: gl.constexpr):
    """out [COUNT, 32], each the sum of 2 * values [COUNT, 32], by programs that wait for one another."""
    L: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    program, lane = gl.program_id(0), gl.arange(0, 32, L)
    gl.store(parts + program * 32 + lane, 2 * gl.load(values + program * 32 + lane))
    if WRONG != "threads":
        all_threads()
    gl.atomic_add(arrived, 1, sem="acq_rel", scope="gpu")
    if WRONG != "wait":
        while gl.atomic_add(arrived, 0, sem="acquire", scope="gpu") != COUNT + (WRONG == "deadlock"):
            pass
    sums = gl.zeros([32], gl.float32, L)
    for i in gl.static_range(COUNT):
        sums += gl.load(parts + i * 32 + lane)
    if WRONG == "reset":  # while others still wait
        gl.store(arrived, 0)
    gl.store(out + program * 32 + lane, sums)


def add_up(wrong: str) -> None:
    values, out = torch.randn(5, 32), torch.zeros(5, 32)
    parts, arrived = torch.full((5, 32), float("nan")), torch.zeros(1, dtype=torch.int32)
    Emulated(total, {})[(5,)](values, parts, arrived, out, COUNT=5, WRONG=wrong, num_warps=4)
    torch.testing.assert_close(out, (2 * values).sum(0).expand(5, 32))


def test_programs_that_wait() -> None:
    add_up("")
    for wrong, fault in (("deadlock", "waits"), ("reset", "waits"), ("threads", "not all threads"), ("wait", "nan")):
        with pytest.raises(AssertionError, match=fault):
            add_up(wrong)


@gluon.jit
def pages(blocks, out, D: gl.constexpr):
    """Two blocks [16, D] through one buffer [32, D] in two shapes."""
    L: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    buffer = gl.allocate_shared_memory(blocks.dtype, [32, D], blocks.layout)
    bars = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
    mbarrier.init(bars.index(0), count=1)
    fence_async_shared()
    halves = reinterpreted(buffer, [2, 16, D], blocks.layout)
    mbarrier.expect(bars.index(0), 32 * D * 2)
    for i in gl.static_range(2):
        load_block(blocks, [i * 16, 0], bars.index(0), halves.index(i))
    mbarrier.wait(bars.index(0), 0)
    row = gl.arange(0, 32, gl.SliceLayout(1, L))[:, None]
    gl.store(out + row * D + gl.arange(0, D, gl.SliceLayout(0, L))[None, :], buffer.load(L))


def test_the_order_of_columns_in_shared_memory() -> None:
    """A block of more columns than the swizzle is wide is not its halves one after the other; beyond it are zeros."""
    for width, same in ((64, True), (128, False)):
        values, out = randn(20, width), torch.zeros(32, width).bfloat16()
        Emulated(pages, {})[(1,)](blocks_of(values, [16, width]), out, D=width, num_warps=4)
        padded = torch.cat([values, torch.zeros(12, width).bfloat16()])
        assert torch.equal(out, padded) == same


@gluon.jit
def load_rest(w_blocks, w, full, empty, WRONG: gl.constexpr):
    """The steps after the first two, each into the buffer of the one two before it."""
    for s in range(2, 5):
        if WRONG != "no wait":
            mbarrier.wait(empty.index(s % 2), (s // 2 + 1) & 1)
        mbarrier.expect(full.index(s % 2), 8192)
        load_block(w_blocks, [0, s * 64], full.index(s % 2), w.index(s % 2))


@gluon.jit
def multiply_all(x, w, full, empty, acc, WRONG: gl.constexpr):
    for s in range(5):
        mbarrier.wait(full.index(s % 2), (s // 2) & 1)
        acc = warpgroup_mma(x.index(s), w.index(s % 2).permute((1, 0)), acc, is_async=True)
        if WRONG == "early":
            mbarrier.arrive(empty.index(s % 2), count=1)
        acc = warpgroup_mma_wait(0, deps=[acc])
        if WRONG not in ("early", "never"):
            mbarrier.arrive(empty.index(s % 2), count=1)
        if WRONG == "twice":
            mbarrier.arrive(empty.index(s % 2), count=1)
    return acc, acc


@gluon.jit
def divided(x_blocks, w_blocks, out, WRONG: gl.constexpr):
    """out [64, 64] = x [64, 320] @ w [64, 320].T: one partition of the warps loads, another multiplies."""
    x = gl.allocate_shared_memory(x_blocks.dtype, [5, 64, 64], x_blocks.layout)
    w = gl.allocate_shared_memory(w_blocks.dtype, [2, 64, 64], w_blocks.layout)
    full = barriers(2)
    empty = barriers(2)
    fence_async_shared()
    for s in gl.static_range(2):
        mbarrier.expect(full.index(s), 8192 + (3 - s) * 8192)
        load_block(w_blocks, [0, s * 64], full.index(s), w.index(s))
    for s in gl.static_range(5):  # all of x with the first two steps of w
        load_block(x_blocks, [0, s * 64], full.index(s % 2), x.index(s))
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    acc = gl.zeros([64, 64], gl.float32, ACC)
    acc, _same = gl.warp_specialize(
        [(multiply_all, (x, w, full, empty, acc, WRONG)), (load_rest, (w_blocks, w, full, empty, WRONG))], [1], [24]
    )
    row = gl.arange(0, 64, gl.SliceLayout(1, ACC))[:, None]
    gl.store(out + row * 64 + gl.arange(0, 64, gl.SliceLayout(0, ACC))[None, :], acc)


def divide(wrong: str) -> None:
    x, w, out = randn(64, 320), randn(64, 320), torch.full((64, 64), float("nan"))
    Emulated(divided, {})[(1,)](blocks_of(x, [64, 64]), blocks_of(w, [64, 64]), out, WRONG=wrong)
    torch.testing.assert_close(out, x.float() @ w.float().T, rtol=1e-5, atol=1e-4)


def test_partitions() -> None:
    divide("")


@pytest.mark.parametrize(
    ("wrong", "fault"),
    [
        ("early", "written while a product reads it"),
        ("never", "each waits for others"),
        ("twice", "armed again before its phase has been waited for"),
        ("no wait", "armed again before its phase has been waited for"),
    ],
)
def test_partitions_that_are_out_of_step(wrong: str, fault: str) -> None:
    with pytest.raises(Fault, match=fault):
        divide(wrong)
