"""The JSON bodies of /v1/files and /v1/batches, and the lines of a batch's files.

Used by files.py, batches.py, batch_store.py and batch_runner.py. Times are Unix seconds.
"""

from typing import Annotated, Any, Final, Literal, TypeAlias

import msgspec
from msgspec import Meta, Struct, field

ENDPOINTS: Final = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses")
"""What a batch's lines may ask for, as far as the server has it."""
Status: TypeAlias = Literal["validating", "failed", "in_progress", "completed", "expired", "cancelling", "cancelled"]
"""Of OpenAI's all but finalizing, which is one transaction here."""
UNFINISHED: Final = ("validating", "in_progress", "cancelling")
PURPOSES: Final = ("batch",)


class UploadForm(Struct, frozen=True):
    """The form of POST /v1/files, for the API's document; it is read in pieces."""

    file: Annotated[str, Meta(extra_json_schema={"format": "binary"})]
    purpose: Literal["batch"]


class FileQuery(Struct, frozen=True, kw_only=True):
    """`after`: the last file of the page before."""

    purpose: str | None = None
    after: str | None = None
    limit: Annotated[int, Meta(ge=1, le=10_000)] = 10_000
    order: Literal["asc", "desc"] = "desc"


class BatchQuery(Struct, frozen=True, kw_only=True):
    """`after`: the last batch of the page before."""

    after: str | None = None
    limit: Annotated[int, Meta(ge=1, le=100)] = 20


class FileObject(Struct, frozen=True, kw_only=True):
    id: str
    object: Literal["file"] = "file"
    bytes: int
    created_at: int
    filename: str
    purpose: str
    status: Literal["processed"] = "processed"


class FileList(Struct, frozen=True):
    data: list[FileObject]
    first_id: str | None
    last_id: str | None
    has_more: bool
    object: Literal["list"] = "list"


class DeletedFile(Struct, frozen=True):
    id: str
    object: Literal["file"] = "file"
    deleted: bool = True


class BatchRequest(Struct, frozen=True, kw_only=True):
    input_file_id: str
    endpoint: Annotated[str, Meta(extra_json_schema={"enum": list(ENDPOINTS)})]
    completion_window: Annotated[str, Meta(pattern="^[1-9][0-9]{0,3}[hd]$")]
    """OpenAI knows "24h"; here any number of hours or days."""
    metadata: Annotated[dict[str, str], Meta(max_length=16)] | None = None


class BatchError(Struct, frozen=True):
    """What is wrong with the input; `line` counts from 1."""

    code: str
    message: str
    line: int | None = None
    param: str | None = None


class BatchErrors(Struct, frozen=True):
    data: list[BatchError]
    object: Literal["list"] = "list"


class RequestCounts(Struct, frozen=True):
    total: int = 0
    completed: int = 0
    failed: int = 0


class Batch(Struct, frozen=True, kw_only=True):
    """OpenAI's object."""

    id: str
    object: Literal["batch"] = "batch"
    endpoint: str
    input_file_id: str
    completion_window: str
    status: Status
    created_at: int
    expires_at: int
    errors: BatchErrors | None = None
    output_file_id: str | None = None
    error_file_id: str | None = None
    in_progress_at: int | None = None
    finalizing_at: int | None = None
    completed_at: int | None = None
    failed_at: int | None = None
    expired_at: int | None = None
    cancelling_at: int | None = None
    cancelled_at: int | None = None
    request_counts: RequestCounts = field(default_factory=RequestCounts)
    metadata: dict[str, str] | None = None


class BatchList(Struct, frozen=True):
    data: list[Batch]
    first_id: str | None
    last_id: str | None
    has_more: bool
    object: Literal["list"] = "list"


# ------------------------------------------------------------------ lines


class InputLine(Struct, frozen=True):
    """A request; its body is read when it is its turn."""

    custom_id: Annotated[str, Meta(min_length=1, max_length=512)]
    method: Literal["POST"]
    url: str
    body: msgspec.Raw


class LineResponse(Struct, frozen=True):
    status_code: int
    request_id: str
    body: msgspec.Raw


class LineError(Struct, frozen=True):
    code: str
    message: str


class OutputLine(Struct, frozen=True):
    """An answer (status 200: in the output file, others in the error file), or why there is none."""

    id: str
    custom_id: str
    response: LineResponse | None
    error: LineError | None


def window_seconds(window: str) -> int:
    """Return a completion_window in seconds."""
    return int(window[:-1]) * (3600 if window[-1] == "h" else 86400)


def line_body(body: bytes | msgspec.Raw, **fields: Any) -> bytes:
    """Return a JSON object with these fields set, the others as they stand. Raises msgspec.DecodeError."""
    given = msgspec.json.decode(body, type=dict[str, msgspec.Raw])
    return msgspec.json.encode({**given, **fields})
