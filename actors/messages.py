"""Every message that crosses a lane, and nothing else: the engine's vocabulary.

One msgspec Struct each: positional (array_like), frozen, not tracked by the garbage collector, with an integer tag
that is never reused; new fields go last with a default. Token arrays are `memoryview`s of raw little-endian int32,
request ids of int64. A decoded memoryview aliases the ring: whoever keeps it beyond the handler copies it.
No dicts, no pickle, no Any. Each actor's inbox is one of the unions at the end.

    front  --Generate, Cancel-->  text  --Submit, Abort-->  sched  --SlotParams-->  sampler.r
    front  <--Chunks, Refused, Stats--  text  <--Tokens, PromptLogprobs, Pooled, Ended, Stats--  sched
                                                            sched  --Plan, Instruct-->  exec.r
                                                            sched  <--ExecutorReady, StepOut, Carried--  exec.0
                         sched  --LoadGrammar, DropGrammar, GrammarStates, SlotMasks-->  sampler.r
                                text  --ImagePixels-->  sched  --ImagePixels, DropImage-->  exec.r
    front  --Tokenize, Detokenize, Order, Look, AskTimelines-->  text  --Order, Look, AskTimelines-->  sched
    front  <--Tokenized, Detokenized, Done, Seen, Timelines--  text  <--Done, Seen, Timelines, Refused--  sched
                              fsm  --Compiled, Translated, CompileFailed-->  sched  --Compile, Discard-->  fsm
                                         fsm  --Masks, MatchFailed-->  sched  --Match, Unmatch-->  fsm
"""

from enum import IntEnum
from typing import Final, Literal, NewType, TypeAlias

import msgspec

from ..config import Thoughts
from ..sampler.params import SamplingParams

RequestId = NewType("RequestId", int)  # front index << 40 | counter; n choices of a request take n ids in a row


class Finish(IntEnum):
    """Why a request's last token is its last. In StepOut and Tokens one byte per row."""

    NONE = 0
    STOP = 1  # EOS or a stop_token_id, which is the row's token
    LENGTH = 2  # max_new_tokens, or the end of the context
    POISON = 3  # NaN or no token allowed: the request fails, its pages are not kept
    GRAMMAR = 4  # the grammar left no token: the request fails


class ChunkEnd(IntEnum):
    """What comes behind a prompt chunk."""

    MORE = 0
    """Another chunk; or nothing, if the request only fills the cache."""
    DRAW = 1
    """The prompt ends: a token is drawn, and the slot decodes from now on."""
    POOL = 2
    """The prompt ends, and its vector is in the step's Pooled."""


NOTHING: Final = memoryview(b"")


class Message(msgspec.Struct, frozen=True, array_like=True, gc=False, forbid_unknown_fields=True):
    """Base of everything that crosses a lane."""


# ------------------------------------------------------------------ from the supervisor, to every actor


class PeerUp(Message, frozen=True, tag=1):
    """An actor that the receiver has a lane with is (again) running; its lanes are fresh."""

    name: str
    epoch: int


class PeerDown(Message, frozen=True, tag=2):
    """An actor that the receiver has a lane with died; what was in its lanes is lost."""

    name: str
    epoch: int
    reason: str
    fault: bool = True
    """It died of itself: of an exception, a signal, a hang, no memory. False: somebody from outside killed it."""
    at_work: tuple[int, ...] = ()
    """The requests that its node was working on; see desk.py."""


class Drain(Message, frozen=True, tag=3):
    """Take no new work; finish what runs until `deadline_ns` (CLOCK_MONOTONIC)."""

    deadline_ns: int


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
    """Front tells the scheduler, through text, to do something. Owed: Done or Refused.

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


class Look(Message, frozen=True, tag=80):
    """Front asks what the engine is doing, through text. Owed: Seen, or Refused where there is no scheduler.

    `nodes`, `requests`: the most of each that the answer may hold.
    """

    rid: int
    nodes: int
    requests: int


class AskTimelines(Message, frozen=True, tag=85):
    """Front asks, through text, when what happened to the requests of a name. Owed: Timelines, or Refused.

    `tenant`: only those of this one; None: of everybody.
    """

    rid: int
    name: str
    tenant: str | None


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


class Stats(Message, frozen=True, tag=33):
    """The scheduler's state, a few times a second while something happens. Text passes it on to the fronts."""

    waiting: int
    running: int
    pages_total: int
    pages_free: int
    pages_tree: int
    pages_running: int
    prompt_tokens: int
    """Counter: prompt tokens of admitted requests."""
    cached_tokens: int
    """Counter: of these, taken from the prefix cache."""
    prefilled_tokens: int
    """Counter: tokens computed in prefill, recomputation after retraction included."""
    generated_tokens: int
    retractions: int
    windows: int
    steps: int
    step_us: float
    """Smoothed time of a step on the executor."""
    executor_up: bool
    forced_tokens: int = 0
    """Counter: of the generated tokens, those that grammars forced and no step had to draw."""
    jumps: int = 0
    """Counter: in how many runs they came."""
    grammar_waiting: int = 0
    """Of `waiting`, those that wait for their grammar."""
    grammar_hits: int = 0
    """Counter: requests whose grammar was there."""
    grammars_compiled: int = 0
    """Counter; the next one's too: answers of the fsm actor."""
    grammars_failed: int = 0
    grammar_seconds: float = 0.0
    """Counter: what compiling them took, failures included."""
    down: str = ""
    """What is not up, and why; empty: everything is."""
    weights: str = ""
    """The folder of the last update_weights; empty: those of the start."""


