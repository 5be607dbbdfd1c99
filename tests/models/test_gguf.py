"""GGUF conversion, against hand-made small files, gguf's own dequantisation, transformers and llama.cpp's token ids."""

import itertools
import json
import random
import struct
from pathlib import Path
from typing import Any

import gguf
import gguf_writer
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from actorserve.errors import StartupError
from actorserve.models.embedded import MEMBER, NAME
from actorserve.models.gguf import KEPT_FILE, OUTER, convert, to_bfloat16
from actorserve.models.gguf_tokenizer import PRE_TOKENIZERS

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, INTER, LAYERS = 64, 4, 2, 16, 96, 2
CONTROL = ["<|end|>", "<|begin|>"]
CORPUS = ["the quick brown fox jumps over 1234 lazy dogs\n", "def f(x): return x + 10  # été 日本"] * 4


@pytest.fixture(scope="module")
def bpe() -> dict[str, Any]:
    """Vocabulary and merges of a small byte-level BPE; control tokens come first."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=330, special_tokens=CONTROL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    return {"tokens": tokens, "merges": [" ".join(m) for m in model["merges"]]}


def weights(arch: str, vocab: int, tied: bool) -> dict[str, np.ndarray]:
    """Random Hugging Face weights whose values bfloat16 holds exactly."""
    rng = np.random.default_rng(0)
    shapes = {"model.embed_tokens.weight": (vocab, HIDDEN), "model.norm.weight": (HIDDEN,)}
    if not tied:
        shapes["lm_head.weight"] = (vocab, HIDDEN)
    for i in range(LAYERS):
        layer = f"model.layers.{i}."
        shapes |= {layer + f"{n}.weight": (HIDDEN,) for n in ("input_layernorm", "post_attention_layernorm")}
        for name, rows in (("q", HEADS * HEAD_DIM), ("k", KV_HEADS * HEAD_DIM), ("v", KV_HEADS * HEAD_DIM)):
            shapes[layer + f"self_attn.{name}_proj.weight"] = (rows, HIDDEN)
            if arch == "qwen2":
                shapes[layer + f"self_attn.{name}_proj.bias"] = (rows,)
        shapes[layer + "self_attn.o_proj.weight"] = (HIDDEN, HEADS * HEAD_DIM)
        shapes |= {layer + f"mlp.{n}_proj.weight": (INTER, HIDDEN) for n in ("gate", "up")}
        shapes[layer + "mlp.down_proj.weight"] = (HIDDEN, INTER)
    return {
        n: (rng.standard_normal(s).astype(np.float32).view(np.uint32) & 0xFFFF0000).view(np.float32)
        for n, s in shapes.items()
    }


LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def gguf_name(name: str) -> str:
    if not name.startswith("model.layers."):
        module, _, part = name.rpartition(".")
        return {theirs: ours for ours, theirs in OUTER.items()}[module] + "." + part
    _, _, layer, rest = name.split(".", 3)
    module, _, part = rest.rpartition(".")
    return f"blk.{layer}.{LAYER_NAMES[module]}.{part}"


def write_gguf(
    path: Path, bpe: dict[str, Any], arch: str = "llama", tied: bool = True, **changes: Any
) -> dict[str, np.ndarray]:
    """A small model's GGUF; `changes`: metadata to add, or to leave out (None), and tensors by `tensors=`.

    `kinds=`: types of quantized matrices by the end of their names.
    """
    kinds: dict[str, str] = changes.pop("kinds", {})
    original = weights(arch, len(bpe["tokens"]), tied)
    writer = gguf.GGUFWriter(path, arch)
    meta: dict[str, Any] = {
        f"{arch}.context_length": 512,
        f"{arch}.embedding_length": HIDDEN,
        f"{arch}.block_count": LAYERS,
        f"{arch}.feed_forward_length": INTER,
        f"{arch}.attention.head_count": HEADS,
        f"{arch}.attention.head_count_kv": KV_HEADS,
        f"{arch}.attention.layer_norm_rms_epsilon": 1e-6,
        f"{arch}.rope.freq_base": 500000.0,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm" if arch == "llama" else "qwen2",
        "tokenizer.ggml.tokens": bpe["tokens"],
        "tokenizer.ggml.token_type": [3 if t in CONTROL else 1 for t in bpe["tokens"]],
        "tokenizer.ggml.merges": bpe["merges"],
        "tokenizer.ggml.eos_token_id": 0,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.chat_template": "{{ messages }}",
    }
    tensors = {gguf_name(name): value for name, value in original.items()}
    if arch == "llama":
        for name in tensors:
            if name.endswith(("attn_q.weight", "attn_k.weight")):
                tensors[name] = gguf_writer.interleave(tensors[name], HEADS if "attn_q" in name else KV_HEADS)
    tensors |= changes.pop("tensors", {})
    for key, value in (meta | {k.replace("__", "."): v for k, v in changes.items()}).items():
        gguf_writer.add(writer, key, value)
    for name, tensor in tensors.items():
        kind = next((gguf.GGMLQuantizationType[kind] for end, kind in kinds.items() if name.endswith(end)), None)
        if tensor is not None and kind is not None:
            writer.add_tensor(name, gguf.quantize(tensor, kind), raw_dtype=kind)
        elif tensor is not None:
            writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return original


@pytest.fixture
def out(tmp_path: Path) -> Path:
    folder = tmp_path / "out"
    folder.mkdir()
    return folder


@pytest.mark.parametrize(("arch", "tied"), [("llama", True), ("llama", False), ("qwen2", False)])
def test_weights_come_back(tmp_path: Path, out: Path, bpe: dict[str, Any], arch: str, tied: bool) -> None:
    original = write_gguf(tmp_path / "m.gguf", bpe, arch, tied)
    steps: list[tuple[str, int, int]] = []
    convert(tmp_path / "m.gguf", out, lambda *step: steps.append(step))
    loaded = load_file(out / "model.safetensors")
    assert loaded.keys() == original.keys()
    for name, tensor in loaded.items():
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(tensor.float(), torch.from_numpy(original[name])), name
    total = sum(2 * value.size for value in original.values())
    assert steps[-1] == ("convert", total, total)
    config = json.loads((out / "config.json").read_text())
    assert config["tie_word_embeddings"] is tied
    assert (config["rms_norm_eps"], config["rope_theta"], config["head_dim"]) == (1e-6, 500000.0, HEAD_DIM)
    assert json.loads((out / "generation_config.json").read_text()) == {"bos_token_id": 1, "eos_token_id": 0}
    assert json.loads((out / "tokenizer_config.json").read_text())["chat_template"] == "{{ messages }}"


def test_blocks_of_rows(tmp_path: Path, out: Path, bpe: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("actorserve.models.gguf.BLOCK_VALUES", 5 * HIDDEN)
    original = write_gguf(tmp_path / "m.gguf", bpe)
    convert(tmp_path / "m.gguf", out)
    for name, tensor in load_file(out / "model.safetensors").items():
        assert torch.equal(tensor.float(), torch.from_numpy(original[name])), name


KINDS = {"attn_q.weight": "Q4_1", "attn_k.weight": "Q4_1", "ffn_up.weight": "Q4_0", "token_embd.weight": "Q8_0"}


def test_quantized_blocks_are_kept(tmp_path: Path, out: Path, bpe: dict[str, Any]) -> None:
    """Beside what they mean in bfloat16, and in the same order of rows, which is another one than the file's."""
    write_gguf(tmp_path / "m.gguf", bpe, kinds=KINDS)
    convert(tmp_path / "m.gguf", out)
    kept, loaded = load_file(out / KEPT_FILE), load_file(out / "model.safetensors")
    assert {gguf_name(name) for name in kept} == {"token_embd.weight"} | {
        f"blk.{i}.{end}" for i in range(LAYERS) for end in KINDS if "embd" not in end
    }
    for name, blocks in kept.items():
        kind = next(kind for end, kind in KINDS.items() if gguf_name(name).endswith(end))
        values = torch.from_numpy(gguf.dequantize(blocks.numpy(), gguf.GGMLQuantizationType[kind]))
        assert torch.equal(loaded[name], values.bfloat16()), name


