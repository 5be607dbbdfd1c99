"""The JSON bodies of the HTTP API: one struct each for what clients send and what they get back.

Used by native.py and openai.py. Requests: types are checked while decoding, ranges by SamplingParams; fields that
these structs lack are ignored (clients send many), except inside `sampling_params`. A field typed `Refusable` is known
and cannot be served yet: a value in it is an error, because to ignore it would be a wrong answer.
Replies: field names and nulls are OpenAI's (or SGLang's for /generate); UNSET fields are left out.
"""

from typing import Annotated, Any, Literal, TypeAlias

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType

from ..actors.conversation import ChatMessage

Refusable: TypeAlias = Any
Priority: TypeAlias = Annotated[int, Meta(ge=-(1 << 31), lt=1 << 31)]

# ------------------------------------------------------------------ POST /generate (SGLang)


class NativeSampling(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`sampling_params` of /generate: SamplingParams as clients write them (null means the default), and `n`."""

    n: int = 1
    max_new_tokens: int | None = 128
    min_new_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    min_p: float = 0.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty: float = 1.0
    stop: str | tuple[str, ...] | None = None
    stop_token_ids: tuple[int, ...] | None = None
    ignore_eos: bool = False
    no_stop_trim: bool = False
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    seed: int | None = None
    logit_bias: dict[int, float] | None = None
    logprobs: int | None = None
    regex: str | None = None
    json_schema: str | bool | dict[str, Any] | None = None
    """JSON text, or the schema itself."""
    choice: tuple[str, ...] | None = None
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
    top_logprobs_num: int | list[int] | None = None
    logprob_start_len: int | list[int] | None = None
    return_text_in_logprobs: bool = False
    stream: bool = False
    cache_salt: str | None = None
    priority: Priority | None = None
    input_embeds: Refusable = None
    image_data: Refusable = None
    video_data: Refusable = None
    audio_data: Refusable = None
    lora_path: Refusable = None
    session_params: Refusable = None
    token_ids_logprob: Refusable = None
    return_hidden_states: Refusable = None
    custom_logit_processor: Refusable = None


NATIVE_REFUSED = (
    "input_embeds",
    "image_data",
    "video_data",
    "audio_data",
    "lora_path",
    "session_params",
    "token_ids_logprob",
    "return_hidden_states",
    "custom_logit_processor",
)

TokenRow: TypeAlias = tuple[float, int, str | None]
"""SGLang's form of a logprob: logprob, token id, text or null."""


class NativeFinish(Struct, frozen=True):
    """Why a continuation ended: a stop token id or string in `matched`, or the `length` it reached."""

    type: Literal["stop", "length", "abort"]
    matched: int | str | None = None
    length: int | UnsetType = UNSET


class MetaInfo(Struct, frozen=True):
    """What SGLang says beside the text. `finish_reason` is null until the last frame; latency in seconds.

    With a grammar also our own: how many of the completion's tokens it forced ahead of the model, in how many jumps.
    """

    id: str
    finish_reason: NativeFinish | None
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    e2e_latency: float
    output_token_logprobs: list[TokenRow] | UnsetType = UNSET
    output_top_logprobs: list[list[TokenRow]] | UnsetType = UNSET
    forced_tokens: int | UnsetType = UNSET
    jumps: int | UnsetType = UNSET


class GenerateReply(Struct, frozen=True):
    """One continuation; in a stream all of it so far (`text` is cumulative). `index` only in streamed batches."""

    text: str
    output_ids: list[int]
    meta_info: MetaInfo
    index: int | UnsetType = UNSET


# ------------------------------------------------------------------ what both OpenAI requests have


class StreamOptions(Struct, frozen=True):
    include_usage: bool | None = None


class OpenAIRequest(Struct, frozen=True, kw_only=True):
    """OpenAI's common fields (null means the default), then our extras under SGLang's and vLLM's names."""

    model: str | None = None
    n: int | None = None
    stop: str | tuple[str, ...] | None = None
    seed: int | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: float | None = None
    top_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[int, float] | None = None
    max_tokens: int | None = None

    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    min_tokens: int | None = None
    stop_token_ids: tuple[int, ...] | None = None
    ignore_eos: bool | None = None
    no_stop_trim: bool | None = None
    skip_special_tokens: bool | None = None
    spaces_between_special_tokens: bool | None = None
    cache_salt: str | None = None
    priority: Priority | None = None

    regex: str | None = None
    json_schema: str | bool | dict[str, Any] | None = None
    choice: tuple[str, ...] | None = None
    guided_regex: str | None = None
    guided_json: str | bool | dict[str, Any] | None = None
    guided_choice: tuple[str, ...] | None = None
    guided_grammar: str | None = None
    ebnf: str | None = None
    structural_tag: str | dict[str, Any] | None = None
    structured_outputs: Refusable = None
    whitespace_pattern: Refusable = None
    guided_whitespace_pattern: Refusable = None


OPENAI_REFUSED = (
    "structured_outputs",
    "whitespace_pattern",
    "guided_whitespace_pattern",
)


class PromptTokensDetails(Struct, frozen=True):
    cached_tokens: int


class Usage(Struct, frozen=True):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


# ------------------------------------------------------------------ POST /v1/completions


class CompletionRequest(OpenAIRequest, frozen=True, kw_only=True):
    prompt: str | list[str | int | list[int]]
    best_of: int | None = None
    echo: bool | None = None
    logprobs: int | None = None
    suffix: str | None = None


class CompletionLogprobs(Struct, frozen=True):
    """OpenAI's legacy form: parallel lists, one entry a token."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]] | None
    text_offset: list[int]


class CompletionChoice(Struct, frozen=True):
    text: str
    index: int
    logprobs: CompletionLogprobs | None
    finish_reason: str | None


class Completion(Struct, frozen=True):
    """A whole reply, or one frame of a stream (the same object in OpenAI's API)."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    system_fingerprint: str | None
    choices: list[CompletionChoice]
    usage: Usage | UnsetType | None


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


class ChatRequest(OpenAIRequest, frozen=True, kw_only=True):
    messages: list[ChatMessage]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    response_format: ResponseFormat | None = None
    continue_final_message: bool | None = None
    add_generation_prompt: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    tools: Refusable = None
    functions: Refusable = None
    audio: Refusable = None


CHAT_REFUSED = ("tools", "functions", "audio")


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


class AssistantMessage(Struct, frozen=True):
    role: Literal["assistant"]
    content: str
    refusal: None = None


class ChatChoice(Struct, frozen=True):
    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: str | None


class ChatCompletion(Struct, frozen=True):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    system_fingerprint: str | None
    choices: list[ChatChoice]
    usage: Usage


class Delta(Struct, frozen=True):
    role: Literal["assistant"] | UnsetType = UNSET
    content: str | UnsetType = UNSET
    refusal: UnsetType | None = UNSET


class ChunkChoice(Struct, frozen=True):
    index: int
    delta: Delta
    logprobs: ChatLogprobs | None
    finish_reason: str | None


class ChatCompletionChunk(Struct, frozen=True):
    """One frame of a chat stream. `usage`: UNSET unless asked for, then null until the last frame."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    system_fingerprint: str | None
    choices: list[ChunkChoice]
    usage: Usage | UnsetType | None


# ------------------------------------------------------------------ GET /v1/models, /get_model_info


class ModelCard(Struct, frozen=True):
    id: str
    created: int
    max_model_len: int
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


encode = msgspec.json.Encoder().encode
"""Any of the replies as JSON bytes; NaN becomes null."""
