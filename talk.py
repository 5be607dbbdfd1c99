"""Whom the terminal commands talk to: a running server over OpenAI's API, or an engine inside this process.

Used by chat.py and complete.py. Both give an answer as it comes, in Pieces. Invariant: what goes wrong is an
ActorserveError whose text is one line that says what to do; leaving an iterator early stops the work behind it.
"""

import argparse
import json
import os
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.client import HTTPException
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol, TypeAlias

from .errors import ActorserveError, EngineDown, RequestError

if TYPE_CHECKING:
    from .outputs import Delta
    from .sync_engine import SyncEngine

DEFAULT_URL: Final = "http://127.0.0.1:30000"
URL_VARIABLE: Final = "ACTORSERVE_URL"
KEY_VARIABLE: Final = "ACTORSERVE_API_KEY"
TIMEOUT: Final = 600.0
"""Seconds without a byte from the server."""

Message: TypeAlias = dict[str, str]
Pieces: TypeAlias = "Generator[Piece, None, None]"
Options: TypeAlias = dict[str, Any]
"""Sampling parameters under OpenAI's names, our extras (top_k, min_p, ...) and `json_schema`."""

SAMPLING: Final[dict[str, tuple[type, str]]] = {
    "temperature": (float, "0 takes the likeliest token always; 1 samples as the model says"),
    "max_tokens": (int, "the longest answer"),
    "top_p": (float, "only the likeliest tokens that together have this probability"),
    "top_k": (int, "only so many of the likeliest tokens"),
    "min_p": (float, "only tokens of at least this part of the likeliest one's probability"),
    "repetition_penalty": (float, "above 1: what was said before is said less"),
    "presence_penalty": (float, "above 0: new words are liked"),
    "frequency_penalty": (float, "above 0: frequent words are disliked"),
    "seed": (int, "the same seed and settings give the same answer"),
}
"""Each parameter with its type and what it does, for flags and for /set."""


@dataclass(frozen=True, slots=True)
class Piece:
    """More of an answer. The counts are totals so far, 0 where the server does not say."""

    text: str = ""
    thought: str = ""
    tokens: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    finish: str | None = None


class Partner(Protocol):
    """Who answers. Both methods raise ActorserveError."""

    name: str
    """The model."""
    place: str
    """Where it is, for people."""

    def chat(self, messages: Sequence[Message], options: Options) -> Pieces: ...

    def complete(self, prompt: str, options: Options) -> Pieces: ...


@dataclass(slots=True)
class Figures:
    """What an answer took; times by time.monotonic()."""

    began: float = field(default_factory=time.monotonic)
    first: float = 0.0
    last: float = 0.0
    first_tokens: int = 0
    piece: Piece = Piece()
    """The last that had counts."""
    finish: str | None = None

    def take(self, piece: Piece) -> None:
        """Count one more piece."""
        now = time.monotonic()
        self.finish = piece.finish or self.finish
        if piece.tokens:
            self.piece = piece
        if piece.text or piece.thought:
            if not self.first:
                self.first, self.first_tokens = now, max(piece.tokens, 1)
            self.last = now

    def line(self) -> str:
        """For example "42 tokens, 31.0 tokens/s, first after 0.12 s, 36 of 40 prompt tokens cached"."""
        parts = [f"{self.piece.tokens:,} tokens"] if self.piece.tokens else []
        more, seconds = self.piece.tokens - self.first_tokens, self.last - self.first
        if more > 0 and seconds > 0:
            parts.append(f"{more / seconds:.1f} tokens/s")
        if self.first:
            parts.append(f"first after {self.first - self.began:.2f} s")
        if self.piece.prompt_tokens:
            parts.append(f"{self.piece.cached_tokens:,} of {self.piece.prompt_tokens:,} prompt tokens cached")
        if self.finish not in (None, "stop"):
            parts.append({"length": "cut at max_tokens"}.get(str(self.finish), str(self.finish)))
        return ", ".join(parts)