def test_no_file_for_no_blocks(tmp_path: Path, out: Path, bpe: dict[str, Any]) -> None:
    write_gguf(tmp_path / "m.gguf", bpe)
    convert(tmp_path / "m.gguf", out)
    assert not (out / KEPT_FILE).exists()


def llama3_factors(factor: float) -> np.ndarray:
    """llama.cpp's rope_freqs, by its converter's loop."""
    factors = []
    for i in range(0, HEAD_DIM, 2):
        wavelength = 2 * np.pi * 500000.0 ** (i / HEAD_DIM)
        if wavelength < 8192 / 4:
            factors.append(1.0)
        elif wavelength > 8192:
            factors.append(factor)
        else:
            smooth = (8192 / wavelength - 1) / 3
            factors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(factors, np.float32)


def test_llama3_rope(tmp_path: Path, out: Path, bpe: dict[str, Any]) -> None:
    factors = llama3_factors(32.0)
    assert 1 < sorted(factors)[len(factors) // 2] <= 32
    write_gguf(tmp_path / "m.gguf", bpe, tensors={"rope_freqs.weight": factors})
    convert(tmp_path / "m.gguf", out)
    scaling = json.loads((out / "config.json").read_text())["rope_scaling"]
    assert (scaling["rope_type"], scaling["factor"]) == ("llama3", 32.0)
    factors[-2] = 30.0
    write_gguf(tmp_path / "m.gguf", bpe, tensors={"rope_freqs.weight": factors})
    with pytest.raises(StartupError, match="Llama 3's rule"):
        convert(tmp_path / "m.gguf", out)


def test_linear_rope_and_several_ends(tmp_path: Path, out: Path, bpe: dict[str, Any]) -> None:
    changes = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0, "tokenizer.ggml.eot_token_id": 7}
    write_gguf(tmp_path / "m.gguf", bpe, **changes)
    convert(tmp_path / "m.gguf", out)
    config = json.loads((out / "config.json").read_text())
    assert config["rope_scaling"] == {"rope_type": "linear", "factor": 4.0}
    assert config["eos_token_id"] == [0, 7]


