"""config.json -> Spec: defaults, both styles of rope settings, windows, and what is refused."""

from typing import Any

import pytest

from actorserve.errors import StartupError
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


def test_defaults_are_those_of_transformers() -> None:
    spec = spec_of(LLAMA)
    assert (spec.head_dim, spec.group, spec.attention_scale) == (8, 4, 8**-0.5)
    assert spec.rope is not None and (spec.rope.theta, spec.rope.dim, spec.rope.scaling) == (10000.0, 8, None)
    assert (spec.norm.eps, spec.tied, spec.act, spec.qkv_bias, spec.windows) == (1e-6, False, "silu", False, ())
    assert spec_of({key: value for key, value in LLAMA.items() if key != "num_key_value_heads"}).kv_heads == 8


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
        ({"model_type": "mamba"}, "mamba.*served: chatglm, cohere"),
        ({"model_type": None}, "not served yet"),
        ({"model_type": ["llama"]}, "not served yet"),
        ({"hidden_act": "relu"}, "relu"),
        ({"rope_scaling": {"type": "longrope", "factor": 2.0}}, "longrope"),
        ({"rope_scaling": {"type": "linear"}}, "lacks 'factor'"),
        ({"num_key_value_heads": 3}, "8 attention heads cannot share 3"),
        ({"hidden_size": "64"}, "makes no sense"),
        ({"intermediate_size": -1}, "positive"),
        ({"num_attention_heads": 0}, "makes no sense"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantized"),
        ({"model_type": "qwen2", "use_sliding_window": True, "layer_types": ["sliding_attention"]}, "layer_types"),
    ],
    ids=lambda value: str(value)[:40] if isinstance(value, dict) else None,
)
def test_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(StartupError, match=message):
        spec_of(LLAMA | change)


def test_missing_size_is_named() -> None:
    for key in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"):
        with pytest.raises(StartupError, match=key):
            spec_of({name: value for name, value in LLAMA.items() if name != key})


def test_the_message_lists_every_family() -> None:
    with pytest.raises(StartupError) as caught:
        spec_of({"model_type": "nothing"})
    assert all(name in caught.value.message for name in FAMILIES)
