"""FlashInfer's prefill kernels that are not compiled yet: a thread compiles them while Triton's serve.

Used by attention.py. FlashInfer compiles on first use, for a combination of dtype, head size, window and soft cap one
or two minutes on 16 cores, which the first prompt would wait for; what is compiled stays in its cache folder. The
compiler runs in processes of its own, at a lower priority than the engine.
Invariant: a machine that cannot compile them serves with Triton's, and says so once.
"""

import logging
import os
import textwrap
import threading
from dataclasses import dataclass, field
from typing import Any, Final

import torch

from .attention import AttentionBackend, AttentionPlan
from .batch import Batch
from .flashinfer_attention import FlashInferPrefill
from .kv_cache import KVCache
from .spec import Spec

NICE: Final = 10
"""What is added to the compiler's niceness."""
NO_ROTATION: Final = 0
"""flashinfer.utils.PosEncodingMode.NONE"""
LONGEST: Final = 400
"""Characters of a reason."""
log = logging.getLogger("actorserve.attention")


def missing_kernels(spec: Spec, kv: torch.dtype, kind: str) -> list[Any]:
    """What FlashInfer would have to compile for prompts of a model with a cache of dtype `kv`: its JitSpecs.

    `kind`: fa2 or fa3. None are missing where FlashInfer, being another version, does not tell.
    """
    try:
        from flashinfer.jit import gen_batch_prefill_module

        capped = spec.attn_softcap is not None
        windows = {window is not None for window in spec.windows or (None,)}
        dims = spec.head_dim, spec.head_dim, NO_ROTATION
        found = [
            gen_batch_prefill_module(kind, kv, kv, kv, torch.int32, *dims, window, capped, False)
            for window in sorted(windows)
        ]
        return [kernels for kernels in found if not kernels.is_compiled]
    except (ImportError, AttributeError, TypeError):
        return []


@dataclass(slots=True)
class TritonMeanwhile:
    """What `flashinfer` leaves decode to does all until `missing` are compiled. The first prompt starts that."""

    flashinfer: FlashInferPrefill
    missing: list[Any]
    """JitSpecs."""
    _thread: threading.Thread | None = None
    _compiled: threading.Event = field(default_factory=threading.Event)

    def plan(self, batch: Batch, kv: KVCache, spec: Spec) -> AttentionPlan:
        """See AttentionBackend."""
        if batch.chunks:
            self.start()
        backend = self.flashinfer if self._compiled.is_set() else self.flashinfer.decode
        return backend.plan(batch, kv, spec)

    def start(self) -> threading.Thread:
        """Begin to compile, once; returns what does it."""
        if self._thread is None:
            log.info("FlashInfer's prefill kernels are being compiled; Triton's serve until then")
            self._thread = threading.Thread(target=self._compile, name="flashinfer-build", daemon=True)
            self._thread.start()
        return self._thread

    def _compile(self) -> None:
        os.nice(NICE)  # of this thread, on Linux, and of the processes that it starts
        try:
            for kernels in self.missing:
                kernels.build(verbose=False)
        except Exception as error:  # whatever a compiler or its absence brings: prompts need not fail for it
            why = textwrap.shorten(str(error) or repr(error), LONGEST)  # it may be all that a compiler said
            log.warning("FlashInfer's prefill kernels cannot be compiled, Triton's stay: %s", why)
            return
        self._compiled.set()
        log.info("FlashInfer's prefill kernels are compiled")


def when_compiled(backend: AttentionBackend) -> AttentionBackend:
    """The backend, once it has the kernels that it wants: for measurements and tests of what these do."""
    if isinstance(backend, TritonMeanwhile):
        backend.start().join()
    return backend
