"""Vectors of prompts against transformers (eager, float32): decoders, encoders and classification heads, prompts whole,
in chunks and on a shared prefix, through the stepper as the executor runs it."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
import transformers
from safetensors.torch import save_file
from thread_group import ThreadGroup, on_ranks
from torch import Tensor

from actorserve.config import EngineConfig, Pooling
from actorserve.errors import StartupError
from actorserve.models import attention, ledger, weights
from actorserve.models.kv_cache import KVCache
from actorserve.models.places import allocate
from actorserve.models.pooler import Pooler
from actorserve.models.resolve import resolve_model
from actorserve.models.runner import ChunkWork, Runner
from actorserve.models.spec import Norm, Score
from actorserve.models.stepper import Stepper
from actorserve.models.weights import load_decoder

TOLERANCE = 1e-5
"""Of the vectors' standard deviation."""
LENGTHS = (70, 33, 1, 16)
NOBODY = np.empty(0, dtype=np.int64)
BERT = {
    "vocab_size": tiny.VOCAB,
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "intermediate_size": 80,
    "max_position_embeddings": 90,
    "initializer_range": 0.15,
}
Reference = Callable[[list[int]], Tensor]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


class Bench:
    """A pooled model, or a rank's part of one, and its slots; `settings` are the engine's."""

    def __init__(self, folder: str, group: ThreadGroup | None = None, **settings: Any) -> None:
        config = EngineConfig(model=folder, dtype="float32", device="cpu", **settings)
        self.model = resolve_model(config)
        assert self.model.pooling is not None
        self.pooling: Pooling = self.model.pooling
        decoder = load_decoder(folder, config, lambda fraction: None, self.pooling, group)
        self.runner = Runner(decoder, KVCache(decoder.spec, 121, tiny.PAGE, decoder.device, decoder.dtype), 20, 8)
        self.runner.kv.storage.fill_(float("nan"))
        self.stepper = Stepper(self.runner, None, None, Pooler(self.pooling, decoder, 20))  # type: ignore[arg-type]

    def admit(self, slot: int, pages: list[int], cached: int = 0, second: int = 0) -> None:
        self.runner.admit(slot, np.array(pages, dtype=np.int32), cached, 1000, second=second)
        self.runner.slots.flush()

    def step(self, *work: tuple[int, list[int], int, int]) -> dict[int, Tensor]:
        """Chunks (slot, prompt, start, end): the vectors of the slots whose prompts end."""
        chunks = [
            ChunkWork(slot, start, np.array(ids[start:end]), draws=False, ends=end == len(ids))
            for slot, ids, start, end in work
        ]
        step = self.stepper.launch(NOBODY, chunks)
        vectors = step.vectors()
        assert step.ready and step.rows() is None
        return {} if vectors is None else dict(zip(step.slots.tolist(), torch.from_numpy(vectors), strict=True))


def assert_close(vector: Tensor, expected: Tensor) -> None:
    assert vector.shape == expected.shape
    assert (vector - expected).abs().max() <= TOLERANCE * expected.std(correction=0).clamp(min=0.1)


def prompts() -> list[list[int]]:
    return [tiny.prompt(length, seed=length) for length in LENGTHS]


def decoder_folder(name: str, folder: Path, **changed: Any) -> tuple[Reference, str]:
    """(the last token's hidden state, a folder like e5-mistral's: a bare decoder, no head)"""
    model = tiny.build(name, **changed).model

    def reference(ids: list[int]) -> Tensor:
        with torch.no_grad():
            return model(torch.tensor([ids])).last_hidden_state[0, -1]

    return reference, tiny.save(model, folder)


