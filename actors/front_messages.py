"""What fronts and text tell each other: requests with their prompts, and their output."""

from typing import Literal, TypeAlias

from msgspec import field

from ..config import Thoughts
from ..sampler.params import SamplingParams
from .message import Message

# ------------------------------------------------------------------ front -> text


class ImageFile(Message, frozen=True, tag=90):
    """An image of a prompt as the client sent it: the bytes of a file. `field` is what errors about it name."""

    data: bytes
    field: str
    url: str = ""
    """An address, http or https, at which the file is to be had; `data` is empty then."""


class VideoFile(Message, frozen=True, tag=94):
    """A video of a prompt: its frames, in their order."""

    frames: tuple[ImageFile, ...]
    field: str
    interval: float | None = None
    """Seconds from one frame to the next, where the client says so."""


class TextPrompt(Message, frozen=True, tag=4):
    """A prompt as text; special tokens in it are recognised, as SGLang does for /generate.

    Of every prompt: `images` are those of its image tokens, in their order, one each; `videos` those of its video
    tokens.
    """

    text: str
    most: int = 0
    """Of its tokens only the first are taken, so many with the special ones around them; 0: all. Of two texts the
    longer one is cut first."""
    second: str | None = None
    """Another text behind it, joined as the model's tokenizer joins pairs: a cross-encoder's document."""
    images: tuple[ImageFile, ...] = ()
    videos: tuple[VideoFile, ...] = ()


class TokenPrompt(Message, frozen=True, tag=5):
    """A prompt as token ids, int32."""

    ids: memoryview
    images: tuple[ImageFile, ...] = ()
    videos: tuple[VideoFile, ...] = ()


class ChatPrompt(Message, frozen=True, tag=6):
    """A conversation for the chat template. `payload` is JSON: messages, tools, and template options.

    Who sends it reads the output by parsers (models/parsers.py), and says so:
    """

    payload: bytes
    shown: tuple[str, ...] = ()
    """Special tokens that are text of the output even with skip_special_tokens: the parsers' markers."""
    opens: tuple[str, ...] = ()
    """Chunk.thinking says whether the prompt ends in one of these: the opening tags of thoughts."""
    images: tuple[ImageFile, ...] = ()
    videos: tuple[VideoFile, ...] = ()


Prompt: TypeAlias = TextPrompt | TokenPrompt | ChatPrompt


class GrammarSpec(Message, frozen=True, tag=7):
    """What an output must match. Part of Generate, Submit and Compile; equal specs are one grammar."""

    kind: Literal["regex", "json_schema", "choice", "tool_calls", "ebnf", "structural_tag"]
    """Also the name of the field that errors are about."""
    text: str
    """The pattern; the schema as JSON; a JSON array of texts; models/call_grammar.py's Calls as JSON; GBNF or Lark; the
    structural tag as JSON."""
    whitespace: str = "spaced"
    """Of JSON: the name of a policy (fsm/spelling.py)."""
    thoughts: Thoughts | None = None
    """What may come before it, or must, if the prompt ends amid them."""


class Resumed(Message, frozen=True, tag=8):
    """Part of Generate: a choice that goes on after its text actor died, and what its front has of it."""

    rid: int
    ids: memoryview
    """int32, its tokens so far."""
    chars: int
    """Characters of its text so far."""
    logprobs: int
    """Of `ids`, those from the first on whose logprobs came."""
    cached_tokens: int
    forced_tokens: int
    jumps: int
    prompt_logprobs: int = 0
    """Of its prompt, those that came."""


class Generate(Message, frozen=True, tag=10):
    """Front asks for n continuations, with ids `rid` to `rid + n - 1`.

    Owed: for each id Chunks until one with a `finish`, or one Refused for all of them.
    """

    rid: int
    n: int
    prompt: Prompt
    params: SamplingParams
    cache_salt: str = ""
    priority: int = 0
    arrival_ns: int = 0
    """CLOCK_MONOTONIC when the front took the request."""
    grammar: GrammarSpec | None = None
    """What each output must match."""
    tenant: str = ""
    """The API key's name, and its share of the engine in relation to others'."""
    weight: float = 1.0
    resumed: list[Resumed] | None = None
    """Asked again after a text actor's death: the choices that have not ended. None: all n begin."""
    pin: int = 0
    """What the first choice leaves in the prefix cache stays there until the next request with this number has left
    something, or Unpin; 0: nothing is pinned. Numbers are the front's own request ids."""
    pooled: bool = False
    """No output is wanted but the prompt's vector (ModelInfo.pooling), in the one Chunk that comes."""
    name: str = ""
    """What the client calls it; how AskTimelines finds it."""
    dp_rank: int | None = None
    """The replica that is to serve it; None: any."""


