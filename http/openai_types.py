"""The JSON bodies of OpenAI's completions, and what they share with chats.

Used by openai.py. Invariant: as in protocol.py.
"""

from typing import Any, Literal

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
    Usage,
)
from .timelines import RequestTimeline

# ------------------------------------------------------------------ what both OpenAI requests have


class StreamOptions(Struct, frozen=True):
    """`include_usage`: a last frame with the token counts. `continuous_usage_stats`: each frame has those so far."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class StructuredOutputs(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """vLLM's `structured_outputs`: one of the first six. `disable_any_whitespace` and `disable_fallback` ask for what
    holds anyway."""

    json: str | bool | dict[str, Any] | None = None
    regex: str | None = None
    choice: tuple[str, ...] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    structural_tag: str | dict[str, Any] | None = None
    disable_any_whitespace: bool | None = None
    disable_fallback: bool | None = None
    disable_additional_properties: Refusable = None
    whitespace_pattern: Refusable = None


class OpenAIRequest(Struct, frozen=True, kw_only=True):
    """OpenAI's common fields (null means the default), then our extras under SGLang's and vLLM's names."""

    model: str | None = None
    n: Choices | None = None
    stop: StopString | StopStrings | None = None
    seed: Seed | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: Temperature | None = None
    top_p: TopP | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: LogitBias | None = None
    max_tokens: Tokens | None = None

    top_k: TopK | None = None
    """Off with -1 (SGLang) or 0 (vLLM)."""
    min_p: MinP | None = None
    repetition_penalty: RepetitionPenalty | None = None
    min_tokens: Tokens | None = None
    stop_regex: StopString | StopStrings | None = None
    stop_token_ids: StopIds | None = None
    ignore_eos: bool | None = None
    no_stop_trim: bool | None = None
    include_stop_str_in_output: bool | None = None
    """vLLM's name of `no_stop_trim`."""
    skip_special_tokens: bool | None = None
    spaces_between_special_tokens: bool | None = None
    cache_salt: str | None = None
    priority: Priority | None = None
    routed_dp_rank: DpRank | None = None
    """The replica that is to serve it (--dp-size)."""
    data_parallel_rank: DpRank | None = None
    """SGLang's older name of it."""
    timeline: bool | None = None
    """Say when what happened, at the end of the reply."""
    return_token_ids: bool | None = None
    """Say also of which tokens the prompt and the output are."""

    regex: str | None = None
    json_schema: str | bool | dict[str, Any] | None = None
    choice: tuple[str, ...] | None = None
    guided_regex: str | None = None
    guided_json: str | bool | dict[str, Any] | None = None
    guided_choice: tuple[str, ...] | None = None
    guided_grammar: str | None = None
    json_whitespace: str | dict[str, int] | None = None
    ebnf: str | None = None
    structural_tag: str | dict[str, Any] | None = None
    structured_outputs: StructuredOutputs | None = None
    whitespace_pattern: Refusable = None
    guided_whitespace_pattern: Refusable = None

    allowed_token_ids: Refusable = None
    bad_words: Refusable = None
    use_beam_search: Refusable = None
    prompt_logprobs: Refusable = None
    truncate_prompt_tokens: Refusable = None
    thinking_token_budget: Refusable = None
    return_tokens_as_token_ids: Refusable = None
    return_hidden_states: Refusable = None
    custom_logit_processor: Refusable = None
    lora_path: Refusable = None


OPENAI_REFUSED = (
    "whitespace_pattern",
    "guided_whitespace_pattern",
    "allowed_token_ids",
    "bad_words",
    "use_beam_search",
    "prompt_logprobs",
    "truncate_prompt_tokens",
    "thinking_token_budget",
    "return_tokens_as_token_ids",
    "return_hidden_states",
    "custom_logit_processor",
    "lora_path",
)


# ------------------------------------------------------------------ POST /v1/completions


class CompletionRequest(OpenAIRequest, frozen=True, kw_only=True):
    prompt: str | list[str | int | list[int]]
    best_of: Choices | None = None
    echo: bool | None = None
    logprobs: TopLogprobs | None = None
    suffix: str | None = None


class CompletionLogprobs(Struct, frozen=True):
    """OpenAI's legacy form: parallel lists, one entry a token. The first of an echoed prompt has no logprobs: null."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None] | None
    text_offset: list[int]


class CompletionChoice(Struct, frozen=True):
    """`valid`, our own: at the end of an output with a grammar, whether its text matches, where that is known.

    With return_token_ids: `token_ids` of the text, with what ended it; `prompt_token_ids`, in a stream once.
    """

    text: str
    index: int
    logprobs: CompletionLogprobs | None
    finish_reason: str | None
    valid: bool | UnsetType = UNSET
    token_ids: list[int] | UnsetType = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET


class Completion(Struct, frozen=True):
    """A whole reply, or one frame of a stream (the same object in OpenAI's API)."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    system_fingerprint: str | None
    choices: list[CompletionChoice]
    usage: Usage | UnsetType | None
    timeline: list[RequestTimeline] | UnsetType = UNSET