NAN = np.full((HIDDEN,), np.nan, np.float32)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokenizer.ggml.model": "t5"}, "tokenizer kind 't5'.*supported: gpt2 and llama"),
        ({"tokenizer.ggml.model": "llama"}, "incomplete or inconsistent.*tokenizer.ggml.scores"),
        ({"tokenizer.ggml.pre": "superbpe"}, "pre-tokenizer 'superbpe'.*supported: smollm"),
        ({"tokenizer.ggml.pre": None}, "pre-tokenizer None"),
        ({"tokenizer.ggml.merges": ["zzzz yyyy"]}, "tokenizer is broken"),
        ({"llama.rope.scaling.type": "longrope"}, "rope scaling 'longrope'"),
        ({"llama.rope.dimension_count": 8}, "part of the head"),
        ({"llama.attention.head_count_kv": [2, 1]}, "head_count_kv"),
        ({"llama.block_count": None}, "block_count = None"),
        ({"tensors": {"blk.1.ffn_up.weight": None}}, "'blk.1.ffn_up.weight' is missing"),
        ({"tensors": {"token_embd.weight": None}}, "token_embd.weight is missing"),
        ({"tensors": {"blk.0.ffn_gate_exps.weight": np.zeros((2, 4), np.float32)}}, "not part of a plain llama"),
        ({"tensors": {"output_norm.weight": NAN}}, "NaN or infinity"),
        ({"tokenizer.ggml.merges": None}, "incomplete or inconsistent.*merges"),
        ({"tokenizer.ggml.bos_token_id": 9999}, "incomplete or inconsistent"),
        ({"llama.attention.head_count": 8, "llama.attention.key_length": 16}, "incomplete or inconsistent"),
    ],
)
def test_refused(tmp_path: Path, out: Path, bpe: dict[str, Any], changes: dict[str, Any], message: str) -> None:
    write_gguf(tmp_path / "m.gguf", bpe, **changes)
    with pytest.raises(StartupError, match=message):
        convert(tmp_path / "m.gguf", out)