class Cancel(Message, frozen=True, tag=11):
    """The client is gone: stop ids `rid` to `rid + n - 1`. Nothing is owed."""

    rid: int
    n: int


class Unpin(Message, frozen=True, tag=16):
    """A front, and text for it: nobody comes back to what these pins hold (Generate.pin). Nothing is owed."""

    pins: memoryview
    """int64"""


class Tokenize(Message, frozen=True, tag=12):
    """Front asks for the token ids of a prompt. Owed: Tokenized or Refused."""

    rid: int
    prompt: Prompt
    add_special_tokens: bool = True
    """For texts: put BOS and the like where the model has it."""


class Detokenize(Message, frozen=True, tag=13):
    """Front asks for the text of token ids (int32, of the vocabulary). Owed: Detokenized or Refused."""

    rid: int
    ids: memoryview
    skip_special_tokens: bool


Action: TypeAlias = Literal[
    "flush_cache",
    "pause",
    "pause_abort",
    "pause_retract",
    "continue",
    "start_profile",
    "stop_profile",
    "update_weights",
    "update_weights_abort",
]


class Order(Message, frozen=True, tag=14):
    """Front tells the schedulers, through text, to do something. Owed: Done or Refused, by all of them together.

    flush_cache: empty the prefix cache; refused while there are requests. pause: make no more plans, so that running
    requests stand still with their pages; pause_abort: also end all of them; pause_retract: also take their pages.
    continue: make plans again. start_profile, stop_profile: of the executors; Done.text names the file.
    update_weights: other weights of the same shapes, from the folder `detail`; running requests are computed again with
    them, or are ended by update_weights_abort; the prefix cache is emptied.
    """

    rid: int
    action: Action
    detail: str = ""
    """What the action needs: profiler.ProfileOptions as JSON, or a folder."""


# ------------------------------------------------------------------ text -> front


class TokenLogprob(Message, frozen=True, tag=34):
    """A token with its logprob, and the most likely ones at its place (id, logprob, text).

    Of a prompt, the first token that was asked for has no logprob: NaN, and nothing else.
    """

    token: int
    logprob: float
    text: bytes
    """The token's own bytes: a part of a UTF-8 character at times."""
    top: list[tuple[int, float, bytes]]
    listed: list[tuple[int, float, bytes]] = field(default_factory=list)
    """The same of the tokens that the request named (token_ids_logprob)."""


class Chunk(Message, frozen=True, tag=35):
    """New output of one request since its last chunk. `finish` is set on its last one, exactly once."""

    rid: int
    text: str
    ids: list[int]
    logprobs: list[TokenLogprob]
    finish: Literal["stop", "length", "abort"] | None
    matched: int | str | None
    """The stop token id or stop string that ended it."""
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    forced_tokens: int = 0
    """Of the completion's, those that a grammar forced and no step had to draw."""
    jumps: int = 0
    """In how many runs they came."""
    thinking: bool = False
    """The prompt ends in one of ChatPrompt.opens: the output begins amid thoughts."""
    valid: bool | None = None
    """In the last chunk of an output with a grammar: whether its text matches; None where that is not known."""
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)
    """The prompt's next tokens, where their logprobs were asked for: all before the output's first token."""
    vector: bytes = b""
    """float32, in the last chunk of a request that was `pooled`."""
    dp_rank: int = 0
    """The replica that serves it."""
    end_logprobs: list[TokenLogprob] = field(default_factory=list)
    """In the last chunk, of the tokens that have no part in the text: those of a stop string, and the one that ended
    the output."""


class Chunks(Message, frozen=True, tag=40):
    """All new output for the requests of one front."""

    chunks: list[Chunk]


class Refused(Message, frozen=True, tag=41):
    """The final message of ids `rid` to `rid + n - 1` that fail: HTTP status, OpenAI code and field."""

    rid: int
    n: int
    status: int
    code: str
    message: str
    param: str | None = None


class Tokenized(Message, frozen=True, tag=42):
    """The answer to Tokenize."""

    rid: int
    ids: memoryview
    """int32"""


class Detokenized(Message, frozen=True, tag=43):
    """The answer to Detokenize."""

    rid: int
    text: str
