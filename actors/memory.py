"""How large the KV pool and the batch are on this machine: computed, unless the config says.

Used by the executor once the weights are loaded. On a GPU the arithmetic is that of models/ledger.py, with what was
measured in the place of estimates: memory in use after the weights are loaded and the sampler is prepared, and the peak
of a forward of the largest batch. What comes later (slot arrays, graphs) is reserved by formula.
"""

import os
from collections.abc import Callable

import torch

from ..config import EngineConfig, ModelInfo
from ..errors import StartupError
from ..models import ledger
from ..models.batch import plain_batch
from ..models.decoder import Decoder
from ..models.floors import GIB
from ..models.kv_cache import KVCache, kv_dtype
from ..models.ledger import FRACTION, SLOTS


def batch_slots(config: EngineConfig, device: str) -> int:
    """Return how many requests may run at once."""
    return config.max_running_requests or SLOTS[device]


def kv_pages(config: EngineConfig, decoder: Decoder, model: ModelInfo) -> int:
    """Return the number of KV pages: `max_total_tokens`, or what the memory allows and the batch can use.

    Raises:
        StartupError: not even one page fits, or on a GPU not what `max_total_tokens` asks for.
    """
    device = decoder.device.type
    page_bytes = KVCache.bytes_per_page(decoder.spec, config.page_size, kv_dtype(config, decoder.dtype))
    useful = batch_slots(config, device) * -(-model.context_length // config.page_size)
    wanted = None if config.max_total_tokens is None else max(1, -(-config.max_total_tokens // config.page_size))
    if wanted is not None and device != "cuda":
        return wanted
    budget = free_bytes(config, decoder, model)
    pages = budget // page_bytes - (ledger.SCRATCH_PAGES if device == "cuda" else 0)
    if pages >= (wanted or 1):
        return min(pages, useful) if wanted is None else wanted
    if device != "cuda":
        raise StartupError(f"no memory for KV pages on {device}: raise --mem-fraction-static")
    lack = ((wanted or 1) + ledger.SCRATCH_PAGES) * page_bytes - budget
    raise StartupError(
        f"{lack / GIB:.2f} GiB are lacking for {'KV pages' if wanted is None else '--max-total-tokens'} on the GPU: "
        "`actorserve plan` with the same flags shows where its memory goes and what helps"
    )


def free_bytes(config: EngineConfig, decoder: Decoder, model: ModelInfo) -> int:
    """Return the bytes that KV pages may take. CPU: the static fraction of free memory. GPU: see models/ledger.py."""
    device = decoder.device
    fraction = config.mem_fraction_static or FRACTION[device.type]
    if device.type != "cuda":
        available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        return int(available * fraction / config.executors)  # they have one memory
    slots = batch_slots(config, device.type)
    dtype = str(decoder.dtype).removeprefix("torch.")
    demand = ledger.demand_of(decoder.whole, config, dtype, model.context_length)
    later = {row.name: row.bytes for row in ledger.estimate(demand)}
    peak = measure_activation_peak(largest_forward(config, decoder, slots), device)
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    static = total - free + later["slot arrays"]  # the sampler's tables are there already
    transient = peak + later["attention workspace"] + later["CUDA graphs"]  # `peak` holds the logits too
    return ledger.kv_budget(total, fraction, static, transient)


def largest_forward(config: EngineConfig, decoder: Decoder, slots: int) -> Callable[[], None]:
    """Return a forward of the largest batch: one chunk in place of all, with the logits of a full batch.

    All its tokens share one KV page, so that it needs no pool; what it computes means nothing.
    """
    tokens = ledger.forward_tokens(config, slots, decoder.device.type)
    if not decoder.spec.causal:
        tokens = max(tokens, config.max_prefill_tokens)  # prompts come whole
    dtype = kv_dtype(config, decoder.dtype)
    kv = KVCache(decoder.spec, 1, config.page_size, decoder.device, dtype, decoder.dtype)
    pages = torch.zeros(-(-tokens // config.page_size), dtype=torch.int32, device=decoder.device)
    batch = plain_batch([0] * tokens, 0, pages, config.page_size)
    batch.logit_rows = torch.arange(min(slots, tokens), device=decoder.device)

    def run() -> None:
        if decoder.spec.lm_head:
            decoder.forward(batch, kv)
        else:
            decoder.hidden(batch, kv)

    return run


def measure_activation_peak(run: Callable[[], None], device: torch.device) -> int:
    """Return the most bytes that `run` made the allocator take from the GPU beyond what it held before.

    That is more than the tensors' sizes: blocks are rounded, and gaps between them cannot be used.

    Raises:
        StartupError: it ran out of memory.
    """
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_reserved(device)
    try:
        run()
        torch.cuda.synchronize(device)
    except torch.OutOfMemoryError:
        raise StartupError(
            "no memory for the largest forward beside the weights: lower --chunked-prefill-size or "
            "--max-running-requests"
        ) from None
    return torch.cuda.max_memory_reserved(device) - before
