"""Every field of a Spec matters: what a family sets, and is set back, is refused by the loader or moves the logits.

A field that the decoder ignored, or a tiny model whose value made no difference, would pass test_decoder.py.

    python tests/models/test_spec_fields.py [FAMILY ...]     # the table: by how many tolerances each field moves them
"""

import sys
import tempfile
from collections.abc import Iterator
from dataclasses import MISSING, fields, is_dataclass, replace
from pathlib import Path
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
    "factors": lambda value: tuple(2 * x for x in value),
    "original_max_position": lambda value: 2 * value,
    "low_freq_factor": lambda value: value + 1,
    "high_freq_factor": lambda value: value + 4,
    "top_k": lambda value: value - 1,
    "group_best": lambda value: 3 - value,
}
"""Values for fields that have no default, or that are to be seen at their default too; by the field's name."""
NOT_OF = {"linear": {"original_max_position", "low_freq_factor", "high_freq_factor", "factors"}}
NOT_OF |= {"llama3": {"factors"}, "yarn": {"low_freq_factor", "high_freq_factor", "factors"}}
NOT_OF |= {"longrope": {"factor", "original_max_position", "low_freq_factor", "high_freq_factor"}}
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


def scaling_of(spec: Spec) -> str | None:
    """The kind of a model's rope scaling."""
    return spec.rope.scaling.kind if spec.rope is not None and spec.rope.scaling is not None else None


def mutants(spec: Spec) -> Iterator[tuple[str, Spec]]:
    """All that can be told apart: MLA's own widths cannot change, and a head's norm without its shape means nothing."""
    for path, mutant in changed(spec):
        together = spec.qk_norm is None and path == "qk_norm_shape"
        rotated_width = spec.mla is not None and path in ("rope.dim", "mla.rope", "mla")
        rotated_width |= path == "rope.dim" and scaling_of(spec) == "longrope"  # a factor for each pair
        if not together and not rotated_width and path != "rope.scaling.kind":
            yield path, mutant


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    """Matrices this small lose more to handing work over than they gain."""
    torch.set_num_threads(1)


def moves(name: str, folder: Path) -> dict[str, float | None]:
    """Path of a field -> the largest change of a logit, in standard deviations; None: the loader refuses the model."""
    _, model = make(name, folder)
    decoder = tiny.load(model)
    ids = tiny.prompt(LENGTH)
    logits = Driver.of(decoder).logits(ids, [LENGTH])
    found: dict[str, float | None] = {}
    for path, spec in mutants(decoder.spec):
        mutant = decoder
        try:
            if path in AT_LOAD:
                with pytest.MonkeyPatch.context() as patched:
                    patched.setattr(weights, "spec_of", lambda facts, context, spec=spec: spec)
                    mutant = tiny.load(model)
            else:
                mutant = Decoder(spec, decoder.weights, decoder.attention, decoder.device, decoder.dtype)
        except StartupError:
            found[path] = None
            continue
        moved = Driver.of(mutant).logits(ids, [LENGTH]) - logits
        found[path] = float(moved.abs().max() / logits.std())
    return found


@pytest.mark.parametrize("name", ALL)
def test_every_field_matters(name: str, tmp_path: Path) -> None:
    found = moves(name, tmp_path)
    assert len(found) >= 3, found
    assert {path: moved for path, moved in found.items() if moved is not None and moved <= MOVES} == {}


def table(names: list[str]) -> None:
    """Print each family's fields, the least noticed last."""
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            found = moves(name, Path(folder))
        print(name)
        for path, moved in sorted(found.items(), key=lambda item: -float("inf") if item[1] is None else -item[1]):
            print(f"  {path:<36} {'refused' if moved is None else f'{100 * moved / MOVES:>12,.0f} x'}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    table(sys.argv[1:] or list(ALL))