def test_other_architectures_are_refused(tmp_path: Path, out: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "mamba")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(StartupError, match="'mamba' is not supported yet; supported: llama, qwen2"):
        convert(tmp_path / "m.gguf", out)


def test_broken_files_are_refused(tmp_path: Path, out: Path, bpe: dict[str, Any]) -> None:
    write_gguf(tmp_path / "m.gguf", bpe)
    whole = (tmp_path / "m.gguf").read_bytes()
    cut = random.Random(0).sample(range(len(whole)), 40)
    endless = b"GGUF" + struct.pack("<IQQQ1sIIQ", 3, 0, 1, 1, b"x", 9, 4, 1 << 62)  # an array of so many numbers
    for content in [b"", b"GGUF", b"no gguf at all" * 9, endless, *(whole[:n] for n in cut)]:
        (tmp_path / "b.gguf").write_bytes(content)
        with pytest.raises(StartupError):
            convert(tmp_path / "b.gguf", out)


@given(st.lists(st.tuples(st.integers(0, 0xFFFF), st.integers(0, 0xFFFF) | st.sampled_from([0x7FFF, 0x8000, 0x8001]))))
def test_bfloat16_rounds_as_torch_does(halves: list[tuple[int, int]]) -> None:
    values = np.array([high << 16 | low for high, low in halves], np.uint32).view(np.float32)
    values = values[np.isfinite(values)]
    expected = torch.from_numpy(values.copy()).bfloat16().view(torch.int16).numpy().view(np.uint16)
    assert np.array_equal(to_bfloat16(values), expected)


@pytest.mark.parametrize(
    ("pre", "pieces"),
    [
        ("gpt-2", ["I", "'ve", "Ġ1234", "ĠĠ", "ĠX", "ĊĊ"]),
        ("smollm", ["I", "'ve", "Ġ", "1", "2", "3", "4", "ĠĠ", "ĠX", "ĊĊ"]),
        ("llama-bpe", ["I", "'ve", "Ġ", "123", "4", "ĠĠ", "ĠX", "ĊĊ"]),
        ("qwen2", ["I", "'ve", "Ġ", "1", "2", "3", "4", "ĠĠ", "ĠX", "ĊĊ"]),
        ("command-r", ["I", "'ve", "Ġ", "1", "2", "3", "4", "ĠĠ", "ĠX", "ĊĊ"]),
        ("tekken", ["I", "'ve", "Ġ", "1", "2", "3", "4", "ĠĠ", "ĠX", "ĊĊ"]),
    ],
)
def test_pre_tokenizers(pre: str, pieces: list[str]) -> None:
    """Where they differ: digits and the space before them."""
    tokenizer = Tokenizer(models.BPE())
    state = json.loads(tokenizer.to_str()) | {"pre_tokenizer": PRE_TOKENIZERS[pre]}
    split = Tokenizer.from_str(json.dumps(state)).pre_tokenizer.pre_tokenize_str("I've 1234   X\n\n")
    assert [piece for piece, _ in split] == pieces


def test_begin_token(tmp_path: Path, out: Path, bpe: dict[str, Any]) -> None:
    """Llama 3 files begin texts with BOS, also where they do not say so; the others only if they say so."""
    for pre, says, expected in (("llama-bpe", None, True), ("llama-bpe", False, False), ("qwen2", None, False)):
        write_gguf(tmp_path / "m.gguf", bpe, **{"tokenizer.ggml.pre": pre, "tokenizer.ggml.add_bos_token": says})
        convert(tmp_path / "m.gguf", out)
        ids = Tokenizer.from_file(str(out / "tokenizer.json")).encode("the fox").ids
        assert (ids[0] == 1) is expected
        assert 1 not in ids[1:]


