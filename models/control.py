"""Control tokens (`<|im_start|>`, `[INST]`, `<bos>` ...), and text of users that can never become one.

Used by template.py, which masks everything that came in a request before it renders, and by tokenizer.py, which encodes
the rendered text. Masking replaces the punctuation with which control tokens begin and end by Unicode noncharacters,
one to one, so that a rendered string says of each such character whether the template or the user wrote it.
Invariant: a control token is live in masked text only if the template itself wrote its first and last punctuation,
however the template cut, joined or trimmed the user's strings. (A token of letters alone has none: it is split where
it stands whole in a user's string.)
"""

import re
from collections.abc import Iterable, Sequence
from typing import Any, Final

import msgspec
from tokenizers import Tokenizer

from ..errors import StartupError

OPEN, CLOSE, TAG, BREAK = "\ufdd0", "\ufdd1", "\ufdd2", "\ufdd3"
"""Noncharacters of ours. OPEN number CLOSE spells a live token, TAG marks a place for the template renderer,
BREAK splits a token that has no punctuation to replace."""

# Noncharacters are never part of text that is interchanged, so what users send of them becomes U+FFFD.
_NONCHARACTERS: Final = [chr(c) for c in range(0xFDD0, 0xFDF0)] + [
    chr(plane << 16 | low) for plane in range(1, 17) for low in (0xFFFE, 0xFFFF)
]
_REPLACEMENTS: Final = _NONCHARACTERS[4:]


class ControlTokens:
    """The control tokens of one tokenizer. Immutable; safe to share between threads."""

    def __init__(self, tokens: Sequence[str]) -> None:
        """Raises StartupError when the tokens begin and end with more kinds of punctuation than can be masked."""
        self.tokens = tuple(t for t in tokens if t)
        guards = sorted({c for t in self.tokens for c in _ends(t)})
        if len(guards) > len(_REPLACEMENTS):
            raise StartupError(f"the tokenizer's control tokens use {len(guards)} kinds of punctuation; too many")
        self._guards = dict(zip(guards, _REPLACEMENTS, strict=False))
        self._plain = {masked: plain for plain, masked in self._guards.items()} | {BREAK: ""}
        self._bare = {t for t in self.tokens if not _ends(t)}
        self._numbers = {token: i for i, token in enumerate(self.tokens)}
        self._any_token = re.compile(_pattern(self.tokens) if self.tokens else "(?!)")

    def mask(self, literals: Iterable[str] = ()) -> "Mask":
        """How to mask for a template that looks for `literals` inside the strings it gets."""
        kept = {text for text in literals if any(g in text for g in self._guards) and not self._touches(text)}
        return Mask(self._guards, self._bare, kept)

    def unmask(self, text: str) -> str:
        """The text that a masked one stands for."""
        for masked, plain in self._plain.items():
            text = text.replace(masked, plain)
        return text

    def is_masked(self, text: str) -> bool:
        return any(masked in text for masked in self._plain)

    def all_live(self, masked: str, plain: str) -> bool:
        """Whether every control token in `plain`, the unmasked text, is live: then it can be encoded as it is."""
        if len(masked) != len(plain):
            return False
        return all(masked.startswith(found[0], found.start()) for found in self._any_token.finditer(plain))

    def spell(self, masked: str) -> str:
        """The plain text with each live token written as its `spelling`, and the others left as they are."""
        return self.unmask(self._any_token.sub(lambda found: spelling(self._numbers[found[0]]), masked))

    def _touches(self, text: str) -> bool:
        """Whether a control token could lie in, over an end of, or around `text`."""
        return any(
            token in text or text in token or any(text.endswith(token[:n]) or text.startswith(token[n:]) for n in cuts)
            for token in self.tokens
            for cuts in (range(1, len(token)),)
        )


class Mask:
    """Makes the strings of one request inert. Lengths do not change, except by BREAK in tokens without punctuation."""

    def __init__(self, guards: dict[str, str], bare: Iterable[str], kept: Iterable[str]) -> None:
        self._replace = guards | dict.fromkeys(_NONCHARACTERS, "\ufffd")
        self._replace |= {text: text for text in kept}
        self._replace |= {token: token[0] + BREAK + token[1:] for token in bare}
        longest_first = sorted((t for t in self._replace if len(t) > 1), key=len, reverse=True)
        single = "[" + "".join(re.escape(t) for t in self._replace if len(t) == 1) + "]"
        self._pattern = re.compile("|".join([*map(re.escape, longest_first), single]))

    def text(self, text: str) -> str:
        return self._pattern.sub(lambda m: self._replace[m[0]], text)

    def value(self, value: Any) -> Any:
        """A copy of a JSON value with all its strings masked, keys included. RecursionError if it is too deep."""
        if isinstance(value, str):
            return self.text(value)
        if isinstance(value, dict):
            return {self.text(key): self.value(item) for key, item in value.items()}
        if isinstance(value, list):
            return [self.value(item) for item in value]
        return value


def spelling(index: int) -> str:
    """How a live control token is written for a tokenizer of `isolated`."""
    return f"{OPEN}{index}{CLOSE}"


def isolated(tokenizer: Tokenizer, tokens: Sequence[str]) -> Tokenizer:
    """A copy of `tokenizer` that knows the control tokens only by their `spelling`: their own text is plain text.

    The vocabulary entries are renamed, so that neither a merge nor a whole-word match yields them; ids stay.
    Takes 0.2 s for 49k tokens and some 2 s for 256k, most of it in the library and with the GIL held.
    """

    state = msgspec.json.decode(tokenizer.to_str())
    names = {token: spelling(i) for i, token in enumerate(tokens)}
    model = state["model"]
    if isinstance(model["vocab"], dict):
        model["vocab"] = {names.get(token, token): i for token, i in model["vocab"].items()}
    else:
        model["vocab"] = [[names.get(token, token), score] for token, score in model["vocab"]]
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]
    if "merges" in model:
        pairs = (tuple(m.split(" ", 1)) if isinstance(m, str) else tuple(m) for m in model["merges"])
        model["merges"] = [[a, b] for a, b in pairs if not {a, b, a + b} & names.keys()]
    for added in state["added_tokens"]:
        added["content"] = names.get(added["content"], added["content"])
    return Tokenizer.from_buffer(msgspec.json.encode(state | {"post_processor": None}))


def _pattern(tokens: Iterable[str]) -> str:
    """A regular expression for any of the tokens, the longest at each place.

    Common prefixes are written once: a plain list of 1,000 tokens would be tried one by one at each `[` of the text.
    """
    after: dict[str, list[str]] = {}
    for token in tokens:
        if token:
            after.setdefault(token[0], []).append(token[1:])
    branches = []
    for first, rests in after.items():
        rest = _pattern(rests) if any(rests) else ""
        branches.append(re.escape(first) + (f"(?:{rest})?" if "" in rests and rest else rest))
    return branches[0] if len(branches) == 1 else f"(?:{'|'.join(branches)})"


def _ends(token: str) -> set[str]:
    """First and last punctuation character of a token; letters and spaces are left alone: templates look at those."""
    marks = [c for c in token if not c.isalnum() and not c.isspace()]
    return {marks[0], marks[-1]} if marks else set()
