"""The memory ledger of one GPU: what weights, batch and buffers take, and how many KV pages are left for.

Pure arithmetic over a Spec, no torch: `actorserve plan` prints it, actors/memory.py puts measured numbers in the place
of estimated ones. Memory is of three kinds:
  static     there from start to end: CUDA context, weights, sampler tables, slot arrays, and the KV pages
  transient  comes and goes with a forward, or lies in the pools of its CUDA graphs: activations, logits, workspaces
  free       what is left
`--mem-fraction-static` f, as in SGLang, bounds the static part: KV = f * total - other static. The rest, (1 - f) *
total, is for the transient part; where that needs more than the rest, the KV pages shrink so that both fit.
Invariant: the rows of a Ledger add up to its total.
"""

from dataclasses import dataclass
from typing import Final, Literal

from ..config import EngineConfig
from .quantization import ONLINE, Quantization, Scheme
from .shard import sharded
from .spec import Spec

MIB: Final = 1 << 20
ITEMSIZE: Final = {"bfloat16": 2, "float16": 2, "float32": 4, "fp8": 1, "fp8_e4m3": 1, "fp8_e5m2": 1}
FRACTION: Final = {"cpu": 0.25, "cuda": 0.88}
"""Default of --mem-fraction-static."""
SLOTS: Final = {"cpu": 64, "cuda": 256}
"""Default of --max-running-requests."""
CHUNK: Final = {"cpu": 256, "cuda": 8448}
"""Default of --chunked-prefill-size.

66 tiles of 128 rows keep the 132 multiprocessors of an H100 or H200 busy to the end of each product of Qwen2-7B; with
64 tiles down, o and QKV leave 3 % of them idle. An H200 at its limit of power then multiplies 1.0 to 3.1 % faster, and
prefills .6 % faster.
"""
LADDER: Final = (1, 2, 4, 8, 16, 24, 32, 48, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384, 448, 512)
"""Batch sizes with a CUDA graph of their own."""
MIXED_ROWS: Final = (8, 32, 64, 128, 256)
MIXED_TOKENS: Final = (32, 128, 256)
"""Rows and chunk tokens of the graphs for decode rows beside a chunk: jumps, short prompts, a full `mixed_chunk`."""

SCRATCH_PAGES: Final = 1
"""Pages beside those of requests: padding rows write there."""
CONTEXT_BYTES: Final = 768 * MIB
"""CUDA context, loaded kernels, cuBLAS workspace."""
GROUP_BYTES: Final = 512 * MIB
"""What NCCL keeps for its connections to other ranks."""
WORKSPACE_BYTES: Final = 256 * MIB
"""Attention: FlashInfer's float and integer workspaces, partial results of split-KV decode."""
GRAPH_NODE_BYTES: Final = 32 << 10
"""What the driver keeps per kernel of an instantiated graph."""
KERNELS_PER_LAYER: Final = 9
SLACK: Final = 1.1
"""The allocator rounds blocks up and leaves gaps between them."""

Kind = Literal["static", "transient", "free"]


def parameters(spec: Spec) -> int:
    """Number of weights that `places.allocate` makes."""
    h = spec.hidden
    norm = h * (2 if spec.norm.bias else 1)
    norms = {"pre": 2, "parallel": 1, "sandwich": 4, "post": 2, "post_sum": 2}[spec.layout] * spec.layers
    norms += (spec.layout != "post_sum") + spec.embed_norm
    heads = 1 if spec.lm_head and not spec.tied else 0
    tables = (spec.vocab * (1 + heads) + spec.learned_positions + spec.token_types) * h
    mlps = sum(_experts(spec) if spec.sparse(i) else _mlp(spec, spec.inter) for i in range(spec.layers))
    return tables + norms * norm + spec.layers * _attention(spec) + mlps + _score(spec)


def _score(spec: Spec) -> int:
    h, score = spec.hidden, spec.score
    if score is None:
        return 0
    return score.labels * (h + score.bias) + (h * (h + 1) if score.dense is not None else 0)


def _attention(spec: Spec) -> int:
    h, mla, heads = spec.hidden, spec.mla, spec.heads
    if mla is not None:
        q = heads * (mla.nope + mla.rope)
        queries = h * q if mla.q_rank is None else mla.q_rank * (h + 1 + q)
        latent = h * (mla.kv_rank + mla.rope) + mla.kv_rank + heads * (mla.nope + mla.v) * mla.kv_rank
        return queries + latent + (heads * mla.v + spec.o_bias) * h
    q, kv = heads * spec.head_dim, spec.kv_heads * spec.head_dim
    qk_norm = q + kv if spec.qk_norm is not None else 0
    return (h + spec.qkv_bias) * (q + 2 * kv) + (q + spec.o_bias) * h + qk_norm


