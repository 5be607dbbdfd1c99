"""For tests on GPUs of what FlashInfer's kernels compute."""

from actorserve.models.attention import AttentionBackend
from actorserve.models.flashinfer_build import TritonMeanwhile


def compiled(backend: AttentionBackend) -> AttentionBackend:
    """The backend, once it has the kernels that it wants."""
    if isinstance(backend, TritonMeanwhile):
        backend.start().join()
    return backend