# ------------------------------------------------------------------ a running server


class Server:
    """A server with OpenAI's API."""

    def __init__(self, url: str, key: str | None = None, model: str | None = None) -> None:
        """Asks for the served model unless it is given. Raises ActorserveError if nobody answers at `url`."""
        self.place = url.rstrip("/").removesuffix("/v1")
        if not _is_address(self.place):
            raise RequestError(f"--url {url}: not an http(s) address", param="url")
        if key and not (key.isascii() and key.isprintable()):
            raise RequestError("--api-key has what no key has: a line's end, or letters beyond ASCII", param="api_key")
        self._headers = {"content-type": "application/json"} | ({"authorization": f"Bearer {key}"} if key else {})
        self.name = model or self._served()

    def chat(self, messages: Sequence[Message], options: Options) -> Pieces:
        """Answer a conversation."""
        yield from self._stream("/v1/chat/completions", {"messages": list(messages)}, options)

    def complete(self, prompt: str, options: Options) -> Pieces:
        """Continue a text."""
        yield from self._stream("/v1/completions", {"prompt": prompt}, options)

    def _served(self) -> str:
        try:
            with self._open("/v1/models", None) as response:
                return str(json.load(response)["data"][0]["id"])
        except (ValueError, LookupError, TypeError):
            raise EngineDown(f"{self.place} does not list its models: is it a server with OpenAI's API?") from None

    def _stream(self, path: str, body: Mapping[str, Any], options: Options) -> Pieces:
        given = dict(options)
        schema = given.pop("json_schema", None)
        if schema is not None:
            wanted = {"name": "answer", "schema": schema, "strict": True}
            given["response_format"] = {"type": "json_schema", "json_schema": wanted}
        usage = {"include_usage": True, "continuous_usage_stats": True}
        whole = {"model": self.name, **body, **given, "stream": True, "stream_options": usage}
        with self._open(path, json.dumps(whole).encode()) as response:
            try:
                for line in response:
                    if line.startswith(b"data:") and (data := line[5:].strip()) != b"[DONE]":
                        yield _piece(json.loads(data))
            except (OSError, HTTPException) as error:
                raise EngineDown(f"the answer of {self.place} broke off: {error}") from error
            except (ValueError, LookupError, TypeError, AttributeError) as error:
                raise EngineDown(f"{self.place} sends what is not OpenAI's stream: {error}") from error

    @contextmanager
    def _open(self, path: str, body: bytes | None) -> Iterator[Any]:
        request = urllib.request.Request(self.place + path, data=body, headers=self._headers)
        try:
            response = urllib.request.urlopen(request, timeout=TIMEOUT)
        except urllib.error.HTTPError as error:
            raise _refused(error) from None
        except (OSError, HTTPException, ValueError) as error:
            reason = getattr(error, "reason", None) or error
            told = getattr(reason, "strerror", None) or reason
            raise EngineDown(f"nobody answers at {self.place} ({told}); start one: actorserve run") from None
        with response:
            yield response


def _is_address(url: str) -> bool:
    try:
        parts = urllib.parse.urlsplit(url)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0  # reading it checks it
    except ValueError:
        return False