def _mlp(spec: Spec, inter: int) -> int:
    up = 2 if spec.gated else 1
    return (up + 1) * spec.hidden * inter + (up * inter + spec.hidden) * spec.mlp_bias


def _experts(spec: Spec) -> int:
    moe, h = spec.moe, spec.hidden
    assert moe is not None
    shared = _mlp(spec, moe.shared_inter) if moe.shared_inter else 0
    return moe.experts * (3 * h * moe.inter + h + moe.score_bias) + shared + h * moe.shared_gate


def linear_parameters(spec: Spec) -> tuple[int, int]:
    """(weights of the layers' linear maps, which are quantized if any are, their outputs).

    Experts are not among them, nor what latent attention makes keys and values with: they are dequantised.
    """
    h, mla, heads = spec.hidden, spec.mla, spec.heads
    if mla is None:
        q, kv = heads * spec.head_dim, spec.kv_heads * spec.head_dim
        attention = [(h, q + 2 * kv), (q, h)]
    else:
        q = heads * (mla.nope + mla.rope)
        attention = [(h, (q if mla.q_rank is None else mla.q_rank) + mla.kv_rank + mla.rope), (heads * mla.v, h)]
        attention += [] if mla.q_rank is None else [(mla.q_rank, q)]
    maps = attention * spec.layers
    for layer in range(spec.layers):
        inter = spec.inter
        if spec.sparse(layer):
            assert spec.moe is not None
            inter = spec.moe.shared_inter
        maps += [(h, inter * (2 if spec.gated else 1)), (inter, h)] if inter else []
    return sum(inputs * outputs for inputs, outputs in maps), sum(outputs for _, outputs in maps)


def weight_bytes(spec: Spec, itemsize: int, scheme: Scheme | None = None) -> int:
    """Memory of the weights, linear maps as `scheme` has them."""
    if scheme is None:
        return parameters(spec) * itemsize
    weights, outputs = linear_parameters(spec)
    return (parameters(spec) - weights) * itemsize + int(scheme.bytes_of(weights, outputs))


def quantized_bytes(spec: Spec, scheme: Scheme | None) -> float | None:
    """Bytes of a weight of a linear map, its share of scales and zero points in it; None: they are not quantized."""
    if scheme is None:
        return None
    weights, outputs = linear_parameters(spec)
    return scheme.bytes_of(weights, outputs) / weights


def scheme_of(config: EngineConfig, quantization: Quantization | None) -> Scheme | None:
    """How a GPU holds the linear maps of a checkpoint with these rules; None: as they are, or dequantised."""
    if config.quantization in ONLINE:
        return ONLINE[config.quantization]
    return quantization.usual if quantization is not None and config.quantization == "auto" else None


def keeps_bfloat16(spec: Spec, config: EngineConfig, is_float32: bool, quantization: Quantization | None) -> bool:
    """Whether a GPU leaves a checkpoint's bfloat16 weights as they are beneath hidden states in float32
    (split_linear.py); what torch.compile makes has no such products."""
    dense = spec.moe is None and quantization is None and config.quantization not in ONLINE
    return is_float32 and dense and not config.enable_torch_compile


def scratch_bytes(spec: Spec, itemsize: int, scheme: Scheme | None) -> int:
    """The buffer into which whole numbers are unpacked for many rows: the largest linear map."""
    if scheme is None or scheme.is_float:
        return 0
    return (2 if spec.gated else 1) * spec.inter * spec.hidden * itemsize


def page_bytes(spec: Spec, page_size: int, itemsize: int) -> int:
    """Memory of one KV page over all layers, keys and values."""
    return spec.layers * page_size * spec.kv_parts * spec.kv_heads * spec.head_dim * itemsize


def activation_bytes(spec: Spec, tokens: int, itemsize: int) -> int:
    """Peak of a forward of `tokens`, its logits aside.

    The residual stream and its normed copy live throughout; beside them either the MLP's gate, up and their product,
    or queries, keys, values and the heads' outputs.
    """
    q, kv = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
    mlp = 3 * spec.inter
    if spec.moe is not None:  # sorted tokens, gate and up, their product, results in float32, twice
        mlp = max(mlp, spec.moe.top_k * (3 * spec.moe.inter + 5 * spec.hidden) + 3 * spec.moe.shared_inter)
    widest = max(mlp, 2 * q + 2 * kv + spec.hidden)
    return int(tokens * (2 * spec.hidden + widest) * itemsize * SLACK)


def logit_bytes(vocab: int, rows: int) -> int:
    """Logits float32 [rows, vocab]."""
    return 4 * rows * vocab


