"""Small tokenizers of each kind, built in the test, as Hugging Face folders."""

import json
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SAMPLE = [
    "The quick brown fox jumps over the lazy dog.",
    "Hello there, how are you today? I am fine.",
    "def f(x):\n    return x < 3 and x > 1\n",
    "über naïve café 日本語 🎉",
    "start end user assistant system im_start im_end think",
]
CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def byte_level(folder: Path, single: str = "$A", **config: object) -> str:
    """GPT-2's kind, with ChatML's control tokens; `<think>` is not special. `single`: what goes around a text."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=CONTROL, initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator(SAMPLE * 4, trainer)
    core.add_tokens([AddedToken("<think>", normalized=False), AddedToken("</think>", normalized=False)])
    numbered = [(text, i) for i, text in enumerate(CONTROL)]
    core.post_processor = processors.TemplateProcessing(single=single, special_tokens=numbered)
    defaults = {"eos_token": "<|im_end|>", "bos_token": "<|endoftext|>", "chat_template": CHATML}
    return _save(folder, core, defaults | config)


def sentencepiece(folder: Path, bos: bool = True, **config: object) -> str:
    """Llama 2's kind: a space before the text, byte tokens for what the vocabulary lacks."""
    words = ["Hello", "there", "how", "are", "you", "<s", "s>", "[INST", "INST]"]
    characters = sorted({c for w in words for c in w} | set("▁.,!?abcdefghijklmnopqrstuvwxyz<>[]/|_é"))
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"<0x{b:02X}>": 3 + b for b in range(256)}
    merges: list[tuple[str, str]] = []
    for c in characters:
        vocab.setdefault(c, len(vocab))
    for word in ["▁" + w for w in words] + ["<s>", "</s>"]:
        for i in range(2, len(word) + 1):
            pair = (word[: i - 1], word[i - 1])
            if pair not in merges:
                merges.append(pair)
                vocab.setdefault(word[:i], len(vocab))
    core = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    core.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in ("<unk>", "<s>", "</s>")])
    if bos:
        core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    defaults = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    template = "{{ bos_token }}{% for m in messages %}[INST] {{ m.content | trim }} [/INST]{% endfor %}"
    return _save(folder, core, defaults | {"chat_template": template} | config)


def word_piece(folder: Path) -> str:
    """A kind whose decoder is no table of bytes."""
    words = ["[UNK]", "[SEP]", "hello", "there", "##s", "##ing", "the", "dog", ","]
    core = Tokenizer(models.WordPiece({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    core.decoder = decoders.WordPiece(cleanup=False)
    core.add_special_tokens(["[UNK]", "[SEP]"])
    return _save(folder, core, {"eos_token": "[SEP]"})


def _save(folder: Path, core: Tokenizer, config: dict[str, object]) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    core.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast"} | {k: v for k, v in config.items() if v is not None}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return str(folder)
