"""What text and the scheduler tell each other: requests as token ids, and their tokens."""

from ..sampler.params import SamplingParams
from .front_messages import GrammarSpec
from .message import NOTHING, Message

# ------------------------------------------------------------------ text -> sched


class ImagePixels(Message, frozen=True, tag=92):
    """An image or a video as the vision tower takes it. From text to the scheduler before the Submit that has it, and
    from there to every executor before the Plan that computes its tokens."""

    image: bytes
    """Digest of all that follows: equal images are one."""
    tokens: int
    """Places that it takes in a prompt."""
    shape: tuple[int, ...]
    """Of `pixels`: tiles or frames, channels, height, width; or patches and the numbers of one."""
    size: tuple[int, ...]
    """Height and width of the image that was sent; of patches the frames, rows and columns."""
    alone: bool
    """It is its prompt's only image; OneVision tiles only such."""
    pixels: memoryview
    """float32; uint8, as the image has them, of patches."""
    video: bool = False


class ImageSpan(Message, frozen=True, tag=91):
    """Part of Submit and Admit: where a sequence has an image or a video, tokens `start` to `start + length - 1`."""

    image: bytes
    start: int
    length: int
    token: int
    """The model's token for it, which it counts as."""
    grid: tuple[int, ...] = ()
    """Frames, rows and columns of its tokens, where those are their positions (models/positions.py)."""
    step: float = 1.0
    """Positions from one frame to the next."""


class Submit(Message, frozen=True, tag=20):
    """A tokenized request. Owed: Tokens rows until one with a finish, or one Ended."""

    rid: int
    ids: memoryview
    """int32, the prompt. An image's tokens are numbers beyond the vocabulary that its digest and their places tell:
    the prefix cache reuses the same image's pages and no other's."""
    params: SamplingParams
    """`max_new_tokens` is resolved (not None), `seed` too."""
    cache_salt: str = ""
    priority: int = 0
    arrival_ns: int = 0
    grammar: GrammarSpec | None = None
    tenant: str = ""
    weight: float = 1.0
    generated: memoryview = NOTHING
    """int32, what a scheduler or text actor that died had seen of the output: it goes on behind."""
    pin: int = 0
    """See Generate."""
    pooled: bool = False
    """The final message that is owed is a row of Pooled, or Ended; `max_new_tokens` is 0."""
    name: str = ""
    tokenized_ns: int = 0
    """CLOCK_MONOTONIC when its prompt was tokens."""
    images: tuple[ImageSpan, ...] = ()
    second: int = 0
    """Where tokens of the second type begin, the other text's of a pair; 0: there are none."""


class Abort(Message, frozen=True, tag=21):
    """Stop a request: its client left, or the text actor saw a stop string. Owed: one final message.

    Also from a front to text, for one of its own whose output so far it wants.
    """

    rid: int


class AbortNamed(Message, frozen=True, tag=15):
    """Front to text, where there are several fronts: as Abort, for all requests of a name, whosever they are.

    `name` empty: all there are. `tenant`: only those of this one; None: of everybody.
    """

    name: str
    tenant: str | None


# ------------------------------------------------------------------ sched -> text


class Tokens(Message, frozen=True, tag=30):
    """One step's new tokens, one row a request. A row with the token -1 brings no token, only its finish.

    rids int64 [rows], ids int32 [rows], finish uint8 [rows] (Finish). With logprobs (else empty arrays):
    logprobs float32 [rows], NaN where not asked; top_ids int32 and top_logprobs float32 [rows, top_n]; listed float32
    [rows, most], of the tokens that requests named (token_ids_logprob), empty where none did.
    `forced`: these tokens were not drawn, since grammars leave no other; a request has several rows, one a token, and
    all of them are of one jump.
    """

    rids: memoryview
    ids: memoryview
    finish: memoryview
    logprobs: memoryview
    top_n: int
    top_ids: memoryview
    top_logprobs: memoryview
    forced: bool = False
    complete: memoryview = NOTHING
    """int32: the rows with whose token the text that is seen of an output matches its grammar."""
    listed: memoryview = NOTHING


class PromptLogprobs(Message, frozen=True, tag=38):
    """The next tokens of a prompt whose logprobs were asked for, one row a token; arrays as in Tokens.

    They come in the prompt's order, from the one after the first `logprob_start_len + 1` on, and all of them before the
    request's first row of Tokens.
    """

    rid: int
    ids: memoryview
    logprobs: memoryview
    top_n: int
    top_ids: memoryview
    top_logprobs: memoryview
    listed: memoryview


class Pooled(Message, frozen=True, tag=39):
    """The vectors of requests that wanted no output: their final message. Part of StepOut, too.

    rids int64 [rows]; vectors float32 [rows, width], a Pooling's, not normalised.
    """

    rids: memoryview
    vectors: memoryview


class Started(Message, frozen=True, tag=31):
    """Sent once a Submit, before its first token: how many prompt tokens came from the prefix cache."""

    rid: int
    cached_tokens: int
    queued_ns: int
    """From arrival to admission."""
    complete: bool | None = None
    """Whether the output that the Submit came with, an empty one in general, matches its grammar; None: there is none,
    or nobody knows before the output's end."""


class Ended(Message, frozen=True, tag=32):
    """The final message of a request that ends without a finish row: aborted, refused or failed."""

    rid: int
    status: int
    """HTTP status that fits: 0 for an abort that was asked for, 400, 429, 503, 500."""
    code: str
    message: str
    param: str | None = None


class Done(Message, frozen=True, tag=36):
    """An Order was carried out. Text passes it on to the front; Refused comes in its place if it was not."""

    rid: int
    text: str = ""
    """What came of it."""
