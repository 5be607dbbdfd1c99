"""What the scheduler and the executors tell each other, and what it tells the samplers: windows, and their results."""

from typing import Literal, TypeAlias

from ..sampler.params import SamplingParams
from .message import NOTHING, Message
from .text_messages import ImageSpan, Pooled

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
