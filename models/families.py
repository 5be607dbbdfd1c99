"""The families that are served: a table from `model_type` to a reading of config.json and the names of its tensors.

Used by weights.py, plan.py and perf. Adding a family that the decoder can already run is one entry here and a function
in dense_families.py, sparse_families.py or remote_families.py (docs/models.md has an example).
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final

from ..config import Pooling
from ..errors import StartupError
from . import dense_families as dense
from . import encoder_families as encoders
from . import remote_families as remote
from . import sparse_families as sparse
from .names import PLAIN, Names, by_head, gate_up, grouped_qkv, qkv, stacked, transposed
from .rope_config import SERVED, Config
from .spec import Rope, Score, Spec
from .vision_config import is_vision_model, language_config

FUSED: Final = Names(cuts={"qkv_proj": qkv, "gate_up_proj": gate_up})
SANDWICH: Final = Names(
    (
        (r"post_attention_layernorm", "attention_out_norm"),
        (r"pre_feedforward_layernorm", "post_attention_layernorm"),
        (r"post_feedforward_layernorm", "mlp_out_norm"),
    )
)
POST: Final = Names(
    ((r"post_attention_layernorm", "attention_out_norm"), (r"post_feedforward_layernorm", "mlp_out_norm"))
)
GLM4: Final = Names(
    ((r"post_self_attn_layernorm", "attention_out_norm"), (r"post_mlp_layernorm", "mlp_out_norm")), FUSED.cuts
)
W123: Final = (r"\.w1\.", ".gate_proj."), (r"\.w3\.", ".up_proj."), (r"\.w2\.", ".down_proj.")
MIXTRAL: Final = Names(((r"\.block_sparse_moe\.", ".mlp."), *W123))
GROK1: Final = Names(
    (
        (r"\.(block_sparse_moe|moe_block)\.", ".mlp."),
        (r"\.attn\.", ".self_attn."),
        (r"pre_attn_norm", "input_layernorm"),
        (r"post_attn_norm", "attention_out_norm"),
        (r"pre_moe_norm", "post_attention_layernorm"),
        (r"post_moe_norm", "mlp_out_norm"),
        *W123,
        (r"\.linear\.", ".gate_proj."),
        (r"\.linear_v\.", ".up_proj."),
        (r"\.linear_1\.", ".down_proj."),
    )
)
QWEN2_MOE: Final = Names(((r"\.shared_expert\.", ".shared_experts."),))
DEEPSEEK_V3: Final = Names(more_layers=True)
STABLELM: Final = Names(((r"\.([qk])_layernorm\.norms\.", r".\1_norm."),))
COHERE: Final = Names(cuts={"q_norm": by_head("q_norm"), "k_norm": by_head("k_norm")})
TRANSFORMER: Final = (
    (r"^(transformer\.)?wte\.", "model.embed_tokens."),
    (r"^(transformer\.)?ln_f\.", "model.norm."),
    (r"^(transformer\.)?h\.", "model.layers."),
    (r"\.ln_1\.", ".input_layernorm."),
    (r"\.ln_2\.", ".post_attention_layernorm."),
)
GPT2: Final = Names(
    (
        *TRANSFORMER,
        (r"^(transformer\.)?wpe\.", "model.embed_positions."),
        (r"\.attn\.c_attn\.", ".self_attn.qkv."),
        (r"\.attn\.c_proj\.", ".self_attn.out."),
        (r"\.mlp\.c_proj\.", ".mlp.proj."),
    ),
    {
        "qkv": transposed(qkv),
        "out": transposed("o_proj"),
        "c_fc": transposed("up_proj"),
        "proj": transposed("down_proj"),
    },
)
EXAONE: Final = Names(
    (
        *TRANSFORMER,
        (r"\.attn\.attention\.", ".self_attn."),
        (r"\.out_proj\.", ".o_proj."),
        (r"\.c_fc_0\.", ".gate_proj."),
        (r"\.c_fc_1\.", ".up_proj."),
        (r"\.c_proj\.", ".down_proj."),
    )
)
QWEN: Final = Names(
    (
        *TRANSFORMER,
        (r"\.attn\.c_attn\.", ".self_attn.c_attn."),
        (r"\.attn\.c_proj\.", ".self_attn.o_proj."),
        (r"\.mlp\.c_proj\.", ".mlp.down_proj."),
        (r"\.w1\.", ".up_proj."),
        (r"\.w2\.", ".gate_proj."),
    ),
    {"c_attn": qkv},
)
DBRX: Final = Names(
    (
        (r"^transformer\.wte\.", "model.embed_tokens."),
        (r"^transformer\.norm_f\.", "model.norm."),
        (r"^transformer\.blocks\.", "model.layers."),
        (r"\.norm_attn_norm\.norm_1\.", ".input_layernorm."),
        (r"\.norm_attn_norm\.norm_2\.", ".post_attention_layernorm."),
        (r"\.norm_attn_norm\.attn\.", ".self_attn."),
        (r"\.out_proj\.", ".o_proj."),
        (r"\.ffn\.router\.layer\.", ".mlp.gate."),
        (r"\.ffn\.experts\.mlp\.(w1|v1|w2)$", r".mlp.experts.\1.weight"),
    ),
    {"Wqkv": qkv, "w1": stacked("gate_proj"), "v1": stacked("up_proj"), "w2": stacked("down_proj", turned=True)},
)
INTERNLM2: Final = Names(
    (
        (r"tok_embeddings\.", "embed_tokens."),
        (r"^output\.", "lm_head."),
        (r"\.attention\.", ".self_attn."),
        (r"\.wo\.", ".o_proj."),
        (r"\.attention_norm\.", ".input_layernorm."),
        (r"\.ffn_norm\.", ".post_attention_layernorm."),
        (r"\.feed_forward\.", ".mlp."),
        *W123,
    ),
    {"wqkv": grouped_qkv},
)
CHATGLM: Final = Names(
    (
        (r"^transformer\.embedding\.word_embeddings\.", "model.embed_tokens."),
        (r"^transformer\.encoder\.final_layernorm\.", "model.norm."),
        (r"^transformer\.output_layer\.", "lm_head."),
        (r"^transformer\.encoder\.", "model."),
        (r"\.self_attention\.", ".self_attn."),
        (r"\.dense\.", ".o_proj."),
        (r"\.dense_4h_to_h\.", ".down_proj."),
    ),
    {"query_key_value": qkv, "dense_h_to_4h": gate_up},
)
BERT: Final = Names(
    (
        (r"^(bert|roberta)\.", ""),
        (r"\.gamma$", ".weight"),
        (r"\.beta$", ".bias"),
        (r"^embeddings\.word_embeddings\.", "model.embed_tokens."),
        (r"^embeddings\.position_embeddings\.", "model.embed_positions."),
        (r"^embeddings\.token_type_embeddings\.", "model.token_types."),
        (r"^embeddings\.LayerNorm\.", "model.embed_norm."),
        (r"^encoder\.layer\.", "model.layers."),
        (r"\.attention\.self\.query\.", ".self_attn.q_proj."),
        (r"\.attention\.self\.key\.", ".self_attn.k_proj."),
        (r"\.attention\.self\.value\.", ".self_attn.v_proj."),
        (r"\.attention\.output\.dense\.", ".self_attn.o_proj."),
        (r"\.attention\.output\.LayerNorm\.", ".attention_out_norm."),
        (r"\.intermediate\.dense\.", ".mlp.up_proj."),
        (r"\.output\.dense\.", ".mlp.down_proj."),
        (r"\.output\.LayerNorm\.", ".mlp_out_norm."),
        (r"^(pooler|classifier)\.dense\.", "score.dense."),
        (r"^classifier\.(out_proj\.)?", "score.labels."),
    ),
    unused=r"^cls\.|^lm_head\.|^embeddings\.(position_ids|token_type_ids)$",
)
ROBERTA: Final = replace(BERT, cuts={"embed_positions": encoders.from_padding})
BASE: Final = (
    (r"^(?=(embed_tokens|layers|norm)\.)", "model."),
    (r"^score\.(?=weight$|bias$)", "score.labels."),
    (r"^score\.0\.", "score.dense."),
    (r"^score\.2\.", "score.labels."),
)
"""Of models without a language model's head: the bare decoder's names, and those of classification heads."""


LANGUAGE: Final = (
    (r"^(language_model\.model|model\.language_model)\.", "model."),
    (r"^language_model\.lm_head\.", "lm_head."),
)
"""Names of a vision-language model's decoder, as transformers wrote them before and since 4.52."""
BESIDE: Final = r"(model\.)?(vision_tower|multi_modal_projector|image_newline|visual|mm_projector)\b"
"""Names of the rest of it; see vision.py."""


