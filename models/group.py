"""A Group of processes over torch.distributed: NCCL between GPUs, gloo between CPUs. One machine.

Used by the executor. The ranks find each other through a listening socket that the supervisor holds open and hands to
all of them: rank 0 serves a store on it, the others connect to its port, so no port is free when it is chosen and
taken when it is used. Only tensors travel, never objects.
Invariant: a group is made once by each process, and ends with it; when one dies, the others' operations fail or hang,
and the supervisor restarts them all.
"""

import contextlib
import os
import socket
from collections.abc import Iterator
from datetime import timedelta
from typing import Any, Final

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import StartupError

HOST: Final = "127.0.0.1"
PATIENCE: Final = timedelta(minutes=30)
"""An operation waits for so long: a rank may still load its weights, or compile."""
DEFAULTS: Final = {
    "GLOO_SOCKET_IFNAME": "lo",
    "NCCL_SOCKET_IFNAME": "lo",
    # Ranks capture graphs each in its own time, so nothing may be agreed on then: neither connections nor buffers.
    "NCCL_RUNTIME_CONNECT": "0",
    "NCCL_GRAPH_REGISTER": "0",
}
"""What the libraries are told by the environment, unless it says so already."""
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # the new name and the old


class DistributedGroup:
    """See parallel.Group."""

    def __init__(self, meeting: int, rank: int, size: int, device: torch.device) -> None:
        """`meeting`: descriptor of the listening socket, the same on all ranks. Waits for the other ranks."""
        for name, value in DEFAULTS.items():
            os.environ.setdefault(name, value)
        self.device = device
        self._rank, self._size, self._muted = rank, size, False
        backend = "nccl" if device.type == "cuda" else "gloo"
        if backend == "nccl" and not dist.is_nccl_available():
            raise StartupError("--tp-size: this torch was built without NCCL")
        dist.init_process_group(
            backend, store=_store(meeting, rank, size), rank=rank, world_size=size, timeout=PATIENCE,
            device_id=device if device.type == "cuda" else None,
        )  # fmt: skip
        self._connect()

    @property
    def rank(self) -> int:
        """See Group."""
        return self._rank

    @property
    def size(self) -> int:
        """See Group."""
        return self._size

    def sum(self, x: Tensor) -> Tensor:
        """See Group."""
        x = x.contiguous()
        if not self._muted:
            dist.all_reduce(x)
        return x

    def gather(self, x: Tensor) -> Tensor:
        """See Group."""
        parts = x.new_zeros(self._size * len(x), *x.shape[1:])
        if not self._muted:
            _all_gather(parts, x.contiguous())
        return parts.view(self._size, *x.shape)

    def broadcast(self, x: Tensor) -> Tensor:
        """See Group."""
        if not self._muted:
            dist.broadcast(x, 0)
        return x

    def least(self, number: int) -> int:
        """See Group."""
        x = torch.tensor([number], dtype=torch.int64, device=self.device)
        dist.all_reduce(x, dist.ReduceOp.MIN)
        return int(x.item())

    @contextlib.contextmanager
    def muted(self) -> Iterator[None]:
        """See Group."""
        self._muted = True
        try:
            yield
        finally:
            self._muted = False

    def _connect(self) -> None:
        """Every operation once, short and long, so that what it needs is there before a graph is captured."""
        for rows in (1, 1 << 16):
            x = torch.zeros(rows, 8, device=self.device)
            self.sum(x)
            self.gather(x)
            self.broadcast(x)
        self.least(0)


def _store(meeting: int, rank: int, size: int) -> Any:
    """The store on the listening socket: rank 0 serves it."""
    with socket.socket(fileno=os.dup(meeting)) as listening:
        port = listening.getsockname()[1]
    own = os.dup(meeting) if rank == 0 else None  # the store closes it
    return dist.TCPStore(  # type: ignore[attr-defined]
        HOST, port, size, is_master=rank == 0, timeout=PATIENCE, wait_for_workers=False, master_listen_fd=own
    )
