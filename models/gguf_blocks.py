"""GGUF's K-quants as blocks of 32 values, which our kernel multiplies with: the same values, bit for bit.

Used by gguf.py, so without torch, and by quantized.py. K-quants have 256 values in a block, whose two float16 numbers
are multiplied by small integers for each 32 or 16 of them. Here each 32 values have both beside them:
- Q4_K, 22 bytes: float16 d and dmin, int8 s and m, 4-bit values q as Q4_0's: d * s * q - dmin * m.
- K8, 40 bytes: float16 d and dmin, int8 s of either half, m of either half, q of a byte each. What Q5_K and Q6_K
  become, and Q4_K where it shares a map with them.
A block's size tells its type. Source: ggml-quants.h and the gguf package's quants.py.
"""

from typing import Final

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]

K_TYPES: Final = ("Q4_K", "Q5_K", "Q6_K")
VALUES: Final = 256
"""Of a K-quant's block."""
FOUR, EIGHT = 22, 40
SIZES: Final = {"Q4_K": FOUR, "Q5_K": EIGHT, "Q6_K": EIGHT}
"""Bytes of 32 values here."""


def blocks_of_32(kind: str, rows: Bytes) -> Bytes:
    """Rows uint8 [n, bytes] of one of K_TYPES as rows of blocks of 32."""
    blocks = {"Q4_K": _from_q4, "Q5_K": _from_q5, "Q6_K": _from_q6}[kind](rows.reshape(-1, _size(kind)))
    return np.ascontiguousarray(blocks).reshape(len(rows), -1)


def widened(rows: Bytes, inputs: int) -> Bytes:
    """Rows of Q4_K, of `inputs` values, as K8; of K8 as they are."""
    blocks = rows.reshape(len(rows), inputs // 32, -1)
    if blocks.shape[2] == EIGHT:
        return rows
    numbers, (s, m), q = blocks[..., :4], (blocks[..., 4:5], blocks[..., 5:6]), blocks[..., 6:]
    return np.concatenate((numbers, s, s, m, m, q & 15, q >> 4), -1).reshape(len(rows), -1)


def values_of(rows: Bytes, inputs: int) -> npt.NDArray[np.float32]:
    """The values float32 [n, inputs] of rows of either: their size alone does not tell which (440 bytes are both)."""
    blocks = widened(rows, inputs).reshape(-1, EIGHT)
    d, dmin = np.ascontiguousarray(blocks[:, :4]).view(np.float16).astype(np.float32).T
    s, m = blocks[:, 4:8].view(np.int8).astype(np.float32).reshape(-1, 2, 2).swapaxes(0, 1)
    q = blocks[:, 8:].astype(np.float32).reshape(-1, 2, 16)
    values: npt.NDArray[np.float32] = d[:, None, None] * s[..., None] * q - (dmin[:, None] * m)[..., None]
    return values.reshape(len(rows), -1)


def _size(kind: str) -> int:
    return {"Q4_K": 144, "Q5_K": 176, "Q6_K": 210}[kind]


def _head(blocks: Bytes) -> tuple[Bytes, Bytes, Bytes]:
    """Of Q4_K and Q5_K: d and dmin [n, 8, 4], s and m [n, 8, 1]; 6 bits each in 12 bytes."""
    low, high, rest = np.split(blocks[:, 4:16], 3, -1)
    s = np.concatenate((low & 0x3F, (rest & 0x0F) | ((low >> 2) & 0x30)), -1)
    m = np.concatenate((high & 0x3F, (rest >> 4) | ((high >> 2) & 0x30)), -1)
    return np.repeat(blocks[:, None, :4], 8, 1), s[..., None], m[..., None]


def _nibbles(packed: Bytes, together: int) -> Bytes:
    """q [n, 8, 32] of bytes [n, 128]: `together` low halves, then as many high ones."""
    parts = packed.reshape(len(packed), -1, 1, together)
    return np.concatenate((parts & 15, parts >> 4), 2).reshape(len(packed), 8, 32)


def _from_q4(blocks: Bytes) -> Bytes:
    numbers, s, m = _head(blocks)
    q = _nibbles(blocks[:, 16:], 32)
    return np.concatenate((numbers, s, m, q[..., :16] | (q[..., 16:] << 4)), -1)


def _from_q5(blocks: Bytes) -> Bytes:
    numbers, s, m = _head(blocks)
    fifth = (blocks[:, None, 16:48] >> np.arange(8, dtype=np.uint8)[:, None]) & 1
    return np.concatenate((numbers, s, s, m, m, _nibbles(blocks[:, 48:], 32) | (fifth << 4)), -1)


def _from_q6(blocks: Bytes) -> Bytes:
    """d * s * (q - 32): dmin is 32 * d, and m is s. Raises ValueError for a d that is no weight's."""
    d = np.ascontiguousarray(blocks[:, 208:]).view(np.float16)
    if not (np.abs(d) < 2047).all():
        raise ValueError("a scale of Q6_K is none")
    numbers = np.concatenate((d, d * np.float16(32)), -1).view(np.uint8)
    s = blocks[:, 192:208].reshape(-1, 8, 2)
    upper = blocks[:, 128:192].reshape(-1, 2, 1, 32) >> np.array([0, 2, 4, 6], np.uint8)[:, None] & 3
    q = _nibbles(blocks[:, :128], 64) | (upper.reshape(-1, 8, 32) << 4)
    return np.concatenate((np.repeat(numbers[:, None], 8, 1), s, s, q), -1)