def _piece(event: dict[str, Any]) -> Piece:
    if event.get("error"):
        raise EngineDown(str(event["error"].get("message", "the server ended the answer")))
    choice = event["choices"][0] if event.get("choices") else {}
    delta = choice.get("delta") or {}
    usage = event.get("usage") or {}
    return Piece(
        text=choice.get("text") or delta.get("content") or "",
        thought=delta.get("reasoning_content") or "",
        tokens=usage.get("completion_tokens", 0),
        prompt_tokens=usage.get("prompt_tokens", 0),
        cached_tokens=(usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0,
        finish=choice.get("finish_reason"),
    )


def _refused(error: urllib.error.HTTPError) -> ActorserveError:
    try:
        told = json.loads(error.read())["error"]
        message, param = str(told["message"]), told.get("param")
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        message, param = str(error.reason), None
    if error.code == 401:
        message += f" (give --api-key, or set {KEY_VARIABLE})"
    return RequestError(f"the server answers {error.code}: {message}", param=param, status=error.code)


# ------------------------------------------------------------------ an engine in this process


class Local:
    """An engine of our own."""

    def __init__(self, engine: "SyncEngine") -> None:
        self._engine = engine
        self.name = engine.model.name
        self.place = "in this process"

    def chat(self, messages: Sequence[Message], options: Options) -> Pieces:
        """Answer a conversation."""
        return _pieces(self._engine.chat_stream(messages, **_renamed(options)))

    def complete(self, prompt: str, options: Options) -> Pieces:
        """Continue a text."""
        return _pieces(self._engine.stream(prompt, **_renamed(options)))


def _pieces(deltas: "Iterator[Delta]") -> Pieces:
    for d in deltas:
        yield Piece(d.text, "", d.completion_tokens, d.prompt_tokens, d.cached_tokens, d.finish_reason)


def _renamed(options: Options) -> Options:
    """The options as the embedded API names them."""
    return {{"max_tokens": "max_new_tokens"}.get(name, name): value for name, value in options.items()}


# ------------------------------------------------------------------ the command line


def add_talk_flags(parser: argparse.ArgumentParser) -> None:
    """Flags that say who answers, and how it draws."""
    group = parser.add_argument_group("who answers")
    url = os.environ.get(URL_VARIABLE, DEFAULT_URL)
    group.add_argument("--url", default=url, help=f"a running server (default: ${URL_VARIABLE} or {DEFAULT_URL})")
    group.add_argument("--api-key", metavar="KEY", help=f"the server's key (default: ${KEY_VARIABLE})")
    group.add_argument("--model", metavar="NAME", help="the model, where a server has several")
    group.add_argument(
        "--local",
        nargs="?",
        const="",
        metavar="MODEL",
        help="no server: start an engine here, with a folder, a .gguf file, or the embedded model",
    )
    drawing = parser.add_argument_group("how it answers")
    for name, (kind, text) in SAMPLING.items():
        metavar = "N" if kind is int else "X"
        drawing.add_argument("--" + name.replace("_", "-"), type=kind, metavar=metavar, help=text)
    drawing.add_argument("--stop", action="append", metavar="TEXT", help="end before this text; may be given again")
    drawing.add_argument("--json-schema", metavar="FILE", help="answer in JSON of the schema in this file")


def options_of(parsed: argparse.Namespace) -> Options:
    """The sampling options that were given. Raises RequestError for a schema that cannot be read."""
    names = [*SAMPLING, "stop"]
    options = {name: value for name in names if (value := getattr(parsed, name)) is not None}
    if parsed.json_schema is not None:
        try:
            options["json_schema"] = json.loads(Path(parsed.json_schema).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            told = getattr(error, "strerror", None) or error
            raise RequestError(f"--json-schema {parsed.json_schema}: {told}", param="json_schema") from None
    return options


@contextmanager
def partner_of(parsed: argparse.Namespace) -> Iterator[Partner]:
    """Who answers, by the flags; an engine of our own ends with the block. Raises ActorserveError."""
    if parsed.local is None:
        yield Server(parsed.url, parsed.api_key or os.environ.get(KEY_VARIABLE), parsed.model)
        return
    from .display import Display
    from .engine import Engine  # with trio and the actors, which a client of a server need not wait for

    with Display() as display:
        # Its bars go as they come: the engine tells of stages, not of nodes.
        def progress(stage: str, fraction: float) -> None:
            display.event("progress", "engine", stage, fraction)

        running = Engine.sync(parsed.local or parsed.model, on_progress=progress)
        display.event("spawn", "engine", "", 0.0)
        with running as engine:
            display.event("ready", "engine", "", 1.0)
            yield Local(engine)
