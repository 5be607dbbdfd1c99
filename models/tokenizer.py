"""Tokenizer: text to token ids and token ids to bytes, from a Hugging Face folder, without importing transformers.

Used by the text actor and the detokenizer. Invariant: `encode` gives the ids of transformers' AutoTokenizer, BOS
included; `encode_chat` gives those of its apply_chat_template, except that text which a user sent never becomes a
control token. Safe to use from several threads; the library releases the GIL while it encodes.
"""

import hashlib
import json
import os
import re
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal, TypeAlias

import tokenizers
from tokenizers import AddedToken

from ..errors import RequestError, StartupError
from .cache import cache_folder, locked, publish
from .control import ControlTokens, isolated, spelling
from .vision_config import PLACEHOLDER, is_yi

Json: TypeAlias = dict[str, Any]

# Threads inside the library are no use for single texts, and it writes a warning in every process forked after them.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

_NAMED: Final = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
_SLOW_FILES: Final = ("tokenizer.model", "spiece.model", "vocab.json", "merges.txt", "vocab.txt", "tekken.json")
COMPOSED: Final = 4
"""Normalization to NFC makes one character of so many at most (U+1F82)."""
KEEPING: Final = ("NFC", "NFD", "Prepend", "Lowercase", "ByteLevel")
"""Normalizers that leave out nothing of a text; NFC joins characters."""
MOST_IDS: Final = 1 << 31
NONSENSE: Final = (AttributeError, KeyError, TypeError, ValueError)
"""What a value of another kind than the one that is meant raises, wherever that is found out."""
_BYTE_TOKEN: Final = re.compile(r"<0x([0-9A-Fa-f]{2})>")


@dataclass(frozen=True, slots=True)
class ByteScheme:
    """How token strings map to bytes, one by one; read from the decoder of tokenizer.json."""

    kind: Literal["byte-level", "sentencepiece"]
    replacements: tuple[tuple[str, str], ...] = ()
    byte_fallback: bool = False
    lead: Literal["keep", "strip", "drop"] = "keep"
    """What happens at the very start of a text: nothing, one space goes, or all spaces of the first token go."""


@dataclass(frozen=True, slots=True)
class TokenizerFiles:
    """What a model folder says of its tokenizer beside tokenizer.json."""

    config: Json
    special: Mapping[str, str]
    """bos_token, eos_token, ...: their text."""
    eos_ids: tuple[int, ...]
    templates: Mapping[str, str] = field(default_factory=dict)
    """Chat templates by name; "default" is the usual one."""
    placeholder: bool = False
    """Text has a mark for images that is no token (Yi-VL)."""


