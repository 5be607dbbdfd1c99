"""KVCache: the key and value pages of all layers on one device. Written by the decoder, read by attention.

One allocation [layers, slots, 2, kv_heads, head_dim]: a token's key and value lie side by side, so that a layer writes
both with one scatter and gathers both with one read (with latent attention the 2 is a 1: one row is both). Page
numbers come from the scheduler; this class owns memory only.
Invariant: no other tensor views the storage outside `k`, `v` and `rows`, which alias it.
"""

import math
from typing import Final

import numpy as np
import torch
from torch import Tensor

from ..config import EngineConfig
from ..sampler.upload import upload
from .spec import Spec

ALIGNMENT: Final = 64
"""Bytes: a cache line, as torch's own memory has it."""


FLOAT8: Final = (torch.float8_e4m3fn, torch.float8_e5m2)
DTYPES: Final = {
    "bfloat16": torch.bfloat16, "float16": torch.float16,
    "fp8": torch.float8_e4m3fn, "fp8_e4m3": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2,
}  # fmt: skip
"""By `EngineConfig.kv_cache_dtype`."""


def kv_dtype(config: EngineConfig, dtype: torch.dtype) -> torch.dtype:
    """Resolve `EngineConfig.kv_cache_dtype` for a model of `dtype`."""
    return DTYPES.get(config.kv_cache_dtype, dtype)


def saturation(dtype: torch.dtype) -> float | None:
    """Where keys and values of a cache of `dtype` are cut off; None: nowhere. Scales are 1: a float8 number's relative
    precision does not depend on one, and keys and values are far below its limit."""
    return torch.finfo(dtype).max if dtype in FLOAT8 else None


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Like torch.zeros, which on a CPU would write all of it: here memory is taken when a page is first used."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    size = math.prod(shape) * dtype.itemsize
    raw = torch.from_numpy(np.zeros(size + ALIGNMENT, dtype=np.uint8))
    start = -raw.data_ptr() % ALIGNMENT
    return raw[start : start + size].view(dtype).view(shape)


class KVCache:
    """Pages of `page_size` tokens; flat slot = page * page_size + offset."""

    def __init__(
        self,
        spec: Spec,
        num_pages: int,
        page_size: int,
        device: torch.device,
        dtype: torch.dtype,
        read_dtype: torch.dtype | None = None,
    ) -> None:
        """`read_dtype`: what attention computes in, where that is not the pages' own dtype."""
        self.read_dtype = read_dtype or dtype
        self.num_pages = num_pages
        self.page_size = page_size
        shape = (spec.layers, num_pages * page_size, spec.kv_parts, spec.kv_heads, spec.head_dim)
        self.storage = _zeros(shape, dtype, device)
        self.rows: list[Tensor] = list(self.storage.unbind(0))
        """Per layer [slots, kv_parts, kv_heads, head_dim]: key, then value."""
        self.k: list[Tensor] = [rows[:, 0] for rows in self.rows]
        self.v: list[Tensor] = [rows[:, -1] for rows in self.rows]
        """Per layer [slots, kv_heads, head_dim], strided views."""

    @staticmethod
    def bytes_per_page(spec: Spec, page_size: int, dtype: torch.dtype) -> int:
        """Memory of one page over all layers, keys and values."""
        return spec.layers * page_size * spec.kv_parts * spec.kv_heads * spec.head_dim * dtype.itemsize

    def copy_pages(self, copies: np.ndarray) -> None:
        """Copy the first tokens of pages: int32 [n, 3] of (source page, destination page, tokens).

        All sources are read before any destination is written, so a page may be both. Destinations are distinct.
        """
        if len(copies) == 0:
            return
        sources = np.concatenate([s * self.page_size + np.arange(n) for s, _, n in copies.astype(np.int64)])
        targets = np.concatenate([d * self.page_size + np.arange(n) for _, d, n in copies.astype(np.int64)])
        source_slots, target_slots = upload(np.stack([sources, targets]), self.storage.device)
        with torch.inference_mode():
            storage = self.storage.view(torch.uint8) if self.storage.dtype.itemsize == 1 else self.storage
            storage.index_copy_(1, target_slots, storage.index_select(1, source_slots))
