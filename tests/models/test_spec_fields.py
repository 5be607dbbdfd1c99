"""Every field of a Spec matters: what a family sets, and is set back, is refused by the loader or moves the logits.

A field that the decoder ignored, or a tiny model whose value made no difference, would pass test_decoder.py.
"""

from collections.abc import Iterator
from dataclasses import MISSING, fields, is_dataclass, replace
from typing import Any

import pytest
import tiny
import torch
from repacked import ALL, make
from tiny import Driver

from actorserve.errors import StartupError
from actorserve.models import weights
from actorserve.models.decoder import Decoder
from actorserve.models.spec import Spec

MOVES = 1e-3
"""Of the logits' standard deviation: 100 times what test_decoder.py tolerates."""
LENGTH = 70
SIZES = {"vocab", "hidden", "layers", "heads", "kv_heads", "head_dim", "inter", "learned_positions"}
SIZES |= {"experts", "q_rank", "kv_rank", "nope", "v", "shared_inter"}
"""A wrong size does not load; test_weights.py has those."""
OTHER: dict[str, Any] = {
    "eps": lambda value: value + 0.01,
    "theta": lambda value: value / 10,
    "dim": lambda value: value // 2,
    "interleaved": lambda value: not value,
    "factor": lambda value: 2 * value,
    "original_max_position": lambda value: 2 * value,
    "low_freq_factor": lambda value: value + 1,
    "high_freq_factor": lambda value: value + 4,
    "top_k": lambda value: value - 1,
    "group_best": lambda value: 3 - value,
}
"""Values for fields that have no default, or that are to be seen at their default too; by the field's name."""
NOT_OF = {"linear": {"original_max_position", "low_freq_factor", "high_freq_factor"}}
NOT_OF |= {"llama3": set(), "yarn": {"low_freq_factor", "high_freq_factor"}}
"""Fields that a kind of rope scaling does not use."""
AT_LOAD = {"norm.offset", "norm.bias", "qk_norm.offset", "qk_norm_shape", "qkv_bias", "o_bias", "mlp_bias", "gated"}
AT_LOAD |= {"layout", "tied", "moe", "moe.layers", "moe.score_bias", "qk_norm"}
"""What decides which tensors there are, or what becomes of them when they are loaded."""


def changed(value: Any, unused: frozenset[str] = frozenset()) -> Iterator[tuple[str, Any]]:
    """Yield (path of a field, the dataclass `value` with that field set back or changed), one at a time."""
    for field in fields(value):
        now = getattr(value, field.name)
        if field.name in SIZES or field.name in unused:
            continue
        if is_dataclass(now):
            skipped = frozenset(NOT_OF[now.kind]) if field.name == "scaling" else frozenset[str]()
            if field.name == "moe":
                skipped = frozenset({"group_best"}) if now.groups == 1 else frozenset()
            for path, inner in changed(now, skipped):
                yield f"{field.name}.{path}", replace(value, **{field.name: inner})
            if field.default is None:
                yield field.name, replace(value, **{field.name: None})
        elif now is not None and field.name in OTHER:
            yield field.name, replace(value, **{field.name: OTHER[field.name](now)})
        elif field.name == "layers":
            yield field.name, replace(value, layers=tuple(not sparse for sparse in now))
        elif field.default is not MISSING and now != field.default:
            yield field.name, replace(value, **{field.name: field.default})


def mutants(spec: Spec) -> Iterator[tuple[str, Spec]]:
    """All that can be told apart: MLA's own widths cannot change, and a head's norm without its shape means nothing."""
    for path, mutant in changed(spec):
        together = spec.qk_norm is None and path == "qk_norm_shape"
        rotated_width = spec.mla is not None and path in ("rope.dim", "mla.rope", "mla")
        if not together and not rotated_width and path != "rope.scaling.kind":
            yield path, mutant


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    """Matrices this small lose more to handing work over than they gain."""
    torch.set_num_threads(1)


@pytest.mark.parametrize("name", ALL)
def test_every_field_matters(
    name: str, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, folder = make(name, tmp_path_factory.mktemp("model"))
    decoder = tiny.load(folder)
    ids = tiny.prompt(LENGTH)
    logits = Driver.of(decoder).logits(ids, [LENGTH])
    seen = []
    for path, spec in mutants(decoder.spec):
        seen.append(path)
        mutant = decoder
        try:
            if path in AT_LOAD:
                monkeypatch.setattr(weights, "spec_of", lambda facts, spec=spec: spec)
                mutant = tiny.load(folder)
            else:
                mutant = Decoder(spec, decoder.weights, decoder.attention, decoder.device, decoder.dtype)
        except StartupError:
            continue
        moved = (Driver.of(mutant).logits(ids, [LENGTH]) - logits).abs().max() / logits.std()
        assert moved > MOVES, path
    assert len(seen) >= 3, seen