def sampler_bytes(vocab: int, slots: int) -> int:
    """The sampler's tables per slot: token counts int16 [slots, vocab], a bitmask of the vocabulary, small rows."""
    return slots * (2 * vocab + 4 * -(-vocab // 32) + 4096)


def slot_bytes(slots: int, pages_per_slot: int) -> int:
    """The batch's arrays: page tables int32 [slots, pages] and four numbers a slot."""
    return 4 * slots * (pages_per_slot + 4)


def ladder(largest: int) -> list[int]:
    """Return the batch sizes to capture, rising, the last being `largest`."""
    return [b for b in LADDER if b < largest] + [largest]


def mixed_ladder(largest: int) -> list[tuple[int, int]]:
    """Return the (rows, chunk tokens) to capture for steps with chunks, each before those that hold more."""
    rows = [b for b in MIXED_ROWS if b < largest] + [largest]
    return [(b, tokens) for b in rows for tokens in sorted({*MIXED_TOKENS, mixed_chunk(b)})]


def mixed_chunk(rows: int) -> int:
    """Prompt tokens beside so many decode rows on a GPU where few wait, unless --chunked-prefill-size is given.

    The decode rows wait for the chunk, so that a stream's tokens should come at most twice as far apart while others
    join. With 256 tokens of a 7B model an H200 takes 1.83 times as long for a step of 128 rows, with 384 up to 2.02
    times. More rows have longer steps themselves: more tokens then cost them as little. Beside a chunk the rows' own
    GEMMs are nearly free (Agrawal et al., "Sarathi-Serve", 2024).
    """
    return 256 if rows <= 192 else 384


def graph_bytes(spec: Spec, rows: int, itemsize: int, graphs: int) -> int:
    """CUDA graphs: one pool for the largest step, and what the driver keeps for each graph."""
    if not graphs:
        return 0
    nodes = KERNELS_PER_LAYER * spec.layers + 12
    return activation_bytes(spec, rows + mixed_chunk(rows), itemsize) + graphs * nodes * GRAPH_NODE_BYTES


def kv_budget(total: int, fraction: float, static: int, transient: int) -> int:
    """Bytes for KV pages on a device of `total` bytes (module text); negative: so many bytes are lacking.

    static: bytes in use for good, other processes' included. transient: the most that forwards and graphs take.
    """
    return min(int(fraction * total) - static, total - static - transient)


def forward_tokens(config: EngineConfig, slots: int, device: str = "cuda") -> int:
    """Tokens of the largest forward: a chunk of prompts, and a decode row of every slot."""
    chunk = CHUNK[device] if config.chunked_prefill_size is None else config.chunked_prefill_size
    return (chunk if chunk > 0 else config.max_prefill_tokens) + slots


@dataclass(frozen=True, slots=True)
class Demand:
    """What is to run on one GPU; sizes are of one rank."""

    spec: Spec
    """As sharded: what this GPU holds."""
    vocab: int
    """Of the whole model: logits are drawn from all of it. 1 for a model without."""
    weight_itemsize: int
    itemsize: int
    """Bytes of an activation."""
    kv_itemsize: int
    page_size: int
    slots: int
    """Requests that run at once."""
    forward_tokens: int
    context_length: int
    graphs: int
    """CUDA graphs that are kept; 0: none."""
    scheme: Scheme | None = None
    """How linear maps are quantized."""
    shared: bool = False
    """Other ranks have the rest of the model."""

    @property
    def page_bytes(self) -> int:
        return page_bytes(self.spec, self.page_size, self.kv_itemsize)

    @property
    def pages_per_request(self) -> int:
        """Pages of a request that fills the context."""
        return -(-self.context_length // self.page_size)


def demand_of(
    spec: Spec,
    config: EngineConfig,
    dtype: str,
    context_length: int,
    quantization: Quantization | None = None,
    own: str | None = None,
) -> Demand:
    """What `config` asks of each GPU, in the model's resolved `dtype`; own: the checkpoint's.

    Raises StartupError for a bad --tp-size.
    """
    slots = config.max_running_requests or SLOTS["cuda"]
    largest_graph = (
        0 if config.disable_cuda_graph or not spec.lm_head else min(slots, config.cuda_graph_max_bs or slots)
    )
    kv = dtype if config.kv_cache_dtype == "auto" else config.kv_cache_dtype
    stays = own == "bfloat16" and keeps_bfloat16(spec, config, dtype == "float32", quantization)
    return Demand(
        spec=sharded(spec, config.tp_size),
        vocab=spec.vocab if spec.lm_head else 1,
        weight_itemsize=ITEMSIZE["bfloat16" if stays else dtype],
        itemsize=ITEMSIZE[dtype],
        kv_itemsize=ITEMSIZE[kv],
        page_size=config.page_size,
        slots=slots,
        forward_tokens=forward_tokens(config, slots),
        context_length=context_length,
        graphs=len(ladder(largest_graph)) + len(mixed_ladder(largest_graph)) if largest_graph else 0,
        scheme=scheme_of(config, quantization),
        shared=config.tp_size > 1,
    )


@dataclass(frozen=True, slots=True)
class Row:
    """A line of the ledger."""

    name: str
    bytes: int
    kind: Kind
    note: str = ""


@dataclass(frozen=True, slots=True)
class Ledger:
    """All memory of one GPU."""

    total: int
    rows: list[Row]
    demand: Demand
    pages: int
    """KV pages that requests can use."""
    missing: int
    """Bytes that lack for a page, or for --max-total-tokens; 0: it fits."""
    limited_by: Literal["memory", "requests", "setting"]
    """Why there are no more pages: memory, all slots at full context, or --max-total-tokens."""

    @property
    def fits(self) -> bool:
        return not self.missing

    @property
    def tokens(self) -> int:
        return self.pages * self.demand.page_size

    def requests_at(self, length: int) -> int:
        """How many requests of `length` tokens, prompt and output, have room at once."""
        return self.pages // -(-length // self.demand.page_size)


def estimate(demand: Demand) -> list[Row]:
    """The rows of a demand without its KV pages, by formula."""
    spec = demand.spec
    weights, scheme = parameters(spec), demand.scheme
    note = f"{weights:,} of {demand.weight_itemsize} bytes"
    if scheme is not None:
        of_maps = linear_parameters(spec)[0]
        note = f"{weights:,}, {of_maps:,} of them of {scheme.bits} bits and scales"
    scratch = scratch_bytes(spec, demand.itemsize, scheme)
    arrays = slot_bytes(demand.slots + 1, demand.pages_per_request)
    kernels = graph_bytes(spec, demand.slots, demand.itemsize, demand.graphs)
    libraries = CONTEXT_BYTES + GROUP_BYTES * demand.shared
    logits = logit_bytes(demand.vocab, demand.slots)
    if demand.shared and spec.lm_head:  # a rank's own, then all of them as they come, then in order
        logits = 2 * logits + logit_bytes(spec.vocab, demand.slots)
    return [
        Row("CUDA context, libraries", libraries, "static", "reserve"),
        Row("weights", weight_bytes(spec, demand.weight_itemsize, scheme), "static", note),
        *([Row("unpacking buffer", scratch, "static", "the largest map of 16 bits")] if scratch else []),
        Row("sampler tables", sampler_bytes(demand.vocab, demand.slots + 1), "static", "counts and masks per slot"),
        Row("slot arrays", arrays, "static", f"page tables of {demand.slots:,} slots"),
        Row(
            "activations",
            activation_bytes(spec, demand.forward_tokens, demand.itemsize),
            "transient",
            f"one forward of {demand.forward_tokens:,} tokens",
        ),
        Row(
            "logits",
            logits,
            "transient",
            f"float32 [{demand.slots:,}, {demand.vocab:,}]",
        ),
        Row("attention workspace", WORKSPACE_BYTES, "transient", "reserve"),
        Row("CUDA graphs", kernels, "transient", f"{demand.graphs} sizes" if demand.graphs else "off"),
    ]


def balance(total: int, fraction: float, demand: Demand, max_total_tokens: int | None = None) -> Ledger:
    """The ledger of a demand on a GPU of `total` bytes."""
    rows = estimate(demand)
    static = sum(row.bytes for row in rows if row.kind == "static")
    transient = sum(row.bytes for row in rows if row.kind == "transient")
    budget = kv_budget(total, fraction, static, transient)
    most = budget // demand.page_bytes - SCRATCH_PAGES
    useful = demand.slots * demand.pages_per_request
    wanted = None if max_total_tokens is None else -(-max_total_tokens // demand.page_size)
    pages = max(0, min(most, useful if wanted is None else wanted))
    missing = max(0, ((wanted or 1) + SCRATCH_PAGES) * demand.page_bytes - budget)
    limit: Literal["memory", "requests", "setting"] = "memory"
    if pages < most:
        limit = "requests" if wanted is None else "setting"
    kv = (pages + SCRATCH_PAGES) * demand.page_bytes
    note = f"{pages:,} of {demand.page_size} tokens"
    at = sum(row.kind == "static" for row in rows)
    rows.insert(at, Row("KV pages", kv, "static", note))
    rows.append(Row("left", total - static - transient - kv, "free"))
    return Ledger(total, rows, demand, pages, missing, limit)