def test_padding_that_is_no_token(tmp_path: Path, out: Path, bpe: dict[str, Any]) -> None:
    """Converters wrote -1 as the largest number of 32 bits."""
    for token in (len(bpe["tokens"]), (1 << 32) - 1):
        write_gguf(
            tmp_path / "m.gguf",
            bpe,
            **{"tokenizer.ggml.padding_token_id": token, "tokenizer.ggml.unknown_token_id": token},
        )
        convert(tmp_path / "m.gguf", out)
        assert "pad_token_id" not in json.loads((out / "config.json").read_text())
        named = json.loads((out / "tokenizer_config.json").read_text())
        assert named["eos_token"] == CONTROL[0] and not {"pad_token", "unk_token"} & named.keys()


# ------------------------------------------------------------------ SentencePiece


def spm_facts(prefix: bool) -> dict[str, Any]:
    """A vocabulary of pieces with scores: all single letters of the corpus, then what a BPE makes of it."""
    tokenizer = Tokenizer(models.BPE())
    trainer = trainers.BpeTrainer(vocab_size=200, show_progress=False)
    tokenizer.train_from_iterator([text.replace(" ", "\u2581") for text in CORPUS], trainer)
    vocab: dict[str, int] = tokenizer.get_vocab()
    pieces = [piece for piece in sorted(vocab, key=vocab.__getitem__) if piece != "\n"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "\n", "  ", *pieces]
    types = [2, 3, 3] + [6] * 256 + [4, 4] + [1] * len(pieces)
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.scores": [-float(i) for i in range(len(tokens))],
        "tokenizer.ggml.merges": None,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.add_space_prefix": prefix,
    }


def spm_ids(facts: dict[str, Any], text: str) -> list[int]:
    """SentencePiece's BPE: the two neighbours with the best joint score are joined, the left ones first."""
    ids = {token: i for i, token in enumerate(facts["tokenizer.ggml.tokens"])}
    kinds = facts["tokenizer.ggml.token_type"]
    pieces = list(text.replace(" ", "\u2581"))
    while True:
        pairs = [(ids.get(a + b), i) for i, (a, b) in enumerate(itertools.pairwise(pieces))]
        good = [(token, i) for token, i in pairs if token is not None and kinds[token] == 1]
        if not good:
            break
        _, at = min(good)  # the lowest id has the best score
        pieces[at : at + 2] = [pieces[at] + pieces[at + 1]]
    bytes_of = [[ids[p]] if p in ids else [ids[f"<0x{b:02X}>"] for b in p.encode()] for p in pieces]
    return [token for part in bytes_of for token in part]


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece(prefix: bool, tmp_path: Path, out: Path, bpe: dict[str, Any]) -> None:
    """Pieces by their scores, bytes for what is in none, user-defined tokens first, a space where texts begin."""
    facts = spm_facts(prefix)
    write_gguf(tmp_path / "m.gguf", {"tokens": facts["tokenizer.ggml.tokens"], "merges": []}, **facts)
    convert(tmp_path / "m.gguf", out)
    tokenizer = Tokenizer.from_file(str(out / "tokenizer.json"))
    rng, space = random.Random(2), " " if prefix else ""
    words = ["the", "quick", "fox", "lazy", "dogs", "été", "日", "本", "x", "+ 10", "ß", "😀", "aa", "over1234", "ooo"]
    for _ in range(300):
        parts = [" ".join(rng.choice(words) for _ in range(rng.randrange(1, 6))) for _ in range(rng.randrange(1, 4))]
        expected = [spm_ids(facts, space + part) for part in parts]
        line = facts["tokenizer.ggml.tokens"].index("\n")
        joined = [token for part in expected for token in (line, *part)][1:]
        text = "\n".join(parts)
        assert tokenizer.encode(text).ids == [1, *joined], text
        if len(parts) == 1:
            assert tokenizer.decode(joined) == text
    assert tokenizer.encode("<s>x</s>").ids == [1, 1, *spm_ids(facts, f"{space}x"), 2]


