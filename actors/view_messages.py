"""What the engine is doing, and when what happened to requests: fronts ask, the scheduler answers, text is between."""

from typing import Final, Literal

from .message import Message


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


class Stats(Message, frozen=True, tag=33):
    """A scheduler's state, a few times a second while something happens. Text passes it on to the fronts."""

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
    dp_rank: int = 0
    """The replica's number; -1: of all of them (totals.py)."""
    paused: bool = False
    """By an order: it makes no plans."""


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
