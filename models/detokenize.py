"""Detokenizer: the text of one growing output, token by token, in whole characters.

The text actor has one per request. Invariant: all that `push` and `finish` return, joined, is the library's decode of
the whole output; a character is held back until its last byte is there, so U+FFFD means that the model really wrote
bytes that are no UTF-8, or ended amid a character. The start follows the prompt: a SentencePiece space is dropped only
where no text stands before it.
One difference: where a run of byte tokens (<0xE2>) is broken, the library replaces the whole run, we keep the
characters that were complete. Tokens are looked up in a table of bytes; tokenizers whose decoder is no such table
(WordPiece) are decoded in a window over the last tokens.
"""

import codecs
from collections.abc import Sequence
from typing import Final, Protocol

from .tokenizer import ByteScheme, Tokenizer

MAX_BYTES: Final = 4
"""Bytes of the longest UTF-8 character, so tokens that it can be spread over."""

_REPLACEMENT: Final = "\ufffd"


class Detokenizer(Protocol):
    """Text of one output."""

    def push(self, token: int) -> str:
        """What the next token adds: maybe nothing yet."""

    def finish(self) -> str:
        """What was held back. Nothing may be pushed afterwards."""


class TokenBytes(dict[int, bytes]):
    """token -> its bytes as they are shown, filled on demand; shared by all requests with the same options."""

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool, shown: frozenset[str]) -> None:
        super().__init__()
        self._tokenizer = tokenizer
        special = tokenizer.special_ids if skip_special_tokens else frozenset[int]()
        self._hidden = frozenset(token for token in special if tokenizer.added[token] not in shown)

    def __missing__(self, token: int) -> bytes:
        shown = b"" if token in self._hidden or token < 0 else self._tokenizer.token_bytes(token)
        self[token] = shown
        return shown


class Detokenizers:
    """Makes detokenizers for one tokenizer."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.bytes = TokenBytes(tokenizer, False, frozenset())
        """token -> its bytes, special ones too."""
        self._skipping: dict[frozenset[str], TokenBytes] = {}
        """By the special tokens that are shown all the same: as many as there are parsers in use."""

    def new(
        self,
        prompt: Sequence[int],
        skip_special_tokens: bool = True,
        spaces_between_special_tokens: bool = True,
        shown: frozenset[str] = frozenset(),
    ) -> Detokenizer:
        """A detokenizer for the output after `prompt` (only its end is looked at).

        `shown`: special tokens that are not skipped; decoders of the WordPiece kind skip them all the same.
        `spaces_between_special_tokens` False: added tokens in a row are joined without the space that decoders of the
        WordPiece kind put between tokens; the others put none.
        """
        scheme = self._tokenizer.scheme
        if scheme is None:
            return WindowDetokenizer(self._tokenizer, prompt, skip_special_tokens, spaces_between_special_tokens)
        table = self._skipping_but(shown) if skip_special_tokens else self.bytes
        if scheme.lead != "keep" and not any(table[token] for token in reversed(prompt)):
            return LeadDetokenizer(table, scheme)
        return ByteDetokenizer(table, scheme)

    def text(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of all these tokens."""
        detokenizer = self.new((), skip_special_tokens)
        return "".join(map(detokenizer.push, ids)) + detokenizer.finish()

    def _skipping_but(self, shown: frozenset[str]) -> TokenBytes:
        if shown not in self._skipping:
            self._skipping[shown] = TokenBytes(self._tokenizer, True, shown)
        return self._skipping[shown]


class ByteDetokenizer:
    """For decoders that map each token to bytes."""

    __slots__ = ("_decode", "_table")

    def __init__(self, table: TokenBytes, scheme: ByteScheme) -> None:
        errors = "replace" if scheme.kind == "byte-level" else "actorserve.each_byte"
        self._decode = codecs.getincrementaldecoder("utf-8")(errors).decode
        self._table = table

    def push(self, token: int) -> str:
        return self._decode(self._table[token])

    def finish(self) -> str:
        return self._decode(b"", True)


class LeadDetokenizer(ByteDetokenizer):
    """The same at the start of all text, where SentencePiece's first space is not shown."""

    __slots__ = ("_lead",)

    def __init__(self, table: TokenBytes, scheme: ByteScheme) -> None:
        super().__init__(table, scheme)
        self._lead = scheme.lead

    def push(self, token: int) -> str:
        shown = self._table[token]
        if shown and self._lead != "keep":
            shown = shown.removeprefix(b" ") if self._lead == "strip" else shown.replace(b" ", b"")
            self._lead = "keep"
        return self._decode(shown)


class WindowDetokenizer:
    """For all other decoders: decode the tokens since the last place that was whole, and show what is new."""

    __slots__ = ("_added", "_ids", "_last_added", "_read", "_skip", "_start", "_tokenizer")

    CONTEXT: Final = 5
    """Tokens before the new one that the decoder may look at."""

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], skip: bool, spaces: bool) -> None:
        self._tokenizer = tokenizer
        self._skip = skip
        self._ids = list(prompt[-self.CONTEXT :])
        self._start = 0  # the window is _ids[_start:]; of it _ids[:_read] is shown
        self._read = len(self._ids)
        self._added = {} if spaces or skip else tokenizer.added
        self._last_added = False

    def push(self, token: int) -> str:
        self._ids.append(token)
        text = self._new_text()
        if not text or (text.endswith(_REPLACEMENT) and len(self._ids) - self._read < MAX_BYTES):
            return ""
        joined = token in self._added and self._last_added
        self._last_added = token in self._added
        self._ids = self._ids[-self.CONTEXT :]
        self._read = len(self._ids)
        return text.lstrip(" ") if joined else text

    def finish(self) -> str:
        return self._new_text() if self._read < len(self._ids) else ""

    def _new_text(self) -> str:
        shown = self._tokenizer.decode(self._ids[: self._read], self._skip)
        return self._tokenizer.decode(self._ids, self._skip)[len(shown) :]


def _each_byte(error: UnicodeError) -> tuple[str, int]:
    """One U+FFFD for each byte, as the library's ByteFallback does it."""
    assert isinstance(error, UnicodeDecodeError)
    return _REPLACEMENT * (error.end - error.start), error.end


codecs.register_error("actorserve.each_byte", _each_byte)
