"""Drawing tokens on a CPU by our C kernel (cpu_draw.c): one pass over a row's logits where plain torch makes ten.

Used by the sampler actor, which hands it to the sampler. Invariant: the ids are those of sampler/reference.py.
"""

from typing import Final

import torch
from torch import Tensor

from ..sampler.state import FLOATS, INTS, SamplerState
from .cpu_kernels import Draw, Kernels, cpu_kernels_or_none, threads

NEEDS: Final = INTS.index("needs")


class CpuRace:
    """See sampler.reference.Race."""

    def __init__(self, compiled: Kernels) -> None:
        self.kernel = compiled.draw

    def __call__(
        self, logits: Tensor, bitmask: Tensor | None, slots: Tensor, positions: Tensor, state: SamplerState
    ) -> tuple[Tensor, Tensor]:
        """Return ids int64 [rows] and finish uint8 [rows]; see sampler.reference.Race."""
        rows, vocab = logits.shape
        ids, finish = torch.empty(rows, dtype=torch.int64), torch.empty(rows, dtype=torch.uint8)
        masks = None if bitmask is None else bitmask.contiguous()
        self.kernel(
            Draw(
                logits=logits.data_ptr(), rows=rows, vocab=vocab, masks=None if masks is None else masks.data_ptr(),
                words=0 if masks is None else masks.shape[1], slots=slots.data_ptr(), positions=positions.data_ptr(),
                ints=state.ints.data_ptr(), ints_width=len(INTS), needs=NEEDS, floats=state.floats.data_ptr(),
                floats_width=len(FLOATS), stop_ids=state.stop_ids.data_ptr(), stops=state.stop_ids.shape[1],
                ids=ids.data_ptr(), finish=finish.data_ptr(),
            ),
            threads(),
        )  # fmt: skip
        return ids, finish


def cpu_race() -> CpuRace | None:
    """Return the kernel; None where it cannot be had."""
    compiled = cpu_kernels_or_none()
    return None if compiled is None else CpuRace(compiled)