class Tokenizer:
    """One tokenizer. Attributes are set once."""

    def __init__(self, core: tokenizers.Tokenizer, files: TokenizerFiles) -> None:
        self.core = core
        self.special_tokens = dict(files.special)
        self.templates = dict(files.templates)
        self.vocab_size: int = core.get_vocab_size(with_added_tokens=True)
        added = core.get_added_tokens_decoder()
        self.added = {i: token.content for i, token in added.items()}
        """Added tokens, special or not: id to text."""
        self.special_ids = frozenset(i for i, token in added.items() if token.special)
        self.bos_id = self._id("bos_token")
        self.pad_id = self._id("pad_token")
        self.eos_ids = files.eos_ids or tuple(i for i in (self._id("eos_token"),) if i is not None)
        self.text_end = self._id("eos_token") if files.config.get("add_eos_token") is True else None
        """Token that embedding models of this tokenizer want behind a text, whatever tokenizer.json says."""
        self.scheme = byte_scheme(_state(core.decoder))
        longest = max(map(len, core.get_vocab(with_added_tokens=True)), default=1)
        self.chars_per_token = COMPOSED * longest if _keeps_all(core, self.scheme) else None
        """Most characters of a text that can be behind one of its tokens; None: any number."""
        # Special tokens, and those that look like one (<|fim_prefix|>). Marks that models write themselves and
        # templates look for in old messages (<think>, <tool_call>) are ordinary text with an id of its own.
        self.control = ControlTokens(
            [t.content for t in added.values() if t.special or (t.content[:2] == "<|" and t.content[-2:] == "|>")]
        )
        self._isolated: tokenizers.Tokenizer | None = None
        self._renumber: dict[int, int] = {}
        self._building = threading.Lock()

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`, in which control tokens are recognised; BOS and the like are added if the model does.

        Raises RequestError for text that has no UTF-8 form.
        """
        return self._encode(self.core, text, add_special_tokens)

    def encode_first(self, text: str, most: int) -> list[int]:
        """The first of `encode`'s tokens, `most` in all with those that it adds; never fewer than these.

        Raises as `encode`.
        """
        try:
            encoding = self.core.encode(text, add_special_tokens=False)
        except (TypeError, UnicodeEncodeError) as error:
            raise RequestError("the text holds half of a surrogate pair, which is no character") from error
        encoding.truncate(max(0, most - self.core.num_special_tokens_to_add(False)))
        ids: list[int] = self.core.post_process(encoding, add_special_tokens=True).ids
        return ids

    def encode_pair(self, first: str, second: str, most: int = 0) -> tuple[list[int], int]:
        """(token ids of two texts joined as the model joins pairs, where tokens of the second type begin or 0).

        `most`: no more tokens than that, 0 for all; the longer text loses its end first, as with transformers'
        truncation=True; the tokens that the model adds stay. Raises as `encode`.
        """
        try:
            one, two = (self.core.encode(text, add_special_tokens=False) for text in (first, second))
        except (TypeError, UnicodeEncodeError) as error:
            raise RequestError("the text holds half of a surrogate pair, which is no character") from error
        if most:
            keep = longest_first(len(one), len(two), max(0, most - self.core.num_special_tokens_to_add(True)))
            one.truncate(keep[0])
            two.truncate(keep[1])
        joined = self.core.post_process(one, two, add_special_tokens=True)
        types: list[int] = joined.type_ids
        return joined.ids, types.index(1) if 1 in types else 0

    def encode_chat(self, masked: str) -> list[int]:
        """Token ids of what a chat template rendered from masked strings: the template's control tokens are live."""
        plain = self.control.unmask(masked)
        if plain is masked or self.control.all_live(masked, plain):
            return self._encode(self.core, plain, False)
        ids = self._encode(self._isolated_core(), self.control.spell(masked), False)
        return [self._renumber.get(i, i) for i in ids] if self._renumber else ids

    def prepare(self) -> None:
        """Do now what the first conversation with a control token in a user's text would wait for."""
        self._isolated_core()

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The library's decode of the whole; the incremental one is in detokenize.py."""
        return self.core.decode(ids, skip_special_tokens=skip_special_tokens)

    def token_bytes(self, token: int) -> bytes:
        """The bytes a token stands for, b"" if there is no such token. A part of a UTF-8 character at times."""
        piece = self.core.id_to_token(token)
        if piece is None:
            return b""
        if self.scheme is None:
            return (self.core.decoder.decode([piece]) if self.core.decoder else piece).encode()
        if self.scheme.kind == "byte-level":
            try:
                return bytes([_BYTE_OF[c] for c in piece])
            except KeyError:
                return str(piece).encode()
        if self.scheme.byte_fallback and (match := _BYTE_TOKEN.fullmatch(piece)):
            return bytes([int(match[1], 16)])
        for old, new in self.scheme.replacements:
            piece = piece.replace(old, new)
        return str(piece).encode()

    def _id(self, name: str) -> int | None:
        text = self.special_tokens.get(name)
        token: int | None = None if text is None else self.core.token_to_id(text)
        return token

    def _encode(self, core: tokenizers.Tokenizer, text: str, add_special_tokens: bool) -> list[int]:
        try:
            # A batch of one: unlike `encode` it releases the GIL, and it is twice as fast, for it counts no offsets.
            ids: list[int] = core.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids
        except (TypeError, UnicodeEncodeError) as error:
            raise RequestError("the text holds half of a surrogate pair, which is no character") from error
        return ids

    def _isolated_core(self) -> tokenizers.Tokenizer:
        with self._building:
            if self._isolated is None:
                tokens = self.control.tokens
                core = isolated(self.core, tokens)
                names = {t: spelling(i) for i, t in enumerate(tokens)}
                numbers = ((core.token_to_id(names.get(text, text)), i) for i, text in self.added.items())
                self._renumber = {new: old for new, old in numbers if new is not None and new != old}
                self._isolated = core
            return self._isolated


def longest_first(first: int, second: int, most: int) -> tuple[int, int]:
    """Return how many of the tokens of two texts are kept, `most` in all: what is too much the longer one loses, until
    both are equally long (the rule of the library's truncation)."""
    if first + second <= most:
        return first, second
    short, long = sorted((first, second))
    long = max(short, most - short)
    if short + long > most:
        short, long = most // 2, most - most // 2
    return (short, long) if first <= second else (long, short)


def load_tokenizer(path: str) -> Tokenizer:
    """Read the tokenizer of a Hugging Face folder.

    Whether BOS is added is what tokenizer.json says: as transformers 5, it goes before add_bos_token elsewhere.
    Slow-only folders (tokenizer.model and the like) are converted by transformers once, into the cache.

    Raises:
        StartupError: there is none, or it is broken.
    """
    folder = Path(path)
    file = folder / "tokenizer.json"
    if not file.is_file():
        file = _converted(folder)
    try:
        core = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises bare Exception
        raise StartupError(f"{file.name} cannot be read as a tokenizer: {error}") from error
    core.no_truncation()
    core.no_padding()
    try:
        files = read_files(folder, core)
        _add_tokens(core, files)
    except NONSENSE as error:
        raise StartupError(f"the tokenizer's configuration holds a value that makes no sense: {error!r}") from error
    return Tokenizer(core, files)


def read_files(folder: Path, core: tokenizers.Tokenizer) -> TokenizerFiles:
    """What the folder's other files say: special tokens, ends of sequence, chat templates."""
    config, model = _json(folder / "tokenizer_config.json"), _json(folder / "config.json")
    generation = _json(folder / "generation_config.json")
    special: dict[str, str] = {}
    for source in (_json(folder / "special_tokens_map.json"), config):
        special |= {name: text for name in _NAMED if (text := _content(source.get(name))) is not None}
    for name in ("bos", "eos", "pad"):
        token = _first(generation.get(f"{name}_token_id"), model.get(f"{name}_token_id"))
        if f"{name}_token" not in special and f"{name}_token" not in config and token is not None:
            text = core.id_to_token(token)
            if text is not None:
                special[f"{name}_token"] = text
    eos = [*_ints(generation.get("eos_token_id")), *_ints(model.get("eos_token_id"))]
    if "eos_token" in special and (own := core.token_to_id(special["eos_token"])) is not None:
        eos.append(own)
    return TokenizerFiles(config, special, tuple(dict.fromkeys(eos)), chat_templates(folder, config), is_yi(model))


def byte_scheme(decoder: Json | None) -> ByteScheme | None:
    """How a tokenizer.json decoder maps tokens to bytes; None if it does not do so token by token (WordPiece)."""
    steps = decoder["decoders"] if decoder and decoder["type"] == "Sequence" else [decoder] if decoder else []
    kinds = [step["type"] for step in steps]
    if kinds == ["ByteLevel"]:
        return ByteScheme("byte-level")
    if kinds == ["Metaspace"]:
        lead: Literal["keep", "drop"] = "keep" if steps[0].get("prepend_scheme", "always") == "never" else "drop"
        return ByteScheme("sentencepiece", ((steps[0]["replacement"], " "),), lead=lead)
    if not steps or set(kinds) - {"Replace", "ByteFallback", "Fuse", "Strip"}:
        return None
    strips = [step for step in steps if step["type"] == "Strip"]
    if any((s["content"], s["start"], s["stop"]) != (" ", 1, 0) for s in strips) or len(strips) > 1:
        return None
    if strips and (kinds[-1] != "Strip" or "Fuse" not in kinds):
        return None  # it would strip each token
    replaces = [step for step in steps if step["type"] == "Replace"]
    if any("String" not in step["pattern"] for step in replaces):
        return None
    pairs = tuple((step["pattern"]["String"], step["content"]) for step in replaces)
    return ByteScheme("sentencepiece", pairs, "ByteFallback" in kinds, "strip" if strips else "keep")


def _add_tokens(core: tokenizers.Tokenizer, files: TokenizerFiles) -> None:
    """Tokens that only tokenizer_config.json names become added tokens, as transformers does it."""
    flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
    known = {token.content for token in core.get_added_tokens_decoder().values()}
    listed = sorted(files.config.get("added_tokens_decoder", {}).items(), key=lambda item: int(item[0]))
    for _, token in listed:
        if token["content"] not in known:
            core.add_tokens([AddedToken(token["content"], **{f: bool(token.get(f)) for f in flags})])
    more = files.config.get("extra_special_tokens") or files.config.get("additional_special_tokens") or []
    extra = more.values() if isinstance(more, dict) else more
    names = [*files.special.values(), *filter(None, map(_content, extra))]
    special = {token.content for token in core.get_added_tokens_decoder().values() if token.special}
    names += [PLACEHOLDER] if files.placeholder else []
    core.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in names if t not in special])


def chat_templates(folder: Path, config: Json) -> dict[str, str]:
    """Chat templates by name. chat_template.jinja goes before tokenizer_config.json. Raises StartupError."""
    try:
        found = _chat_templates(folder, config)
    except NONSENSE as error:
        raise StartupError(f"the model's chat templates cannot be read: {error!r}") from error
    if not all(isinstance(text, str) for text in (*found, *found.values())):
        raise StartupError("the model's chat templates cannot be read: one is no text")
    return found


def _chat_templates(folder: Path, config: Json) -> dict[str, str]:
    found: dict[str, str] = {}
    given = config.get("chat_template") or _json(folder / "chat_template.json").get("chat_template")
    if isinstance(given, str):
        found["default"] = given
    elif isinstance(given, dict):
        found |= given
    elif given:
        found |= {entry["name"]: entry["template"] for entry in given}
    for file in sorted((folder / "additional_chat_templates").glob("*.jinja")):
        found[file.stem] = file.read_text(encoding="utf-8")
    if (main := folder / "chat_template.jinja").is_file():
        found["default"] = main.read_text(encoding="utf-8")
    return found


def _converted(folder: Path) -> Path:
    """tokenizer.json made from a slow tokenizer's files; kept in the cache under the hash of those files."""
    files = [folder / name for name in _SLOW_FILES if (folder / name).is_file()]
    if not files:
        raise StartupError("the model folder has no tokenizer (tokenizer.json); pass --tokenizer-path DIR")
    extra = [f for f in (folder / "tokenizer_config.json", folder / "special_tokens_map.json") if f.is_file()]
    digest = hashlib.sha256(b"".join(f.read_bytes() for f in (*files, *extra))).hexdigest()[:32]
    target = cache_folder() / "tokenizers" / digest
    target.parent.mkdir(exist_ok=True)
    with locked(target):
        if not target.exists():
            with publish(target) as out:
                _convert_slow(folder, out / "tokenizer.json")
    return target / "tokenizer.json"


def _convert_slow(folder: Path, file: Path) -> None:
    from transformers import AutoTokenizer  # seconds to import: only here

    try:
        slow = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)
        slow.backend_tokenizer.save(str(file))
    except Exception as error:  # whatever transformers or sentencepiece raises
        raise StartupError(f"the tokenizer cannot be converted to tokenizer.json: {error}") from error


def _keeps_all(core: tokenizers.Tokenizer, scheme: ByteScheme | None) -> bool:
    """Whether all of a text is in its tokens. Others make one token of a run of unknown characters or spaces, or none
    (Unigram, as XLM-RoBERTa has it)."""
    model = core.model
    if scheme is None or not isinstance(model, tokenizers.models.BPE):
        return False
    return (scheme.kind == "byte-level" or model.byte_fallback) and _shortens_nothing(_state(core.normalizer))


def _shortens_nothing(normalizer: Json | None) -> bool:
    if normalizer is None:
        return True
    if normalizer["type"] == "Sequence":
        return all(map(_shortens_nothing, normalizer["normalizers"]))
    if normalizer["type"] == "Replace":
        return len(normalizer["content"]) >= len(normalizer["pattern"].get("String", normalizer["content"] + "*"))
    return normalizer["type"] in KEEPING


def _state(part: Any) -> Json | None:
    """A part of tokenizer.json, as the library holds it."""
    state: Json | None = None if part is None else json.loads(part.__getstate__())
    return state


def _json(file: Path) -> Json:
    if not file.is_file():
        return {}
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise StartupError(f"{file.name} is not JSON: {error}") from error
    return value if isinstance(value, dict) else {}


def _content(token: Any) -> str | None:
    """A token's text: configurations give it as a string or as a dict with flags."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None


def _ints(value: Any) -> list[int]:
    """The token ids of a configuration, where there is none at times -1."""
    return [v for v in (value if isinstance(value, list) else [value]) if isinstance(v, int) and 0 <= v < MOST_IDS]


def _first(*values: Any) -> int | None:
    return next((i for value in values for i in _ints(value)), None)


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's map of the 256 bytes to printable characters, backwards."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in set(printable)]
    return {chr(b): b for b in printable} | {chr(0x100 + i): b for i, b in enumerate(others)}


_BYTE_OF: Final = _byte_alphabet()
