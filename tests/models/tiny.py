"""Tiny random models of every served family, made by transformers, and a driver for our decoder over paged KV.

Used by the tests of models/. Sizes are small, weights large (logits with a deviation of 1 and more), norms and biases
random: a field of the Spec that is ignored must show.
"""

import copy
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from actorserve.config import EngineConfig
from actorserve.models.batch import Batch, Chunk
from actorserve.models.decoder import Decoder
from actorserve.models.kv_cache import KVCache
from actorserve.models.weights import load_decoder

PAGE = 16
VOCAB = 200
COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "intermediate_size": 80,
    "max_position_embeddings": 512,
    "initializer_range": 0.15,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.1],
    "long_factor": [1.5, 6.0],
    "original_max_position_embeddings": 2,
    "attention_factor": 1.2,
    "partial_rotary_factor": 0.5,
}
GEMMA = {"head_dim": 16, "sliding_window": 9, "query_pre_attn_scalar": 30}
GEMMA3_ROPE = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 100000.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
}
OLMO3_ROPE = {"full_attention": YARN, "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0}}
GPT2 = {"n_embd": 48, "n_layer": 3, "n_head": 6, "n_inner": 80, "n_positions": 512}
MOE = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
DBRX = {
    "d_model": 48,
    "n_heads": 6,
    "n_layers": 3,
    "max_seq_len": 512,
    "attn_config": {"kv_n_heads": 2, "clip_qkv": 0.7, "rope_theta": 10000.0},
    "ffn_config": {"ffn_hidden_size": 40, "moe_num_experts": 8, "moe_top_k": 3, "hidden_size": 48},
}
LATENT = {
    "num_key_value_heads": 6,
    "q_lora_rank": 24,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "n_shared_experts": 2,
    "moe_intermediate_size": 24,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 1.7,
}
GROUPS = {"n_group": 4, "topk_group": 2}
MSCALE = {"mscale": 0.7, "mscale_all_dim": 0.9}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 100000.0}}),
    "llama-tied": ("Llama", {"tie_word_embeddings": True, "rms_norm_eps": 1e-3}),
    "llama-biases": ("Llama", {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 6}),
    "llama-3.1": ("Llama", {"rope_parameters": LLAMA3, "num_key_value_heads": 1}),
    "llama-yarn": ("Llama", {"rope_parameters": YARN}),
    "llama-gelu": ("Llama", {"hidden_act": "gelu_pytorch_tanh"}),
    "mistral": ("Mistral", {"sliding_window": 20}),
    "mistral-nemo": ("Mistral", {"sliding_window": None, "head_dim": 16}),
    "qwen2": ("Qwen2", {}),
    "qwen2-windows": ("Qwen2", {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1}),
    "qwen3": ("Qwen3", {"head_dim": 16}),
    "granite": (
        "Granite",
        {
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.6,
            "attention_multiplier": 0.2,
            "logits_scaling": 0.5,
        },
    ),
    "smollm3": ("SmolLM3", {"no_rope_layers": [1, 0, 1]}),
    "gemma": ("Gemma", {"head_dim": 16, "num_key_value_heads": 1}),
    "gemma2": ("Gemma2", GEMMA | {"attn_logit_softcapping": 5.0, "final_logit_softcapping": 2.0}),
    "gemma3": ("Gemma3Text", GEMMA | {"num_hidden_layers": 6, "rope_parameters": GEMMA3_ROPE}),
    "stablelm": ("StableLm", {"use_qkv_bias": True, "head_dim": 8, "partial_rotary_factor": 0.5}),
    "stablelm-12b": ("StableLm", {"use_parallel_residual": True, "qk_layernorm": True, "partial_rotary_factor": 0.5}),
    "cohere": ("Cohere", {"logit_scale": 0.5, "layer_norm_eps": 1e-3}),
    "cohere-plus": ("Cohere", {"logit_scale": 0.5, "use_qk_norm": True}),
    "cohere2": ("Cohere2", {"logit_scale": 0.5, "num_hidden_layers": 4, "sliding_window": 9}),
    "glm": ("Glm", {"head_dim": 16}),
    "glm4": ("Glm4", {"head_dim": 16}),
    "phi3": ("Phi3", {"sliding_window": 20, "partial_rotary_factor": 0.5}),
    "phi3-longrope": ("Phi3", {"rope_parameters": LONGROPE, "original_max_position_embeddings": 2}),
    "gpt2": ("GPT2", GPT2),
    "olmo2": ("Olmo2", {}),
    "olmo3": ("Olmo3", {"num_hidden_layers": 4, "sliding_window": 9, "rope_parameters": OLMO3_ROPE}),
    "exaone-native": ("Exaone", {"rope_parameters": LLAMA3}),
    "exaone4": ("Exaone4", {"num_hidden_layers": 4, "sliding_window": 9}),
    "mixtral": ("Mixtral", {"sliding_window": None, "num_local_experts": 4}),
    "qwen2-moe": ("Qwen2Moe", MOE | {"shared_expert_intermediate_size": 40, "mlp_only_layers": [1]}),
    "qwen3-moe": ("Qwen3Moe", MOE | {"head_dim": 16, "norm_topk_prob": True}),
    "dbrx": ("Dbrx", DBRX),
    "deepseek-v2-lite": ("DeepseekV2", LATENT | {"q_lora_rank": None, "topk_method": "greedy"}),
    "deepseek-v2": (
        "DeepseekV2",
        LATENT | GROUPS | {"topk_method": "group_limited_greedy", "rope_parameters": YARN | MSCALE},
    ),
    "deepseek-v3": ("DeepseekV3", LATENT | GROUPS | {"rope_parameters": YARN | MSCALE}),
}


