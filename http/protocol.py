"""What the JSON bodies of the HTTP API are made of, and those of errors and models.

Each route's bodies are in its file of types: one struct each for what clients send and what they get back. Requests:
types are checked while decoding, ranges by SamplingParams; fields that these structs lack are ignored (clients send
many), except inside `sampling_params`. A field typed `Refusable` is known and cannot be served yet: a value in it is an
error, because to ignore it would be a wrong answer.
Replies: field names and nulls are OpenAI's (or SGLang's for /generate); UNSET fields are left out.
"""

from typing import Annotated, Any, Final, Literal, TypeAlias

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType

from ..sampler.params import (
    MAX_BIASES,
    MAX_SEED,
    MAX_STOP_CHARS,
    MAX_STOP_IDS,
    MAX_STOP_STRINGS,
    MAX_TOP_LOGPROBS,
    MIN_SEED,
)

MAX_N: Final = 128
"""Continuations of one prompt."""
Refusable: TypeAlias = Annotated[Any, Meta(extra_json_schema={"type": "null"})]
LOWEST_PRIORITY: Final = -(1 << 31)
"""That of batches."""
DpRank: TypeAlias = Annotated[int, Meta(ge=0, lt=64)]
"""--dp-size is at most 64."""
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
    """`reason` says what is missing: when the status is not "ok", or "ok" while some replicas do not serve."""

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