@dataclass(frozen=True, slots=True)
class Family:
    """How models of a `model_type` are read."""

    read: Callable[[Config], Spec]
    names: Names = PLAIN


FAMILIES: Final[dict[str, Family]] = {
    "bert": Family(encoders.bert, BERT),
    "chatglm": Family(remote.chatglm, CHATGLM),
    "cohere": Family(dense.cohere, COHERE),
    "cohere2": Family(dense.cohere2),
    "dbrx": Family(sparse.dbrx, DBRX),
    "deepseek": Family(sparse.deepseek),
    "deepseek_v2": Family(sparse.deepseek_v2),
    "deepseek_v3": Family(sparse.deepseek_v3, DEEPSEEK_V3),
    "exaone": Family(dense.exaone, EXAONE),
    "exaone4": Family(dense.exaone4, POST),
    "gemma": Family(dense.gemma),
    "gemma2": Family(dense.gemma2, SANDWICH),
    "gemma3_text": Family(dense.gemma3, SANDWICH),
    "glm": Family(dense.glm, FUSED),
    "glm4": Family(dense.glm4, GLM4),
    "gpt2": Family(dense.gpt2, GPT2),
    "granite": Family(dense.granite),
    "grok-1": Family(sparse.grok1, GROK1),
    "internlm2": Family(remote.internlm2, INTERNLM2),
    "llama": Family(dense.llama),
    "mistral": Family(dense.mistral),
    "mixtral": Family(sparse.mixtral, MIXTRAL),
    "olmo2": Family(dense.olmo2, POST),
    "olmo3": Family(dense.olmo3, POST),
    "phi3": Family(dense.phi3, FUSED),
    "qwen": Family(remote.qwen, QWEN),
    "qwen2": Family(dense.qwen2),
    "qwen2_moe": Family(sparse.qwen2_moe, QWEN2_MOE),
    "qwen3": Family(dense.qwen3),
    "qwen3_moe": Family(sparse.qwen3_moe),
    "roberta": Family(encoders.roberta, ROBERTA),
    "smollm3": Family(dense.smollm3),
    "stablelm": Family(dense.stablelm, STABLELM),
    "xlm-roberta": Family(encoders.roberta, ROBERTA),
}