NO_STATS: Final = Stats(0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0.0, False)
"""What is known of a scheduler that is not there."""


class LaneView(Message, frozen=True, tag=81):
    """A lane as one of its ends sees it; a moment old."""

    source: str
    target: str
    up: bool
    waiting: int = 0
    """Messages that the target has not taken yet."""
    sent: int = 0
    """Counter: messages since the lane was made."""
    full: int = 0
    """Counter: how often there was no room."""
    epoch: int = 0
    """The target's incarnation; 0 where the end that answers does not know it."""


class NodeView(Message, frozen=True, tag=82):
    """A node of the radix tree; see kvstore.nodes. `parent` is -1 for the root of a namespace."""

    id: int
    parent: int
    tokens: int
    pages: int
    locks: int
    """Running requests that use it."""
    hits: int


class RequestView(Message, frozen=True, tag=83):
    """A request, without its text. Lengths in tokens."""

    rid: int
    stage: Literal["waiting", "prefill", "decode"]
    prompt: int
    computed: int
    """Tokens whose KV is there."""
    generated: int
    limit: int
    """At which it ends, prompt included."""


class Seen(Message, frozen=True, tag=84):
    """The engine at one moment: the scheduler's part. Text adds the lanes that it alone knows and passes it on."""

    rid: int
    stats: Stats
    lanes: list[LaneView]
    nodes: list[NodeView]
    tree_nodes: int
    """How many the tree has, roots not counted."""
    requests: list[RequestView]
    paused: bool


class WindowView(Message, frozen=True, tag=86):
    """A window that computed something of a request. Times CLOCK_MONOTONIC ns; `end_ns` 0: it is on its way."""

    window: int
    k: int
    rows: int
    """Requests that decoded in it."""
    prompt_tokens: int
    """Tokens of prompts that it computed, of all requests."""
    start_ns: int
    """When it was sent to the executor, which may have had one more to do before it."""
    end_ns: int


class TimelineView(Message, frozen=True, tag=87):
    """When what happened to one request. Times CLOCK_MONOTONIC ns, 0 for what has not happened."""

    rid: int
    arrival_ns: int
    tokenized_ns: int
    queued_ns: int
    admitted_ns: int
    prefill_start_ns: int
    prefill_end_ns: int
    first_token_ns: int
    ended_ns: int
    prompt_tokens: int
    cached_tokens: int
    retractions: int
    dropped: int
    """Windows before the first of `windows`, which are not known any more."""
    windows: list[WindowView]


class Timelines(Message, frozen=True, tag=88):
    """The answer to AskTimelines; empty where the name is not known (any more)."""

    rid: int
    timelines: list[TimelineView]


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
    listed: list[tuple[int, float, bytes]] = []
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
    prompt_logprobs: list[TokenLogprob] = []
    """The prompt's next tokens, where their logprobs were asked for: all before the output's first token."""
    vector: bytes = b""
    """float32, in the last chunk of a request that was `pooled`."""


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


# ------------------------------------------------------------------ sched -> exec.r and sampler.r


class Admit(Message, frozen=True, tag=50):
    """A request takes a slot of the executor's batch. Its KV length starts at `cached`, in the first pages."""

    slot: int
    rid: int
    pages: memoryview
    """int32, pages allocated so far, in order."""
    cached: int
    """Tokens whose KV is already in `pages`."""
    limit: int
    """Tokens (prompt and output) at which the request ends by length."""
    images: tuple[ImageSpan, ...] = ()
    second: int = 0
    """As Submit's."""


class DropImage(Message, frozen=True, tag=93):
    """Scheduler to executor: forget an image and its features."""

    image: bytes