@pytest.mark.parametrize("name", ["llama", "qwen2", "mistral"])
def test_decoder(name: str, tmp_path: Path) -> None:
    """Whole, in chunks beside others, and on pages that another request filled."""
    reference, folder = decoder_folder(name, tmp_path)
    bench = Bench(folder)
    assert (bench.pooling.kind, bench.pooling.causal, bench.pooling.width) == ("last", True, 48)
    expected = [reference(ids) for ids in prompts()]
    for slot in range(4):
        bench.admit(slot, [5 * slot + i for i in (4, 2, 0, 3, 1)])
    found = bench.step(*((slot, ids, 0, len(ids)) for slot, ids in enumerate(prompts())))
    for slot in range(4):
        assert_close(found[slot], expected[slot])
    long, other = prompts()[:2]
    bench.admit(4, [20, 21, 22, 23, 24])
    bench.admit(5, [25, 26, 27])
    assert not bench.step((4, long, 0, 7))
    assert not bench.step((5, other, 0, 32), (4, long, 7, 64))
    found = bench.step((4, long, 64, 70), (5, other, 32, 33))
    assert_close(found[4], expected[0])
    assert_close(found[5], expected[1])
    sharer = long[:48] + tiny.prompt(9, seed=3)
    bench.admit(6, [20, 21, 22, 28], cached=48)
    assert_close(bench.step((6, sharer, 48, 57))[6], reference(sharer))


def test_a_causal_models_checkpoint_serves_embeddings(tmp_path: Path) -> None:
    """With --is-embedding, also one with a head, which is not needed."""
    model = tiny.build("qwen2")
    folder = tiny.save(model, tmp_path)
    assert resolve_model(EngineConfig(model=folder)).pooling is None
    bench = Bench(folder, is_embedding=True)
    bench.admit(0, [1, 0, 3])
    ids = tiny.prompt(40)
    with torch.no_grad():
        expected = model.model(torch.tensor([ids])).last_hidden_state[0, -1]
    assert_close(bench.step((0, ids, 0, 40))[0], expected)
    assert bench.runner.decoder.weights.head is None


def test_a_decoder_that_looks_ahead(tmp_path: Path) -> None:
    """gte-Qwen2's `is_causal: false`; and the setting for those that say so and are not."""
    reference, folder = decoder_folder("qwen2", tmp_path, is_causal=False)
    causal, _ = decoder_folder("qwen2", tmp_path / "causal")
    ids = tiny.prompt(40)
    for settings, wanted in (({}, reference), ({"embedding_attention": "causal"}, causal)):
        bench = Bench(folder, **settings)
        assert bench.pooling.whole is (wanted is reference)
        bench.admit(0, [1, 0, 3])
        assert_close(bench.step((0, ids, 0, 40))[0], wanted(ids))
    assert (reference(ids) - causal(ids)).abs().max() > 0.1


def test_mean_of_a_decoder_in_chunks(tmp_path: Path) -> None:
    """The mean goes on from chunk to chunk, also where a slot had another request before."""
    model = tiny.build("mistral").model
    folder = tiny.save(model, tmp_path)
    pooling_files(tmp_path, "pooling_mode_mean_tokens")
    bench = Bench(folder)
    assert (bench.pooling.kind, bench.pooling.normalize, bench.pooling.reuses) == ("mean", False, False)
    for ids in prompts()[:2]:
        bench.admit(0, [4, 2, 0, 3, 1])
        assert not bench.step((0, ids, 0, 9))
        found = bench.step((0, ids, 9, len(ids)))
        with torch.no_grad():
            assert_close(found[0], model(torch.tensor([ids])).last_hidden_state[0].mean(0))


