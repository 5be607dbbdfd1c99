"""The JSON bodies of the HTTP API: one struct each for what clients send and what they get back.

Used by native.py and openai.py. Requests: types are checked while decoding, ranges by SamplingParams; fields that
these structs lack are ignored (clients send many), except inside `sampling_params`. A field typed `Refusable` is known
and cannot be served yet: a value in it is an error, because to ignore it would be a wrong answer.
Replies: field names and nulls are OpenAI's (or SGLang's for /generate); UNSET fields are left out.
"""

from typing import Annotated, Any, Final, Literal, TypeAlias

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType

from ..actors.conversation import ChatMessage
from ..sampler.params import (
    MAX_BIASES,
    MAX_SEED,
    MAX_STOP_CHARS,
    MAX_STOP_IDS,
    MAX_STOP_STRINGS,
    MAX_TOP_LOGPROBS,
    MIN_SEED,
)
from .timelines import RequestTimeline

MAX_N: Final = 128
"""Continuations of one prompt."""
Refusable: TypeAlias = Annotated[Any, Meta(extra_json_schema={"type": "null"})]
LOWEST_PRIORITY: Final = -(1 << 31)
"""That of batches."""
Priority: TypeAlias = Annotated[int, Meta(ge=LOWEST_PRIORITY, lt=1 << 31)]

# The ranges of SamplingParams, so that clients can read them in the API's document.
Choices: TypeAlias = Annotated[int, Meta(ge=1, le=MAX_N)]
Tokens: TypeAlias = Annotated[int, Meta(ge=0, le=1 << 31)]
Temperature: TypeAlias = Annotated[float, Meta(ge=0, le=100)]
TopP: TypeAlias = Annotated[float, Meta(gt=0, le=1)]
TopK: TypeAlias = Annotated[int, Meta(ge=-1, le=1 << 31)]
MinP: TypeAlias = Annotated[float, Meta(ge=0, le=1)]
Penalty: TypeAlias = Annotated[float, Meta(ge=-2, le=2)]
RepetitionPenalty: TypeAlias = Annotated[float, Meta(gt=0, le=2)]
Seed: TypeAlias = Annotated[int, Meta(ge=MIN_SEED, le=MAX_SEED)]
TopLogprobs: TypeAlias = Annotated[int, Meta(ge=0, le=MAX_TOP_LOGPROBS)]
StopString: TypeAlias = Annotated[str, Meta(min_length=1, max_length=MAX_STOP_CHARS)]
StopStrings: TypeAlias = Annotated[tuple[StopString, ...], Meta(max_length=MAX_STOP_STRINGS)]
StopIds: TypeAlias = Annotated[tuple[int, ...], Meta(max_length=MAX_STOP_IDS)]
LogitBias: TypeAlias = Annotated[dict[int, float], Meta(max_length=MAX_BIASES)]

# ------------------------------------------------------------------ POST /generate (SGLang)


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
    timeline: bool = False
    """Say in `meta_info` when what happened."""
    image_data: str | list[str | list[str] | None] | None = None
    """Base64 or data: addresses: one, or a list of one prompt's; of a batch a list, an entry or a list a prompt."""
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


class GenerateReply(Struct, frozen=True):
    """One continuation; in a stream all of it so far (`text` is cumulative). `index` only in streamed batches."""

    text: str
    output_ids: list[int]
    meta_info: MetaInfo
    index: int | UnsetType = UNSET


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


class PromptTokensDetails(Struct, frozen=True):
    cached_tokens: int


class Usage(Struct, frozen=True):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


def said(valid: bool | None) -> bool | UnsetType:
    """Return Chunk.valid as replies have it: left out where it is None."""
    return UNSET if valid is None else valid


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


# ------------------------------------------------------------------ POST /v1/chat/completions


class JsonSchemaFormat(Struct, frozen=True):
    """`strict` has no effect: an output always matches the whole schema."""

    schema: bool | dict[str, Any] | None = None
    name: str | None = None
    description: str | None = None
    strict: bool | None = None


class ResponseFormat(Struct, frozen=True):
    """`structures` and `triggers` are of the type structural_tag (SGLang)."""

    type: str
    json_schema: JsonSchemaFormat | None = None
    structures: list[dict[str, Any]] | None = None
    triggers: list[str] | None = None


class FunctionName(Struct, frozen=True):
    name: str


class FunctionDefinition(Struct, frozen=True, omit_defaults=True):
    """A function that the model may call; `parameters` is a JSON schema."""

    name: Annotated[str, Meta(pattern="^[a-zA-Z0-9_.:/-]+$", max_length=128)]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Struct, frozen=True):
    type: Literal["function"]
    function: FunctionDefinition


class NamedToolChoice(Struct, frozen=True):
    """The model must call this function."""

    type: Literal["function"]
    function: FunctionName


