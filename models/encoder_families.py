"""Encoders of BERT's kind: config.json to Spec. Used by families.py, which has the table.

They are decoders whose tokens see each other both ways, with norms after each sum and learned positions. BERT's tokens
have a type (its segments): those of a pair's second text are of the second.
"""

from typing import TYPE_CHECKING, Any, Final

from .dense_families import act_of, refuse
from .names import Pieces
from .rope_config import Config
from .spec import Norm, Spec

if TYPE_CHECKING:
    from torch import Tensor

FAMILIES: Final = ("bert", "roberta", "xlm-roberta")


def bert(config: Config, **fields: Any) -> Spec:
    """BERT, MiniLM, BGE, E5, GTE and all that say so."""
    refuse(config, position_embedding_type="absolute", is_decoder=False, add_cross_attention=False)
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    values: dict[str, Any] = {
        "vocab": config["vocab_size"],
        "hidden": hidden,
        "layers": config["num_hidden_layers"],
        "heads": heads,
        "kv_heads": heads,
        "head_dim": hidden // heads,
        "inter": config["intermediate_size"],
        "norm": Norm("layer", config.get("layer_norm_eps", 1e-12), bias=True),
        "learned_positions": config.get("max_position_embeddings", 512),
        "token_types": config.get("type_vocab_size", 2),
        "embed_norm": True,
        "qkv_bias": True,
        "o_bias": True,
        "mlp_bias": True,
        "causal": False,
        "act": act_of(config.get("hidden_act") or "gelu"),
        "gated": False,
        "layout": "post_sum",
    }
    return Spec(**(values | fields))


def roberta(config: Config) -> Spec:
    """RoBERTa and XLM-RoBERTa: BERT, whose positions are counted from the one after the padding token's id on."""
    return bert(config, learned_positions=positions_of(config, config.get("max_position_embeddings", 512)))


def positions_of(config: Config, table: int | None) -> int | None:
    """How many tokens a position table of so many rows serves: RoBERTa's begins with rows that none has."""
    if table is None or config.get("model_type") not in ("roberta", "xlm-roberta"):
        return table
    padding = config.get("pad_token_id", 1)
    return table - 1 - int(1 if padding is None else padding)


def from_padding(tensor: "Tensor", spec: Spec) -> Pieces:
    """The rows of the position table that tokens have."""
    yield "embed_positions", tensor[len(tensor) - spec.learned_positions :]
