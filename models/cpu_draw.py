"""Drawing tokens on a CPU by our C kernel (cpu_draw.c): one pass over a row's logits where plain torch makes ten.

Used by the sampler actor, which hands it to the sampler. Invariant: the ids are those of sampler/reference.py.
"""

import torch
from torch import Tensor

from ..errors import StartupError
from .cpu_kernels import Draw, Kernels, kernels, threads


class CpuRace:
    """See sampler.reference.Race."""

    def __init__(self, compiled: Kernels) -> None:
        self.kernel = compiled.draw

    def __call__(
        self, logits: Tensor, bitmask: Tensor | None, greedy: Tensor, inverse_temperature: Tensor, keys: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return ids int64 [rows] and poison bool [rows]; see sampler.reference.Race."""
        rows, vocab = logits.shape
        ids, poison = torch.empty(rows, dtype=torch.int64), torch.empty(rows, dtype=torch.bool)
        masks = None if bitmask is None else bitmask.contiguous()
        self.kernel(
            Draw(
                logits=logits.data_ptr(), rows=rows, vocab=vocab, masks=None if masks is None else masks.data_ptr(),
                words=0 if masks is None else masks.shape[1], greedy=greedy.data_ptr(),
                inverse_temperature=inverse_temperature.data_ptr(), keys=keys.data_ptr(), ids=ids.data_ptr(),
                poison=poison.data_ptr(),
            ),
            threads(),
        )  # fmt: skip
        return ids, poison


def cpu_race() -> CpuRace | None:
    """Return the kernel; None where it cannot be had, as weights.py has said then."""
    try:
        return CpuRace(kernels())
    except StartupError:
        return None