class ChatRequest(OpenAIRequest, frozen=True, kw_only=True):
    messages: Annotated[list[ChatMessage], Meta(extra_json_schema={"minItems": 1})]
    max_completion_tokens: Tokens | None = None
    logprobs: bool | None = None
    top_logprobs: TopLogprobs | None = None
    response_format: ResponseFormat | None = None
    continue_final_message: bool | None = None
    add_generation_prompt: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    tools: list[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedToolChoice | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: str | None = None
    """Passed on to the chat template."""
    separate_reasoning: bool | None = None
    stream_reasoning: bool | None = None
    functions: Refusable = None
    audio: Refusable = None
    chat_template: Refusable = None
    """Templates are programs: which one is rendered is the operator's choice (--chat-template)."""


CHAT_REFUSED = ("functions", "audio", "chat_template")


class TopLogprob(Struct, frozen=True):
    token: str
    logprob: float
    bytes: list[int]


class ChatTokenLogprob(Struct, frozen=True):
    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[TopLogprob]


class ChatLogprobs(Struct, frozen=True):
    content: list[ChatTokenLogprob]
    refusal: None = None


class CalledFunction(Struct, frozen=True):
    """`arguments` is JSON text; in a stream, more of it."""

    arguments: str
    name: str | UnsetType = UNSET


class ToolCall(Struct, frozen=True):
    id: str
    type: Literal["function"]
    function: CalledFunction


class ToolCallDelta(Struct, frozen=True):
    """`id`, `type` and the name come once, with the first piece of a call."""

    index: int
    function: CalledFunction
    id: str | UnsetType = UNSET
    type: Literal["function"] | UnsetType = UNSET


class AssistantMessage(Struct, frozen=True):
    role: Literal["assistant"]
    content: str | None
    refusal: None = None
    reasoning_content: str | UnsetType = UNSET
    tool_calls: list[ToolCall] | UnsetType = UNSET


class ChatChoice(Struct, frozen=True):
    """`valid`: as CompletionChoice's, of the text before tool calls and thoughts were taken out."""

    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: str | None
    valid: bool | UnsetType = UNSET
    token_ids: list[int] | UnsetType = UNSET


class ChatCompletion(Struct, frozen=True):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    system_fingerprint: str | None
    choices: list[ChatChoice]
    usage: Usage
    timeline: list[RequestTimeline] | UnsetType = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET


class Delta(Struct, frozen=True):
    role: Literal["assistant"] | UnsetType = UNSET
    content: str | UnsetType = UNSET
    refusal: UnsetType | None = UNSET
    reasoning_content: str | UnsetType = UNSET
    tool_calls: list[ToolCallDelta] | UnsetType = UNSET


class ChunkChoice(Struct, frozen=True):
    """`valid`: as ChatChoice's, in the last frame of the choice."""

    index: int
    delta: Delta
    logprobs: ChatLogprobs | None
    finish_reason: str | None
    valid: bool | UnsetType = UNSET
    token_ids: list[int] | UnsetType = UNSET


class ChatCompletionChunk(Struct, frozen=True):
    """One frame of a chat stream. `usage`: UNSET unless asked for, then null until the last frame."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    system_fingerprint: str | None
    choices: list[ChunkChoice]
    usage: Usage | UnsetType | None
    timeline: list[RequestTimeline] | UnsetType = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET
    """In the first frame."""


# ------------------------------------------------------------------ GET /v1/models, /get_model_info


class ModelCard(Struct, frozen=True):
    """`root`: what the server was told to serve; `parent`: there are no adapters, so it has none."""

    id: str
    created: int
    max_model_len: int
    root: str
    parent: None = None
    object: Literal["model"] = "model"
    owned_by: str = "actorserve"


class ModelList(Struct, frozen=True):
    data: list[ModelCard]
    object: Literal["list"] = "list"


class ModelDescription(Struct, frozen=True):
    """SGLang's /get_model_info, and the model's numbers."""

    model_path: str
    tokenizer_path: str
    is_generation: bool
    model_type: str
    vocab_size: int
    context_length: int
    has_chat_template: bool
    tool_call_parser: str
    reasoning_parser: str | None
    runs_programs: bool = True
    """There is /v1/programs."""


class EngineVersion(Struct, frozen=True):
    version: str


class Health(Struct, frozen=True):
    """`reason` says what is missing when the status is not "ok"."""

    status: Literal["ok", "unavailable", "draining"]
    reason: str | None = None


# ------------------------------------------------------------------ errors


class ErrorDetail(Struct, frozen=True):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorReply(Struct, frozen=True):
    """OpenAI's shape of an error, as a body and as an event of a stream."""

    error: ErrorDetail


class AnthropicErrorDetail(Struct, frozen=True):
    type: str
    message: str


class AnthropicErrorReply(Struct, frozen=True):
    """Anthropic's shape of an error."""

    type: Literal["error"]
    error: AnthropicErrorDetail


encode = msgspec.json.Encoder().encode
"""Any of the replies as JSON bytes; NaN becomes null."""
