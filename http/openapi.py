"""The API's own description: an OpenAPI 3.1 document made of the route table and the structs of bodies.

Used by app.py, which serves it at /openapi.json. Invariant: nothing is described twice; what a client may send is what
the decoders take, since both come from the same types.
"""

from collections.abc import Iterable, Sequence
from typing import Any, Final, NamedTuple

import msgspec

from .protocol import ErrorReply

_REFERENCE: Final = "#/components/schemas/{name}"
_ERRORS: Final = {
    "4XX": "the request is wrong, or is above a limit; `param` names the field",
    "503": "a part of the engine is not up, or the server is shutting down; try again",
}


class Operation(NamedTuple):
    """One route, as far as the document goes."""

    path: str
    methods: tuple[str, ...]
    summary: str
    request: Any = None
    """Type of the body; None: it takes none."""
    required: bool = True
    """The body cannot be left out."""
    reply: Any = None
    """Type of the reply; None: it is text."""
    event: Any = None
    """Type of the `data` of server-sent events, with `stream: true`."""
    error: Any = ErrorReply
    query: Any = None
    """Struct of what may follow the ? in the address."""
    form: Any = None
    """Struct of the fields of a form (multipart/form-data) that it takes."""


def document(operations: Sequence[Operation], title: str, version: str, root_path: str = "") -> dict[str, Any]:
    """Return the document as JSON data. `root_path`: where a proxy has the API."""
    types = [t for o in operations for t in (o.request, o.reply, o.event, o.error, o.form) if t is not None]
    types = [*dict.fromkeys(types)]
    schemas, components = msgspec.json.schema_components(types, ref_template=_REFERENCE)
    known = dict(zip(types, schemas, strict=True))
    paths: dict[str, Any] = {}
    for operation in operations:
        path = operation.path.replace(":path}", "}")
        described = {method.lower(): _described(operation, method, known) for method in operation.methods}
        paths[path] = paths.get(path, {}) | described
    return {
        "openapi": "3.1.0",
        "info": {"title": title, "version": version},
        "servers": [{"url": root_path or "/"}],
        "paths": paths,
        "components": {"schemas": components},
    }


def _described(operation: Operation, method: str, schemas: dict[Any, Any]) -> dict[str, Any]:
    content = {"application/json": {"schema": schemas[operation.reply]}} if operation.reply else _text("text/plain")
    if operation.event is not None:
        content["text/event-stream"] = {"schema": _event(schemas[operation.event])}
    responses = {"200": {"description": "the reply", "content": content}}
    errors = {"application/json": {"schema": schemas[operation.error]}}
    responses |= {status: {"description": text, "content": errors} for status, text in _ERRORS.items()}
    name = operation.path.strip("/").replace("/", "_").replace("{", "").replace(":path}", "") or "index"
    found: dict[str, Any] = {
        "operationId": f"{method.lower()}_{name}",
        "summary": operation.summary,
        "responses": responses,
    }
    if operation.request is not None and method != "GET":
        found["requestBody"] = _body("application/json", schemas[operation.request], operation.required)
    elif operation.form is not None:
        found["requestBody"] = _body("multipart/form-data", schemas[operation.form])
    if parameters := [*_path_parameters(operation.path), *_query_parameters(operation.query)]:
        found["parameters"] = parameters
    return found


def _body(kind: str, schema: Any, required: bool = True) -> dict[str, Any]:
    return {"required": required, "content": {kind: {"schema": schema}}}


def _event(schema: Any) -> dict[str, Any]:
    """One event of a stream, as OpenAPI 3.1's tools read the schema of an event stream."""
    document = {"contentMediaType": "application/json", "contentSchema": schema}
    data = {"type": "string", "anyOf": [{"const": "[DONE]"}, document]}
    properties = {"data": data, "event": {"type": "string"}, "id": {"type": "string"}}
    return {"type": "object", "properties": properties, "required": ["data"]}


def _text(kind: str) -> dict[str, Any]:
    return {kind: {"schema": {"type": "string"}}}


def _path_parameters(path: str) -> Iterable[dict[str, Any]]:
    for part in path.split("/"):
        if part.startswith("{"):
            name = part.strip("{}").removesuffix(":path")
            yield {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}


def _query_parameters(query: Any) -> Iterable[dict[str, Any]]:
    if query is None:
        return
    (_,), components = msgspec.json.schema_components([query], ref_template=_REFERENCE)
    for name, schema in components[query.__name__]["properties"].items():
        # An address has no null: leaving a parameter out is how to say nothing.
        kinds = [kind for kind in schema.pop("anyOf", ()) if kind != {"type": "null"}]
        schema = {k: v for k, v in schema.items() if v is not None} | (kinds[0] if kinds else {})
        yield {"name": name, "in": "query", "required": False, "schema": schema}
