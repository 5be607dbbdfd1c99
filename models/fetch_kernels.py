"""Asking the L2 for memory that a kernel will read once its predecessor has ended, with few instructions.

Used by the GEMMs before they wait for their predecessors (PDL): line by line (`ask_lines`), or in bulk, where a request
of one thread covers what would take dozens of loads (PTX: cp.async.bulk.prefetch.L2, sm_90). Nothing waits for it.
Invariant: addresses and sizes in bulk are multiples of 16 bytes; only memory of the tensor itself is asked for.
"""

import triton
import triton.language as tl

ASK = tl.constexpr(
    "{ .reg .pred there; setp.ne.u32 there, $2, 0; @there cp.async.bulk.prefetch.L2.global [$1], $2; mov.u32 $0, 0; }"
)


@triton.jit
def ask_lines(at):
    """Ask for the lines that the pointers `at` are in."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [at.to(tl.int64)], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def ask(at, size):
    """Ask for `size` bytes, none if that is 0, from each pointer of `at`."""
    tl.inline_asm_elementwise(ASK, "=r,l,r", [at.to(tl.int64), size], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def ask_rows(w, first, rows, k, begin, limit, BN: tl.constexpr):
    """Ask for the columns from `begin` to `limit` of the 16-bit rows `first` + i below `rows` of w [., k].

    A thread asks for one piece of a row, or of several.
    """
    PIECES: tl.constexpr = max(1, tl.extra.cuda.num_threads() // BN)
    i = tl.arange(0, BN * PIECES)
    row = first + i // PIECES
    piece = tl.cdiv(tl.cdiv(limit - begin, PIECES), 8) * 8
    column = begin + (i % PIECES) * piece
    size = tl.maximum(tl.minimum(piece, limit - column), 0) * 2
    at = w + tl.minimum(row, rows - 1).to(tl.int64) * k + tl.minimum(column, limit - 8)
    ask(at, tl.where(row < rows, size, 0))
