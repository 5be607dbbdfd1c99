"""The JSON bodies of SGLang's /generate.

Used by native.py. Invariant: as in protocol.py.
"""

from typing import Any, Literal, TypeAlias

from msgspec import UNSET, Struct, UnsetType

from .protocol import (
    Choices,
    DpRank,
    LogitBias,
    MinP,
    Penalty,
    Priority,
    Refusable,
    RepetitionPenalty,
    Seed,
    StopIds,
    StopString,
    StopStrings,
    Temperature,
    Tokens,
    TopK,
    TopLogprobs,
    TopP,
)
from .timelines import RequestTimeline


class NativeSampling(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`sampling_params` of /generate: SamplingParams as clients write them (null means the default), and `n`."""

    n: Choices = 1
    max_new_tokens: Tokens | None = 128
    min_new_tokens: Tokens = 0
    temperature: Temperature = 1.0
    top_p: TopP = 1.0
    top_k: TopK = -1
    min_p: MinP = 0.0
    frequency_penalty: Penalty = 0.0
    presence_penalty: Penalty = 0.0
    repetition_penalty: RepetitionPenalty = 1.0
    stop: StopString | StopStrings | None = None
    stop_regex: StopString | StopStrings | None = None
    stop_token_ids: StopIds | None = None
    ignore_eos: bool = False
    no_stop_trim: bool = False
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    seed: Seed | None = None
    logit_bias: LogitBias | None = None
    logprobs: TopLogprobs | None = None
    regex: str | None = None
    json_schema: str | bool | dict[str, Any] | None = None
    """JSON text, or the schema itself."""
    choice: tuple[str, ...] | None = None
    json_whitespace: str | dict[str, int] | None = None
    """"spaced", "compact", {"any": n} or {"indent": n}."""
    ebnf: str | None = None
    structural_tag: str | dict[str, Any] | None = None
    """JSON text, or the tag itself."""
    whitespace_pattern: Refusable = None


class GenerateRequest(Struct, frozen=True, kw_only=True):
    """One prompt or a batch. Lists run parallel to the prompts."""

    text: str | list[str] | None = None
    input_ids: list[int | list[int]] | None = None
    sampling_params: NativeSampling | list[NativeSampling] | None = None
    rid: str | list[str] | None = None
    return_logprob: bool | list[bool] | None = None
    top_logprobs_num: TopLogprobs | list[TopLogprobs] | None = None
    logprob_start_len: int | list[int] | None = None
    token_ids_logprob: list[int | list[int]] | None = None
    return_text_in_logprobs: bool = False
    stream: bool = False
    cache_salt: str | None = None
    priority: Priority | None = None
    routed_dp_rank: DpRank | None = None
    """The replica that is to serve it (--dp-size)."""
    data_parallel_rank: DpRank | None = None
    """SGLang's older name of it."""
    timeline: bool = False
    """Say in `meta_info` when what happened."""
    image_data: str | list[str | list[str] | None] | None = None
    """Base64 or data: addresses: one, or a list of one prompt's; of a batch one for all, or an entry or a list a
    prompt."""
    input_embeds: Refusable = None
    video_data: str | list[str | list[str | list[str]] | None] | None = None
    """A video is a list of its frames, as image_data's; one, or a list of one prompt's; of a batch a list of these."""
    audio_data: Refusable = None
    lora_path: Refusable = None
    session_params: Refusable = None
    return_hidden_states: Refusable = None
    custom_logit_processor: Refusable = None


NATIVE_REFUSED = (
    "input_embeds",
    "audio_data",
    "lora_path",
    "session_params",
    "return_hidden_states",
    "custom_logit_processor",
)

TokenRow: TypeAlias = tuple[float | None, int, str | None]
"""SGLang's form of a logprob: logprob, token id, text or null. The first of a prompt has no logprob."""
TokenRows: TypeAlias = list[list[TokenRow] | None]
"""Of each place, logprobs of several tokens; null beside the first of a prompt."""


class NativeFinish(Struct, frozen=True):
    """Why a continuation ended: a stop token id or string in `matched`, or the `length` it reached."""

    type: Literal["stop", "length", "abort"]
    matched: int | str | None = None
    length: int | UnsetType = UNSET


class MetaInfo(Struct, frozen=True):
    """What SGLang says beside the text. `finish_reason` is null until the last frame; latency in seconds.

    With a grammar also our own: how many of the completion's tokens it forced ahead of the model, in how many jumps,
    and in the end whether the text matches it, which a limit, a stop or an abort may have prevented.
    """

    id: str
    finish_reason: NativeFinish | None
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    e2e_latency: float
    output_token_logprobs: list[TokenRow] | UnsetType = UNSET
    output_top_logprobs: TokenRows | UnsetType = UNSET
    output_token_ids_logprobs: TokenRows | UnsetType = UNSET
    input_token_logprobs: list[TokenRow] | UnsetType = UNSET
    input_top_logprobs: TokenRows | UnsetType = UNSET
    input_token_ids_logprobs: TokenRows | UnsetType = UNSET
    forced_tokens: int | UnsetType = UNSET
    jumps: int | UnsetType = UNSET
    valid: bool | UnsetType = UNSET
    timeline: RequestTimeline | UnsetType | None = UNSET
    """With `timeline: true`, in the last frame; null where it is not known."""
    dp_rank: int | UnsetType = UNSET
    """With --dp-size above 1: the replica that served it."""


class GenerateReply(Struct, frozen=True):
    """One continuation; in a stream all of it so far (`text` is cumulative). `index` only in streamed batches."""

    text: str
    output_ids: list[int]
    meta_info: MetaInfo
    index: int | UnsetType = UNSET