def build(name: str, seed: int = 0, **changed: Any) -> Any:
    """Return the tiny transformers model of an entry of FAMILIES, float32 with eager attention, some fields changed."""
    kind, fields = FAMILIES[name]
    torch.manual_seed(seed)
    if not hasattr(transformers, f"{kind}Config"):
        pytest.skip(f"transformers {transformers.__version__} has no {kind}")
    config = getattr(transformers, f"{kind}Config")(**(COMMON | fields | changed))
    config._attn_implementation = "eager"
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


def save(model: Any, folder: Path, **options: Any) -> str:
    """Write a model as a Hugging Face folder and return its path."""
    model.save_pretrained(folder, **options)
    return str(folder)


def edit_config(folder: str, **fields: Any) -> None:
    """Change fields of a saved config.json."""
    path = Path(folder) / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def load(folder: str, **fields: Any) -> Decoder:
    """Load a folder with our loader, float32 on the CPU unless told otherwise."""
    settings = {"dtype": "float32", "device": "cpu"} | fields
    return load_decoder(folder, EngineConfig(**settings), lambda fraction: None)


@dataclass
class Request:
    """One sequence and its pages; the first `done` tokens have KV; ends at `goal` tokens."""

    ids: list[int]
    pages: Tensor
    done: int
    goal: int


@dataclass
class Driver:
    """Runs mixed batches of requests the way the executor does."""

    decoder: Decoder
    kv: KVCache
    free: list[int]

    @classmethod
    def of(cls, decoder: Decoder, num_pages: int = 64, seed: int = 0, kv: torch.dtype | None = None) -> "Driver":
        """A driver whose pages, of dtype `kv`, are handed out in random order and hold NaN until written."""
        cache = KVCache(decoder.spec, num_pages, PAGE, decoder.device, kv or decoder.dtype, decoder.dtype)
        cache.storage.fill_(float("nan"))
        order = torch.randperm(num_pages, generator=torch.Generator().manual_seed(seed))
        return cls(decoder, cache, order.tolist())

    def request(self, ids: list[int], room: int = 0, shared: "Request | None" = None, pages: int = 0) -> Request:
        """Seat a sequence with room for `room` more tokens, its first `pages` pages being those of `shared`."""
        need = -(-(len(ids) + room) // PAGE) - pages
        own = torch.tensor([self.free.pop() for _ in range(need)], dtype=torch.int32)
        head = shared.pages[:pages] if shared is not None else own[:0]
        return Request(list(ids), torch.cat((head, own)), pages * PAGE, len(ids) + room)

    def forward(self, work: list[tuple[Request, int]], logit_rows: Tensor | None = None) -> Tensor:
        """Run the next n tokens of each request; entries with n == 1 and something before it are decode rows."""
        return self.decoder.forward(self.batch(work, logit_rows), self.kv)

    def batch(self, work: list[tuple[Request, int]], logit_rows: Tensor | None = None) -> Batch:
        """The batch of `forward`, on the decoder's device; the requests count its tokens as done."""
        device = self.decoder.device
        decoding = [r for r, n in work if n == 1 and r.done]
        chunked = [(r, n) for r, n in work if not (n == 1 and r.done)]
        spans = [(r, r.done, r.done + 1) for r in decoding] + [(r, r.done, r.done + n) for r, n in chunked]
        width = max((len(r.pages) for r in decoding), default=1)
        tables = torch.zeros(len(decoding), width, dtype=torch.int32)
        for row, request in enumerate(decoding):
            tables[row, : len(request.pages)] = request.pages
        positions = torch.cat([torch.arange(a, b) for _, a, b in spans])
        slots = torch.cat([r.pages[(p := torch.arange(a, b)) // PAGE].long() * PAGE + p % PAGE for r, a, b in spans])
        lengths = torch.tensor([r.done + 1 for r in decoding], dtype=torch.int32)
        for request, _, end in spans:
            request.done = end
        return Batch(
            ids=torch.tensor([token for r, a, b in spans for token in r.ids[a:b]], device=device),
            positions=positions.to(device),
            kv_slots=slots.to(device),
            decode_tables=tables.to(device),
            decode_lengths=lengths.to(device),
            max_decode_length=int(lengths.max()) if decoding else 0,
            logit_rows=logit_rows,
            chunks=[Chunk(a, b - a, r.pages.to(device)) for r, a, b in spans[len(decoding) :]],
        )

    def logits(self, ids: list[int], sizes: list[int]) -> Tensor:
        """All logits [len(ids), vocab] of one sequence computed in chunks of these sizes."""
        request = self.request(ids)
        return torch.cat([self.forward([(request, size)]) for size in sizes])


def prompt(length: int, seed: int = 1) -> list[int]:
    """Random token ids."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCAB, (length,), generator=generator).tolist()


@torch.no_grad()
def reference_logits(model: Any, ids: list[int]) -> Tensor:
    """Logits [len(ids), vocab] of transformers."""
    logits: Tensor = model(torch.tensor([ids])).logits[0]
    return logits


def exact_logits(model: Any, ids: list[int]) -> Tensor:
    """The same by a copy in float64, rounded to float32 at the end: what ours are off by is our own rounding alone."""
    model = copy.deepcopy(model).double()
    model.set_experts_implementation("eager")  # torch's grouped GEMM has no float64
    return reference_logits(model, ids).float()