class Plan(Message, frozen=True, tag=51):
    """One window: apply the deltas in the order of the fields, then run k steps.

    Step 0 runs the prefill chunks and all decoding slots in one forward; steps 1 to k-1 the decoding slots that are
    not done. A slot decodes once its last chunk ran. A slot that decodes may get a chunk too, of its last token and
    forced ones: then it has no other row in step 0. All arrays int32 unless said.
    Owed: one StepOut a step, also for steps in which no row was left (empty arrays).
    """

    window: int
    k: int
    release: memoryview
    """Slots given back."""
    copies: memoryview
    """[copies, 3]: source page, destination page, tokens."""
    admits: list[Admit]
    grow_slots: memoryview
    """[n] slots that get one more page each (a slot may come several times)."""
    grow_pages: memoryview
    chunk_slots: memoryview
    """[chunks] slots with tokens to compute."""
    chunk_lengths: memoryview
    chunk_last: memoryview
    """[chunks] ChunkEnd"""
    chunk_ids: memoryview
    """The chunks' tokens, one after another."""
    chunk_starts: memoryview
    """[chunks] tokens of the slot before the chunk."""
    sampler_changes: int
    """Messages that the sampler was sent for this window."""
    chunk_scored: memoryview = NOTHING
    """[chunks] of how many given tokens behind the chunk's the logprobs are wanted; empty: nowhere."""
    once_slots: memoryview = NOTHING
    """Slots that draw in step 0 and then rest until they are named again, since each of their tokens needs a mask of
    its own: those of the chunks here, and others, which decode in step 0."""
    score_starts: memoryview = NOTHING
    """[chunks] the place in the chunk before the first of these tokens; empty: nowhere."""
    score_ids: memoryview = NOTHING
    """These tokens, one chunk's after another's: the last of a chunk's may be the one that follows it."""


class SlotParams(Message, frozen=True, tag=52):
    """Scheduler to sampler: how to draw for a slot from window `window` on. Sent before that window's Plan."""

    window: int
    slot: int
    params: SamplingParams
    """`seed` and `max_new_tokens` resolved."""
    prompt_ids: memoryview
    """int32, only for parameters that look at tokens (penalties), else empty."""
    output_ids: memoryview
    """int32, tokens generated before (after a retraction); same condition."""
    prompt_length: int
    output_length: int
    grammar: int = -1
    """Handle of a grammar that was loaded before; -1: the output is free."""
    grammar_state: int = 0
    """Its state before the next token."""


class LoadGrammar(Message, frozen=True, tag=53):
    """Scheduler to sampler: a grammar's tables (fsm/token_table.py), once in an executor's life, before its first use
    in the window `window`."""

    window: int
    handle: int
    """Given by the scheduler."""
    token_class: memoryview
    """uint16 [V]"""
    transitions: memoryview
    """int16 [S, K]"""
    canonical: memoryview
    """int32 [S]"""


class DropGrammar(Message, frozen=True, tag=54):
    """Scheduler to sampler: forget a grammar; from the window `window` on no slot follows it."""

    window: int
    handle: int


class GrammarStates(Message, frozen=True, tag=55):
    """Scheduler to sampler: the states of slots that jump in the window `window`, before the token that it draws.

    Arrays int32 [rows], `counted_ids` int32 [sum of `counted`].
    """

    window: int
    slots: memoryview
    states: memoryview
    counted: memoryview
    """How many tokens the row jumps over that penalties count; 0 in a row without."""
    counted_ids: memoryview
    """These tokens, row after row."""


class SlotMasks(Message, frozen=True, tag=56):
    """Scheduler to sampler: what slots may draw in the window `window`, in its one step in which they do.

    slots int32 [rows]; bitmask int32 [rows, words], bit i of word w for token 32 w + i; tokens beyond never come.
    """

    window: int
    slots: memoryview
    bitmask: memoryview


Task: TypeAlias = Literal["start_profile", "stop_profile", "load_weights", "swap_weights"]


class Instruct(Message, frozen=True, tag=57):
    """Scheduler to executors: do something beside windows. Owed, by exec.0: Carried.

    load_weights: of the folder `detail`, beside those in use. swap_weights: use them, and forget all slots; it comes
    when no window is in flight.
    """

    rid: int
    task: Task
    detail: str = ""
    """As in Order."""


# ------------------------------------------------------------------ exec.0 -> sched


class Carried(Message, frozen=True, tag=63):
    """The answer to Instruct: done (status 0), or why it was not, as in Refused."""

    rid: int
    task: Task
    text: str = ""
    """What came of it, or what is wrong."""
    status: int = 0
    code: str = ""
    param: str | None = None


class ExecutorReady(Message, frozen=True, tag=60):
    """Sent whenever a scheduler comes up: the size of the page pool and of the batch."""

    num_pages: int
    max_slots: int
    max_pages_per_slot: int
    device: Literal["cpu", "cuda"]
    weights: str = ""
    """As in Stats."""
    image_token_bytes: int = 0
    """Of the features of an image, for each of its tokens."""


class Forget(Message, frozen=True, tag=64):
    """From rank 0's executor to the others: the scheduler whose plans these were died, and its batch with it."""


