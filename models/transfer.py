"""BulkCopy: large tensors from mapped files to the GPU, as fast as the files can be read.

Used by weights.py. A plain copy from a mapped file reads it page by page on one thread and waits for each piece; here
threads read pieces into pinned buffers of their own, from which the GPU fetches them while the next are read.
Invariant: after the context every byte is in its place in stream order, or an error was raised.
"""

import os
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Final, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

PIECE: Final = 16 << 20
"""Bytes of a pinned buffer."""
AHEAD: Final = 4
"""Pieces that wait, per reader."""


def can_copy(target: Tensor, source: Tensor) -> bool:
    """Whether the bytes may be copied as they are; otherwise `target.copy_(source)` converts or broadcasts."""
    same = target.dtype == source.dtype and target.shape == source.shape and source.ndim > 0
    return same and target.is_contiguous() and source.is_contiguous()


class BulkCopy:
    """A context manager; `moved` is called by the thread that owns it, with the bytes that arrived since."""

    def __init__(self, device: torch.device, moved: Callable[[int], None], readers: int | None = None) -> None:
        self._device = device
        self._moved = moved
        self._readers = readers or max(1, min(8, os.cpu_count() or 1))
        self._pool = ThreadPoolExecutor(self._readers, thread_name_prefix="weights")
        self._pending: deque[Future[int]] = deque()
        self._own = threading.local()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            while kind is None and self._pending:
                self._moved(self._pending.popleft().result())
        finally:
            self._pool.shutdown(cancel_futures=True)

    def add(self, target: Tensor, source: Tensor) -> None:
        """Copy `source` on the host to `target` on the device; see `can_copy`. Waits when readers are far behind."""
        to = target.view(-1).view(torch.uint8)
        bytes_of: npt.NDArray[np.uint8] = source.view(-1).view(torch.uint8).numpy()
        for start in range(0, len(bytes_of), PIECE):
            while len(self._pending) >= AHEAD * self._readers:
                self._moved(self._pending.popleft().result())
            piece = slice(start, start + PIECE)
            self._pending.append(self._pool.submit(self._move, to[piece], bytes_of[piece]))

    def _move(self, target: Tensor, source: npt.NDArray[np.uint8]) -> int:
        """Runs on a reader."""
        cuda = self._device.type == "cuda"
        if not hasattr(self._own, "buffer"):
            if self._device.index is not None:
                torch.cuda.set_device(self._device)  # events are recorded on the thread's own
            self._own.buffer = torch.empty(PIECE, dtype=torch.uint8, pin_memory=cuda)
            self._own.copied = torch.cuda.Event() if cuda else None  # type: ignore[no-untyped-call]
        buffer, copied = self._own.buffer[: len(source)], self._own.copied
        if copied is not None:
            copied.synchronize()
        np.copyto(buffer.numpy(), source)
        target.copy_(buffer, non_blocking=True)
        if copied is not None:
            copied.record()
        return len(source)
