"""How large the KV pool and the batch are on this machine: computed, unless the config says.

Used by the executor at start: malloc before it loads the weights, the sizes after.
"""

import ctypes
import os
from typing import Final

import torch

from ..config import EngineConfig, ModelInfo
from ..errors import StartupError
from ..models.decoder import Decoder
from ..models.kv_cache import KVCache

FRACTION: Final = {"cpu": 0.25, "cuda": 0.88}
MALLOC: Final = {"M_MMAP_THRESHOLD": (-3, 32 << 20), "M_TRIM_THRESHOLD": (-1, 1 << 30), "M_TOP_PAD": (-2, 64 << 20)}
"""glibc's parameters: (number, bytes); 32 MiB is the most that it takes as a threshold for mmap."""
SLOTS: Final = {"cpu": 64, "cuda": 256}


def keep_freed_memory() -> None:
    """Let glibc's malloc keep what it frees instead of handing it back to the kernel after each step.

    A step on a CPU allocates the same tensors again and again; fresh pages each time cost a tenth of a decode step and
    a quarter of a prefill (measured by perf.cpu). Other C libraries are left as they are.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for parameter, value in MALLOC.values():
            mallopt(parameter, value)


def batch_slots(config: EngineConfig, device: str) -> int:
    """Return how many requests may run at once."""
    return config.max_running_requests or SLOTS[device]


def kv_pages(config: EngineConfig, decoder: Decoder, model: ModelInfo) -> int:
    """Return the number of KV pages: `max_total_tokens`, or what the memory allows and the batch can use.

    Raises:
        StartupError: not even one page fits.
    """
    page_bytes = KVCache.bytes_per_page(decoder.spec, config.page_size, decoder.dtype)
    useful = batch_slots(config, decoder.device.type) * -(-model.context_length // config.page_size)
    if config.max_total_tokens is not None:
        return max(1, -(-config.max_total_tokens // config.page_size))
    pages = min(free_bytes(config, decoder.device) // page_bytes, useful)
    if pages < 1:
        raise StartupError(f"no memory for KV pages on {decoder.device}: raise --mem-fraction-static")
    return int(pages)


def free_bytes(config: EngineConfig, device: torch.device) -> int:
    """Return the bytes that KV pages may take: the static fraction, less what is already in use on a GPU."""
    fraction = config.mem_fraction_static or FRACTION[device.type]
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return int(free - (1 - fraction) * total)
    available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return int(available * fraction)
