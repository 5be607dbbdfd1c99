"""config.json -> Spec: defaults, both styles of rope settings, windows, and what is refused."""

import inspect
import math
import textwrap
from pathlib import Path
from typing import Any

import pytest
import tiny
import transformers
from repacked import REPACKED

from actorserve.errors import StartupError
from actorserve.models import dense_families, encoder_families
from actorserve.models.families import FAMILIES, spec_of

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 100,
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
}
LONG = {"type": "longrope", "original_max_position_embeddings": 32, "long_factor": [2.0] * 3, "short_factor": [1.0] * 3}


def test_defaults_are_those_of_transformers() -> None:
    spec = spec_of(LLAMA)
    assert (spec.head_dim, spec.group, spec.attention_scale) == (8, 4, 8**-0.5)
    assert spec.rope is not None and (spec.rope.theta, spec.rope.dim, spec.rope.scaling) == (10000.0, 8, None)
    assert (spec.norm.eps, spec.tied, spec.act, spec.qkv_bias, spec.windows) == (1e-6, False, "silu", False, ())
    assert spec_of({key: value for key, value in LLAMA.items() if key != "num_key_value_heads"}).kv_heads == 8


UNSAID = sorted({kind for kind, _ in tiny.FAMILIES.values()} - {"GPT2", "Exaone", "DeepseekV2", "Cohere"})
"""Families whose default configuration has a rope that is always the same: Cohere's was another before 5."""


@pytest.mark.parametrize("name", UNSAID)
def test_the_rope_that_a_config_does_not_tell(name: str) -> None:
    """It is transformers' own, whose value differs between families."""
    if not hasattr(transformers, f"{name}Config"):
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    config = getattr(transformers, f"{name}Config")().to_dict()
    told, silent = spec_of(config), spec_of({key: config[key] for key in config if key != "rope_parameters"})
    assert (silent.rope, silent.local_rope) == (told.rope, told.local_rope)


def test_windows() -> None:
    assert spec_of(LLAMA | {"model_type": "mistral"}).windows == (4096,) * 4
    assert spec_of(LLAMA | {"model_type": "mistral", "sliding_window": None}).windows == ()
    qwen = LLAMA | {"model_type": "qwen2", "sliding_window": 9}
    assert spec_of(qwen).windows == ()
    assert spec_of(qwen | {"use_sliding_window": True, "max_window_layers": 3}).windows == (None, None, None, 9)
    assert spec_of(qwen | {"use_sliding_window": True}).windows == ()


def test_smollm3_drops_rope_on_every_fourth_layer() -> None:
    spec = spec_of(LLAMA | {"model_type": "smollm3"})
    assert spec.nope_layers == (False, False, False, True)
    assert [spec.rotates(i) for i in range(4)] == [True, True, True, False]
    assert spec.tied and spec.rope is not None and spec.rope.theta == 2000000.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "mamba"}, "mamba.*served: bert, chatglm, cohere"),
        ({"model_type": None}, "not served yet"),
        ({"model_type": ["llama"]}, "not served yet"),
        ({"hidden_act": "relu"}, "relu"),
        ({"rope_scaling": {"type": "longrope", "factor": 2.0}}, "lacks 'original_max_position_embeddings'"),
        ({"rope_scaling": {"type": "spiral", "factor": 2.0}}, "rope type 'spiral'"),
        ({"rope_scaling": {"type": "dynamic", "alpha": 1000.0}}, "alpha"),
        ({"rope_scaling": {"type": "linear"}}, "lacks 'factor'"),
        ({"rope_theta": 10**400}, "makes no sense"),
        ({"head_dim": 7}, "7 of a head's 7 elements cannot be rotated in pairs"),
        ({"partial_rotary_factor": 1.25}, "10 of a head's 8 elements cannot be rotated"),
        ({"rope_scaling": LONG, "max_position_embeddings": 64}, "longrope has 3 factors for 4 pairs"),
        ({"num_key_value_heads": 3}, "8 attention heads cannot share 3"),
        ({"hidden_size": "64"}, "makes no sense"),
        ({"intermediate_size": -1}, "positive"),
        ({"num_attention_heads": 0}, "makes no sense"),
        ({"model_type": "qwen2", "use_sliding_window": True, "layer_types": ["sliding_attention"]}, "layer_types"),
    ],
    ids=lambda value: str(value)[:40] if isinstance(value, dict) else None,
)
def test_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(StartupError, match=message):
        spec_of(LLAMA | change)