def pooling_files(folder: Path, mode: str, *more: str) -> None:
    """sentence-transformers' files."""
    kinds = ["Transformer", "Pooling", *more]
    modules = [
        {"idx": i, "name": str(i), "path": f"{i}_{kind}" if i else "", "type": f"sentence_transformers.models.{kind}"}
        for i, kind in enumerate(kinds)
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir()
    flags = {name: name == mode for name in ("pooling_mode_cls_token", "pooling_mode_mean_tokens", mode)}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": 48, **flags}))


def encoder(kind: str, folder: Path, head: str = "Model", **fields: Any) -> Any:
    """A tiny random encoder, saved; returns transformers' model."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**(BERT | fields))
    config._attn_implementation = "eager"
    model = getattr(transformers, kind + head)(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("kind", ["Bert", "Roberta", "XLMRoberta"])
@pytest.mark.parametrize("mode", ["mean", "cls"])
def test_encoder(kind: str, mode: str, tmp_path: Path) -> None:
    model = encoder(kind, tmp_path)
    pooling_files(tmp_path, f"pooling_mode_{mode}_tokens" if mode == "mean" else "pooling_mode_cls_token", "Normalize")
    bench = Bench(str(tmp_path))
    assert (bench.pooling.kind, bench.pooling.normalize, bench.pooling.whole) == (mode, True, True)
    assert bench.model.context_length == (90 if kind == "Bert" else 88)
    for slot in range(4):
        bench.admit(slot, [5 * slot + i for i in (4, 2, 0, 3, 1)])
    found = bench.step(*((slot, ids, 0, len(ids)) for slot, ids in enumerate(prompts())))
    for slot, ids in enumerate(prompts()):
        with torch.no_grad():
            hidden = model(torch.tensor([ids])).last_hidden_state[0]
        assert_close(found[slot], hidden.mean(0) if mode == "mean" else hidden[0])


def test_prompts_of_many_lengths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some are padded to one length, not all; each is what it is alone."""
    monkeypatch.setattr(attention, "SPLIT_TOKENS", 100)
    model = encoder("Bert", tmp_path)
    bench = Bench(str(tmp_path))
    many = [
        tiny.prompt(length, seed=i) for i, length in enumerate((3, 80, 5, 90, 88, 5, 1, 70, 2, 81, 4, 9, 77, 6, 8, 7))
    ]
    for slot in range(16):
        bench.admit(slot, [6 * slot + i for i in range(6)])
    assert len(attention.group_by_length([len(ids) for ids in many])) > 2
    found = bench.step(*((slot, ids, 0, len(ids)) for slot, ids in enumerate(many)))
    for slot, ids in enumerate(many):
        with torch.no_grad():
            assert_close(found[slot], model(torch.tensor([ids])).last_hidden_state[0].mean(0))


@pytest.mark.parametrize("kind", ["Bert", "Roberta", "Llama", "Qwen2"])
def test_classification_head(kind: str, tmp_path: Path) -> None:
    """Three labels: a pooler before them in BERT, one map of the last hidden state in decoders."""
    fields = {"num_labels": 3} if kind in ("Bert", "Roberta") else tiny.COMMON | {"num_labels": 3}
    model = encoder(kind, tmp_path, "ForSequenceClassification", **fields)
    bench = Bench(str(tmp_path))
    assert (bench.pooling.task, bench.pooling.width) == ("classify", 3)
    assert bench.pooling.labels == ("LABEL_0", "LABEL_1", "LABEL_2")
    for slot, ids in enumerate(prompts()):
        bench.admit(slot, [5 * slot + i for i in (4, 2, 0, 3, 1)])
        with torch.no_grad():
            expected = model(torch.tensor([ids])).logits[0]
        assert_close(bench.step((slot, ids, 0, len(ids)))[slot], expected)


@pytest.mark.parametrize("kind", ["Bert", "Roberta"])
def test_pairs_of_texts(kind: str, tmp_path: Path) -> None:
    """A pair's second text has tokens of the second type where the model knows types, beside prompts that are one text
    and in slots that had pairs before."""
    typed = kind == "Bert"
    model = encoder(kind, tmp_path, "ForSequenceClassification", num_labels=1, type_vocab_size=2 if typed else 1)
    bench = Bench(str(tmp_path))

    def expected(ids: list[int], second: int) -> Tensor:
        types = torch.tensor([[int(0 < second <= i) for i in range(len(ids))]])
        with torch.no_grad():
            return model(torch.tensor([ids]), token_type_ids=types if typed else None).logits[0]

    for seconds in ((40, 0, 0, 1), (0, 32, 0, 15)):
        for slot, second in enumerate(seconds):
            bench.admit(slot, [5 * slot + i for i in (4, 2, 0, 3, 1)], second=second)
        found = bench.step(*((slot, ids, 0, len(ids)) for slot, ids in enumerate(prompts())))
        for slot, ids in enumerate(prompts()):
            assert_close(found[slot], expected(ids, seconds[slot]))
    ids = prompts()[0]
    assert not typed or (expected(ids, 40) - expected(ids, 0)).abs().max() > 1e-3, "types matter"


def test_reward_model(tmp_path: Path) -> None:
    """Qwen2-Math-RM's kind, whose code is beside its weights: two maps of the last hidden state, one number."""
    model = tiny.build("qwen2").model
    head = torch.nn.Sequential(torch.nn.Linear(48, 48), torch.nn.ReLU(), torch.nn.Linear(48, 1))
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    tensors |= {f"score.{name}": tensor for name, tensor in head.state_dict().items()}
    tiny.save(model, tmp_path)
    save_file(tensors, tmp_path / "model.safetensors")
    tiny.edit_config(str(tmp_path), architectures=["Qwen2ForRewardModel"])
    bench = Bench(str(tmp_path))
    assert (bench.pooling.task, bench.pooling.width, bench.pooling.labels) == ("classify", 1, ("LABEL_0",))
    ids = tiny.prompt(40)
    bench.admit(0, [1, 0, 3])
    with torch.no_grad():
        expected = head(model(torch.tensor([ids])).last_hidden_state[0, -1])
    assert_close(bench.step((0, ids, 0, 40))[0], expected)


CHANGES: list[dict[str, Any]] = [
    {"causal": True},
    {"embed_norm": False},
    {"token_types": 0},
    {"act": "silu"},
    {"norm": Norm("layer", 0.1, bias=True)},
    {"qkv_bias": False},
    {"o_bias": False},
    {"mlp_bias": False},
    {"layout": "post"},
    {"score": Score(3, bias=True, dense="relu")},
    {"score": Score(3, bias=True)},
    {"score": Score(3, dense="tanh")},
]


@pytest.mark.parametrize("change", CHANGES, ids=str)
def test_every_field_of_an_encoder_matters(
    change: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Set to another value it moves the logits by 100 times the tolerance, or the loader refuses the weights."""
    encoder("Bert", tmp_path, "ForSequenceClassification", num_labels=3)
    ids = tiny.prompt(40)

    def logits() -> Tensor:
        bench = Bench(str(tmp_path))
        bench.admit(0, [1, 0, 3])
        return bench.step((0, ids, 0, 40))[0]

    expected = logits()
    made = weights.pooled_spec
    monkeypatch.setattr(weights, "pooled_spec", lambda *given: replace(made(*given), **change))
    try:
        moved = (logits() - expected).abs().max() / expected.std()
    except StartupError:
        return
    assert moved > 100 * TOLERANCE


def test_ranks_share_a_classifier(tmp_path: Path) -> None:
    """An encoder: norms behind sums, biases everywhere, several tables. Every rank has the vectors."""
    encoder("Roberta", tmp_path, "ForSequenceClassification", num_labels=3)

    def classes(group: ThreadGroup | None = None) -> Tensor:
        bench = Bench(str(tmp_path), group)
        for slot in range(4):
            bench.admit(slot, [5 * slot + i for i in (4, 2, 0, 3, 1)])
        found = bench.step(*((slot, ids, 0, len(ids)) for slot, ids in enumerate(prompts())))
        return torch.stack([found[slot] for slot in range(4)])

    expected = classes()
    for found in on_ranks(2, classes):
        assert_close(found, expected)


def test_memory_of_an_encoder_is_what_the_loader_allocates(tmp_path: Path) -> None:
    encoder("Roberta", tmp_path, "ForSequenceClassification", num_labels=3)
    spec = Bench(str(tmp_path)).runner.decoder.spec
    _, places = allocate(spec, torch.device("cpu"), torch.float32)
    assert ledger.parameters(spec) == sum(place.view.numel() for place in places.values())


def test_what_is_not_served_is_refused(tmp_path: Path) -> None:
    encoder("Bert", tmp_path)
    pooling_files(tmp_path, "pooling_mode_weightedmean_tokens")
    with pytest.raises(StartupError, match="weightedmean"):
        resolve_model(EngineConfig(model=str(tmp_path)))
    modules = json.loads((tmp_path / "modules.json").read_text())
    modules.append({"idx": 2, "path": "2_Dense", "type": "sentence_transformers.models.Dense"})
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(StartupError, match="Dense"):
        resolve_model(EngineConfig(model=str(tmp_path)))