class Scores(Message, frozen=True, tag=62):
    """The logprobs of tokens that were given, not drawn, one row a token; arrays as in Tokens."""

    logprobs: memoryview
    top_n: int
    top_ids: memoryview
    top_logprobs: memoryview
    listed: memoryview = NOTHING


class StepOut(Message, frozen=True, tag=61):
    """The tokens of one step of a window; arrays as in Tokens. Step 0 also says that the chunks are computed."""

    window: int
    step: int
    rids: memoryview
    ids: memoryview
    finish: memoryview
    logprobs: memoryview
    top_n: int
    top_ids: memoryview
    top_logprobs: memoryview
    step_ns: int
    """Time of the step on the executor."""
    scores: Scores | None = None
    """Of Plan.score_ids, in their order."""
    listed: memoryview = NOTHING
    pooled: Pooled | None = None
    """Of the chunks that end with ChunkEnd.POOL."""


# ------------------------------------------------------------------ sched -> fsm


class Compile(Message, frozen=True, tag=70):
    """Scheduler to fsm: compile a grammar. Owed: one Compiled or CompileFailed with the handle, unless discarded."""

    handle: int
    spec: GrammarSpec


class Discard(Message, frozen=True, tag=71):
    """Scheduler to fsm: nobody waits for this grammar any more. Nothing is owed."""

    handle: int


class Match(Message, frozen=True, tag=74):
    """Scheduler to fsm: a request that follows a Translated grammar has these tokens after its first `start` generated
    ones, which the fsm actor knows. Owed: a row of Masks, or MatchFailed, unless it is forgotten by Unmatch."""

    rid: int
    start: int
    ids: memoryview
    """int32"""
    grammar: str = ""
    """With start 0: Translated.grammar."""


class Unmatch(Message, frozen=True, tag=75):
    """Scheduler to fsm: forget a request's place in its grammar. Nothing is owed."""

    rid: int


# ------------------------------------------------------------------ fsm -> sched


class Compiled(Message, frozen=True, tag=72):
    """fsm to scheduler: the token table of a grammar; arrays as in LoadGrammar. Its state 0 is the start."""

    handle: int
    token_class: memoryview
    transitions: memoryview
    canonical: memoryview
    seconds: float = 0.0
    """What compiling took; 0 if the fsm actor knew the answer."""


class CompileFailed(Message, frozen=True, tag=73):
    """fsm to scheduler: the grammar cannot be used. `status` is HTTP's (400, 503), `message` says where in it."""

    handle: int
    status: int
    code: str
    message: str
    seconds: float = 0.0
    """As in Compiled."""


class Translated(Message, frozen=True, tag=76):
    """fsm to scheduler: a grammar that no table can have; `grammar` is what to send in Match."""

    handle: int
    grammar: str
    seconds: float = 0.0
    """As in Compiled."""


class Masks(Message, frozen=True, tag=77):
    """fsm to scheduler: what requests may draw next.

    rids int64 [rows]; lengths int32 [rows], the generated tokens before; bitmask int32 [rows, words], as in SlotMasks.
    """

    rids: memoryview
    lengths: memoryview
    bitmask: memoryview


class MatchFailed(Message, frozen=True, tag=78):
    """fsm to scheduler: a request cannot go on in its grammar; fields as in Ended."""

    rid: int
    status: int
    code: str
    message: str


SystemMessage: TypeAlias = PeerUp | PeerDown | Drain
FrontAnswer: TypeAlias = Tokenized | Detokenized | Done | Seen | Timelines
FrontInbox: TypeAlias = SystemMessage | Chunks | Refused | Stats | FrontAnswer
FrontQuestion: TypeAlias = Tokenize | Detokenize | Order | Look | AskTimelines
TextInbox: TypeAlias = (
    SystemMessage | Generate | Cancel | Abort | AbortNamed | Unpin | FrontQuestion
    | Tokens | PromptLogprobs | Pooled | Started | Ended | Stats | Done | Seen | Timelines | Refused
)  # fmt: skip
GrammarNews: TypeAlias = Compiled | Translated | CompileFailed | Masks | MatchFailed
SchedulerInbox: TypeAlias = (
    SystemMessage | ImagePixels | Submit | Abort | Unpin | Order | Look | AskTimelines
    | ExecutorReady | StepOut | Carried | GrammarNews
)  # fmt: skip
ExecutorInbox: TypeAlias = SystemMessage | Plan | Instruct | Forget | ImagePixels | DropImage
SamplerMessage: TypeAlias = SlotParams | LoadGrammar | DropGrammar | GrammarStates | SlotMasks
SamplerInbox: TypeAlias = SystemMessage | SamplerMessage
FsmInbox: TypeAlias = SystemMessage | Compile | Discard | Match | Unmatch