def names_of(config: Config, pooled: bool = False) -> Names:
    """How the tensors of a config's checkpoint are named; `spec_of`, or else `pooled_spec`, has taken it."""
    names = FAMILIES[language_config(config)["model_type"]].names
    if is_vision_model(config):
        names = replace(names, rewrites=LANGUAGE + names.rewrites, beside=BESIDE)
    return replace(names, rewrites=(*names.rewrites, *BASE)) if pooled else names


def pooled_spec(config: Config, pooling: Pooling, context_length: int | None = None) -> Spec:
    """Return the Spec of a model that ends in hidden states, or in a classification head. Raises as `spec_of`."""
    score = score_of(config, pooling) if pooling.task == "classify" else None
    return replace(spec_of(config, context_length), causal=pooling.causal, lm_head=False, score=score)


def score_of(config: Config, pooling: Pooling) -> Score:
    """The classification head of a model's architecture: BERT's have a pooler, reward models two maps."""
    if config["model_type"] in encoders.FAMILIES:
        return Score(pooling.width, bias=True, dense="tanh")
    reward = str(config["architectures"][0]).endswith("ForRewardModel")
    return Score(pooling.width, bias=reward, dense="relu" if reward else None)


def spec_of(config: Config, context_length: int | None = None) -> Spec:
    """Return the Spec of a config.json, of a vision-language model's decoder. Raises StartupError for what is not
    served or malformed.

    context_length: the longest context in tokens, where it is not the model's; some ropes depend on it.
    """
    config = language_config(config)
    if context_length is not None:
        config = config | {SERVED: context_length}
    model_type = config.get("model_type")
    family = FAMILIES.get(model_type) if isinstance(model_type, str) else None
    if family is None:
        raise StartupError(f"model_type {model_type!r} is not served yet; served: {', '.join(sorted(FAMILIES))}")
    try:
        spec = family.read(config)
        if config.get("is_causal") is False:
            spec = replace(spec, causal=False)
        _check_shape(spec)
    except KeyError as error:
        raise StartupError(f"config.json lacks {error.args[0]!r}, which model_type {model_type!r} needs") from None
    except (TypeError, ValueError, ArithmeticError, AttributeError) as error:
        raise StartupError(f"config.json holds a value that makes no sense: {error}") from None
    return spec


def _check_shape(spec: Spec) -> None:
    """Refuse widths that do not fit together."""
    moe, mla = spec.moe, spec.mla
    sizes = [spec.vocab, spec.hidden, spec.layers, spec.heads, spec.kv_heads, spec.head_dim, spec.inter]
    sizes += [] if moe is None else [moe.experts, moe.top_k, moe.inter, moe.groups, moe.top_groups]
    sizes += [] if mla is None else [mla.kv_rank, mla.nope, mla.rope, mla.v]
    if not all(isinstance(size, int) and size > 0 for size in sizes):
        raise StartupError("config.json: every size must be a positive integer")
    if spec.heads % spec.kv_heads:
        raise StartupError(f"config.json: {spec.heads} attention heads cannot share {spec.kv_heads} KV heads")
    if moe is not None and (moe.experts % moe.groups or moe.top_k > moe.experts // moe.groups * moe.top_groups):
        raise StartupError(f"config.json: {moe.top_k} of {moe.experts} experts in {moe.groups} groups cannot be chosen")
    for rope in (spec.rope, spec.local_rope):
        if rope is not None:
            _check_rope(rope, spec.head_dim)
    for name, per_layer in (("layer_types", spec.windows), ("no_rope_layers", spec.nope_layers)):
        if per_layer and len(per_layer) != spec.layers:
            raise StartupError(f"config.json: {name} has {len(per_layer)} entries for {spec.layers} layers")


def _check_rope(rope: Rope, head_dim: int) -> None:
    """Refuse a rope that does not turn whole pairs of a head's elements, each by its own factor."""
    if rope.dim % 2 or not 0 < rope.dim <= head_dim:
        raise StartupError(f"config.json: {rope.dim} of a head's {head_dim} elements cannot be rotated in pairs")
    if rope.scaling is not None and rope.scaling.kind == "longrope" and 2 * len(rope.scaling.factors) != rope.dim:
        raise StartupError(f"config.json: longrope has {len(rope.scaling.factors)} factors for {rope.dim // 2} pairs")