LATENT: dict[str, Any] = LLAMA | {
    "model_type": "deepseek_v2",
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "max_position_embeddings": 4096,
}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (LATENT | {"topk_method": "noaux_tc"}, "topk_method 'noaux_tc' is not served"),
        (LATENT | {"topk_method": "group_limited_greedy"}, "lacks 'n_group'"),
        (LATENT | {"norm_topk_prob": True}, "norm_topk_prob = True is not served; served: False"),
        (LATENT | {"attention_bias": True}, "attention_bias with latent attention"),
        (LATENT | {"num_experts_per_tok": 9}, "9 of 8 experts"),
        (LATENT | {"qk_rope_head_dim": 0}, "positive"),
        (LATENT | {"model_type": "deepseek_v3", "n_group": 3}, "8 experts in 3 groups"),
        (LATENT | {"model_type": "deepseek_v3", "scoring_func": "softmax"}, "scoring_func = 'softmax'"),
        ({"model_type": "gpt2", "scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
        ({"model_type": "gpt2"}, "lacks 'n_embd'"),
        ({"model_type": "dbrx", "ffn_config": {"moe_normalize_expert_weights": 2.0}}, "moe_normalize_expert_weights"),
        ({"model_type": "dbrx", "ffn_config": [1]}, "makes no sense"),
        ({"model_type": "chatglm", "post_layer_norm": False}, "post_layer_norm"),
        ({"model_type": "qwen", "rotary_pct": 0.5}, "rotary_pct"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_refused_of_other_families(config: dict[str, Any], message: str) -> None:
    with pytest.raises(StartupError, match=message):
        spec_of(config)


def test_gemma_3_in_both_styles() -> None:
    """As transformers 5 writes the ropes, and as the hub has them."""
    gemma = LLAMA | {"model_type": "gemma3_text", "num_hidden_layers": 12, "sliding_window": 64}
    old = {"rope_theta": 1e6, "rope_local_base_freq": 1e4, "rope_scaling": {"rope_type": "linear", "factor": 8.0}}
    new = {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    }
    spec = spec_of(gemma | old)
    assert spec == spec_of(gemma | {"rope_parameters": new}) == spec_of(gemma | old | {"sliding_window_pattern": 6})
    assert spec.windows == ((64,) * 5 + (None,)) * 2
    assert spec.rope is not None and spec.rope.scaling is not None and spec.rope.scaling.factor == 8.0
    assert spec.local_rope is not None and spec.local_rope.scaling is None and spec.local_rope.theta == 1e4


def test_deepseek_scales_scores_where_it_stretches_the_context() -> None:
    scaling = {"type": "yarn", "factor": 40, "original_max_position_embeddings": 4096, "mscale_all_dim": 0.707}
    plain, stretched = spec_of(LATENT), spec_of(LATENT | {"rope_scaling": scaling})
    assert plain.scale == 192**-0.5 and (plain.kv_heads, plain.head_dim, plain.value_dim) == (1, 576, 512)
    assert stretched.scale == pytest.approx(192**-0.5 * (0.1 * 0.707 * math.log(40) + 1) ** 2)


def test_dynamic_rope_is_plain_within_the_context() -> None:
    config = LLAMA | {"max_position_embeddings": 2048, "rope_scaling": {"type": "dynamic", "factor": 2.0}}
    assert spec_of(config).rope == spec_of(LLAMA | {"max_position_embeddings": 2048}).rope
    stretched = spec_of(config, 4096).rope
    assert stretched is not None and stretched.theta == pytest.approx(10000.0 * 3.0 ** (8 / 6))


def test_exaone_4_in_both_styles() -> None:
    config = LLAMA | {"model_type": "exaone4", "sliding_window": 7}
    expected = (7, 7, 7, None)
    assert spec_of(config).windows == expected == spec_of(config | {"sliding_window_pattern": "LLLG"}).windows
    assert spec_of(config).nope_layers == (False, False, False, True)
    assert spec_of(config | {"sliding_window": None}).nope_layers == ()


def test_missing_size_is_named() -> None:
    for key in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"):
        with pytest.raises(StartupError, match=key):
            spec_of({name: value for name, value in LLAMA.items() if name != key})


def test_the_message_lists_every_family() -> None:
    with pytest.raises(StartupError) as caught:
        spec_of({"model_type": "nothing"})
    assert all(name in caught.value.message for name in FAMILIES)


def test_every_family_has_a_tiny_model() -> None:
    """So each is compared with a reference (test_decoder.py), and its ranks with one (test_parallel.py)."""
    configs = [getattr(transformers, f"{kind}Config", None) for kind, _ in tiny.FAMILIES.values()]
    tested = {config.model_type for config in configs if config is not None} | REPACKED.keys()
    assert tested == FAMILIES.keys() - set(encoder_families.FAMILIES)


def test_the_example_in_the_documents_is_the_code() -> None:
    text = (Path(__file__).parents[2] / "docs" / "models.md").read_text(encoding="utf-8")
    example = textwrap.dedent(text.split("```python\n", 1)[1].split("   ```", 1)[0])
    head, *body = inspect.getsource(dense_families.cohere2).splitlines()
    assert example.splitlines() == [head, *(line for line in body if '"""' not in line)]
    assert len(text[text.index("## Adding a family") :].splitlines()) < 40
