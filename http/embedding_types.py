"""The JSON bodies of routes that answer with vectors: OpenAI's embeddings, SGLang's /encode and /judge, /v1/classify.

Used by embeddings.py. Invariant: as in protocol.py; field names are OpenAI's and SGLang's.
"""

from typing import Annotated, Literal, TypeAlias

from msgspec import UNSET, Meta, Struct, UnsetType

from ..actors.conversation import ChatMessage
from .protocol import Priority, PromptTokensDetails, Refusable

Dimensions: TypeAlias = Annotated[int, Meta(ge=1, le=1 << 20)]
Input: TypeAlias = str | list[str | int | list[int]]
"""A text, texts, token ids, or lists of token ids."""


class EmbeddingRequest(Struct, frozen=True, kw_only=True):
    """`dimensions`: only the first ones of each vector, for models trained so. `normalize`: to length 1; by default
    what the model's folder says. `truncate_prompt_tokens`: longer inputs are cut to so many tokens, -1 to what the
    model takes; else they are refused. With base64 a vector is its little-endian float32."""

    input: Input
    model: str | None = None
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Dimensions | None = None
    normalize: bool | None = None
    user: str | None = None
    cache_salt: str | None = None
    priority: Priority | None = None
    truncate_prompt_tokens: int | None = None


class Embedding(Struct, frozen=True):
    embedding: list[float] | str
    index: int
    object: Literal["embedding"] = "embedding"


class PromptUsage(Struct, frozen=True):
    prompt_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class EmbeddingReply(Struct, frozen=True):
    data: list[Embedding]
    model: str
    usage: PromptUsage
    object: Literal["list"] = "list"


class EncodeRequest(Struct, frozen=True, kw_only=True):
    """SGLang's: one prompt or a batch. `sampling_params` are taken and without meaning, as there."""

    text: str | list[str] | None = None
    input_ids: list[int | list[int]] | None = None
    rid: str | list[str] | None = None
    dimensions: Dimensions | None = None
    normalize: bool | None = None
    cache_salt: str | None = None
    priority: Priority | None = None
    image_data: Refusable = None
    video_data: Refusable = None
    audio_data: Refusable = None
    lora_path: Refusable = None


class JudgeRequest(Struct, frozen=True, kw_only=True):
    """What a classification or reward head is to judge: `conv`, one conversation or several, by the model's chat
    template; or as /encode."""

    conv: list[ChatMessage | list[ChatMessage]] | None = None
    text: str | list[str] | None = None
    input_ids: list[int | list[int]] | None = None
    rid: str | list[str] | None = None
    cache_salt: str | None = None
    priority: Priority | None = None


class EncodeMeta(Struct, frozen=True):
    """`e2e_latency` in seconds."""

    id: str
    prompt_tokens: int
    cached_tokens: int
    e2e_latency: float


class EncodeReply(Struct, frozen=True):
    """`embedding`: of a classification head its logits, one a label."""

    embedding: list[float]
    meta_info: EncodeMeta
    index: int | UnsetType = UNSET


class ClassifyRequest(Struct, frozen=True, kw_only=True):
    input: Input
    model: str | None = None
    user: str | None = None
    truncate_prompt_tokens: int | None = None
    cache_salt: str | None = None
    priority: Priority | None = None


class Classification(Struct, frozen=True):
    """`probs`: one a label, of which `label` has the largest; they sum to 1 unless several labels may hold."""

    index: int
    label: str
    probs: list[float]
    num_classes: int


class ClassifyReply(Struct, frozen=True):
    id: str
    created: int
    model: str
    data: list[Classification]
    usage: PromptUsage
    object: Literal["list"] = "list"
