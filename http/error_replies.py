"""Errors as clients see them: status, OpenAI's or Anthropic's JSON shape, Retry-After; and bad JSON as a RequestError.

Used by every route. Invariant: no text of an unexpected exception reaches a client, and `param` names the field that
the client wrote.
"""

import re
from collections.abc import Callable
from http import HTTPStatus
from typing import Any, Final, NamedTuple, TypeVar

import msgspec

from ..errors import ActorserveError, RequestError
from .json_depth import MAX_JSON_DEPTH, too_deep
from .protocol import AnthropicErrorDetail, AnthropicErrorReply, ErrorDetail, ErrorReply, encode

T = TypeVar("T")

_TYPES: Final = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
_ANTHROPIC_TYPES: Final = _TYPES | {404: "not_found_error", 413: "request_too_large", 503: "overloaded_error"}
_LOCATION: Final = re.compile(r" - at (?:`(?:key|\.\.\.)` in )?`\$(?P<path>[^`]*)`$")
_FIELD: Final = re.compile(r"(?:missing required|contains unknown) field `(?P<name>[^`]+)`")
RETRY_STATUSES: Final = (429, 503)


class InternalError(ActorserveError):
    """Stands in for an unexpected exception, whose text stays in the log."""

    def __init__(self) -> None:
        super().__init__("internal error; the server's log has the details")


def error_body(error: ActorserveError) -> bytes:
    """Return OpenAI's JSON object for an error."""
    kind = _TYPES.get(error.status) or ("server_error" if error.status >= 500 else "invalid_request_error")
    return encode(ErrorReply(ErrorDetail(error.message, kind, error.param, error.code)))


def anthropic_error_body(error: ActorserveError) -> bytes:
    """Return Anthropic's JSON object for an error. It has no place for the field, so the message begins with it."""
    kind = _ANTHROPIC_TYPES.get(error.status) or ("api_error" if error.status >= 500 else "invalid_request_error")
    named = error.param is None or error.message.startswith(error.param)
    message = error.message if named else f"{error.param}: {error.message}"
    return encode(AnthropicErrorReply("error", AnthropicErrorDetail(kind, message)))


def _event(body: bytes) -> bytes:
    return b"data: " + body + b"\n\n"


def _anthropic_event(body: bytes) -> bytes:
    return b"event: error\ndata: " + body + b"\n\n"


class ErrorShape(NamedTuple):
    """How a protocol writes errors: as a body, and that as the last event of a stream."""

    type: Any
    body: Callable[[ActorserveError], bytes]
    event: Callable[[bytes], bytes]


OPENAI_ERRORS: Final = ErrorShape(ErrorReply, error_body, _event)
ANTHROPIC_ERRORS: Final = ErrorShape(AnthropicErrorReply, anthropic_error_body, _anthropic_event)


def error_headers(error: ActorserveError) -> list[tuple[bytes, bytes]]:
    """Return the headers an error asks for: Retry-After in seconds where trying again makes sense."""
    if error.status == 401:
        return [(b"www-authenticate", b"Bearer")]
    if error.status not in RETRY_STATUSES:
        return []
    return [(b"retry-after", str(getattr(error, "retry_after", 1)).encode())]


def route_error(status: int, method: str, path: str) -> ActorserveError:
    """Return the error for a request that no route takes (404, 405, or another status of the router)."""
    if status == 404:
        return RequestError(f"no route {path}", code="not_found", status=404)
    if status == 405:
        return RequestError(f"{path} does not take {method}", code="method_not_allowed", status=405)
    return RequestError(HTTPStatus(status).phrase, code="http_error", status=status)


def decode_body(decoder: "msgspec.json.Decoder[T]", body: bytes) -> T:
    """Decode a request body; raises RequestError (400) that names the field, for all that can be wrong with it."""
    if too_deep(body):
        raise _too_deep()
    try:
        return decoder.decode(body)
    except msgspec.ValidationError as error:
        raise invalid_field(str(error)) from None
    except msgspec.DecodeError as error:
        raise RequestError(f"the body is not valid JSON: {error}", code="invalid_json") from None
    except RecursionError:
        raise _too_deep() from None
    except UnicodeDecodeError:
        raise RequestError("the body is not valid UTF-8", code="invalid_json") from None


def _too_deep() -> RequestError:
    return RequestError(f"the JSON body is nested more than {MAX_JSON_DEPTH} deep", code="invalid_json")


def invalid_field(text: str) -> RequestError:
    """Return msgspec's validation error as ours: ``$.temperature`` becomes the param ``temperature``."""
    location = _LOCATION.search(text)
    path = location["path"].removeprefix(".") if location else ""
    what = (text[: location.start()] if location else text).removeprefix("Object ")
    field = _FIELD.search(what)
    if field:
        path = f"{path}.{field['name']}" if path else field["name"]
    # /generate's parameters are named without their envelope, as SamplingParams.check names them.
    path = re.sub(r"^sampling_params(\[\d+\])?\.", "", path).removesuffix("[...]")
    if not path:
        return RequestError(f"invalid request: {what}", code="invalid_type")
    code = "missing_required_parameter" if field and "missing" in what else "invalid_type"
    if field and "unknown" in what:
        code = "unknown_parameter"
    return RequestError(f"{path}: {what[0].lower()}{what[1:]}", param=path, code=code)