# ------------------------------------------------------------------ the real file

# Token ids by llama.cpp's server from the same GGUF. transformers' own GGUF route splits digits as GPT-2 does and
# gives other ids after several spaces; the model was trained on these.
LLAMA_CPP_IDS = {
    "1234 5678  9": [33, 34, 35, 36, 216, 37, 38, 39, 40, 256, 41],
    "a  1 b": [81, 256, 33, 278],
    "x\n\n 12": [104, 8866, 33, 34],
    "<|im_start|>user\nhi 42<|im_end|>": [1, 4093, 198, 6004, 216, 36, 34, 2],
    "日本語 ١٢ 😀": [23274, 115, 40993, 179, 120, 248, 216, 164, 111, 164, 112, 40303, 218],
    "½ x² Ⅷ 3": [16738, 1792, 19133, 216, 173, 223, 117, 216, 35],
}


def test_token_ids_of_llama_cpp(smollm: str) -> None:
    tokenizer = Tokenizer.from_file(f"{smollm}/tokenizer.json")
    for text, ids in LLAMA_CPP_IDS.items():
        assert tokenizer.encode(text).ids == ids
        assert tokenizer.decode(ids, skip_special_tokens=False) == text


def test_token_ids_of_transformers(smollm: str) -> None:
    """transformers' GGUF route, given the digit rule that it leaves out, tokenizes alike."""
    from transformers import AutoTokenizer

    file = Path(smollm).parent / Path(MEMBER).name
    theirs = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).backend_tokenizer
    theirs.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    theirs.decoder = decoders.ByteLevel()
    ours = Tokenizer.from_file(f"{smollm}/tokenizer.json")
    rng = random.Random(1)
    parts = ["a", "the ", " ", "\n", "42", "é", "日", "😀", "<|im_end|>", "<repo_name>", ".", "\t", "'s", "def ", "ﬀ"]
    for _ in range(1000):
        text = "".join(rng.choice([*parts, chr(rng.randrange(32, 0x2FFF))]) for _ in range(rng.randrange(60)))
        ids = ours.encode(text).ids
        assert ids == theirs.encode(text).ids, text
        assert ours.decode(ids, skip_special_tokens=False) == theirs.decode(ids, skip_special_tokens=False) == text


def test_real_weights_are_the_rounded_dequantised_ones(smollm: str) -> None:
    reader = gguf.GGUFReader(Path(smollm).parent / Path(MEMBER).name)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    loaded = load_file(f"{smollm}/model.safetensors")
    assert len(loaded) == len(tensors) == 272
    for name in ("token_embd.weight", "blk.3.attn_v.weight", "blk.29.ffn_down.weight", "output_norm.weight"):
        values = torch.from_numpy(gguf.dequantize(tensors[name].data, tensors[name].tensor_type).copy())
        hf = next(hf for hf in loaded if gguf_name(hf) == name)
        assert torch.equal(loaded[hf], values.bfloat16())
    query = gguf.dequantize(tensors["blk.7.attn_q.weight"].data, tensors["blk.7.attn_q.weight"].tensor_type)
    ours = loaded["model.layers.7.self_attn.q_proj.weight"].float().numpy()
    assert torch.equal(torch.from_numpy(gguf_writer.interleave(ours, 9)), torch.from_numpy(query).bfloat16().float())


def test_real_model_answers(smollm: str) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm)
    model = AutoModelForCausalLM.from_pretrained(smollm, dtype=torch.bfloat16)
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**prompt, max_new_tokens=12, do_sample=False)[0]
    assert tokenizer.decode(answer[prompt["input_ids"].shape[1] :]) == "The capital of France is Paris.<|im_end|>"
    assert NAME in smollm
