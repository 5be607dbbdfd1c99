"""/v1/files: what clients upload for batches, and what batches leave for them.

Routed by app.py; kept by data_store.py. Invariant: a client sees the files of its own API key only.
"""

from functools import partial
from typing import Final

from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException
from starlette.requests import Request
from starlette.types import Message, Receive

from ..errors import RequestError
from . import data_store
from .batch_types import PURPOSES, DeletedFile, FileQuery
from .exchange import Exchange
from .protocol import encode
from .service import Service

FORM_BYTES: Final = 1 << 16
"""Of an upload, what is beside the file."""
BINARY: Final = b"application/octet-stream"


async def upload(service: Service, exchange: Exchange) -> None:
    """Serve POST /v1/files: a form with `file` and `purpose`."""
    store, most = service.data, service.config.max_file_bytes
    request = Request(exchange.scope, _limited(exchange, most + FORM_BYTES))
    try:
        async with request.form(max_files=1, max_fields=8, max_part_size=FORM_BYTES) as form:
            file, purpose = form.get("file"), form.get("purpose")
            if not isinstance(file, UploadFile) or file.size is None:
                raise RequestError("send a form (multipart/form-data) with a file", param="file")
            if purpose not in PURPOSES:
                raise RequestError("purpose must be batch", param="purpose", code="unsupported_value")
            if file.size > most:
                raise _too_large(most)
            name, size, content = (file.filename or "")[:255], file.size, file.file
            work = partial(
                data_store.put_file,
                owner=exchange.owner, filename=name, purpose=str(purpose), content=content, size=size,
            )  # fmt: skip
            made = await store.do(work)
    except (MultiPartException, HTTPException, UnicodeError) as error:  # the form names its own charset
        what = getattr(error, "message", None) or getattr(error, "detail", "a name in it is no Unicode")
        raise RequestError(f"the form cannot be read: {what}", param="file", code="invalid_form") from None
    await exchange.reply(encode(made))


async def list_files(service: Service, exchange: Exchange) -> None:
    """Serve GET /v1/files: `purpose`, `after`, `limit`, `order`."""
    query = exchange.query(FileQuery)
    work = partial(
        data_store.list_files,
        owner=exchange.owner,
        purpose=query.purpose,
        after=query.after,
        limit=query.limit,
        newest_first=query.order != "asc",
    )
    await exchange.reply(encode(await service.data.do(work)))


async def retrieve(service: Service, exchange: Exchange) -> None:
    """Serve GET /v1/files/{id}."""
    _, file = await service.data.do(partial(data_store.get_file, owner=exchange.owner, name=exchange.path_id))
    await exchange.reply(encode(file))


async def content(service: Service, exchange: Exchange) -> None:
    """Serve GET /v1/files/{id}/content: the file itself."""
    row, file = await service.data.do(partial(data_store.get_file, owner=exchange.owner, name=exchange.path_id))
    await exchange.start(200, [(b"content-type", BINARY), (b"content-length", str(file.bytes).encode())])
    for start in range(0, file.bytes, data_store.PIECE):
        size = min(data_store.PIECE, file.bytes - start)
        await exchange.write(await service.data.do(partial(data_store.read_file, row=row, start=start, size=size)))
    await exchange.write(b"", last=True)


async def delete(service: Service, exchange: Exchange) -> None:
    """Serve DELETE /v1/files/{id}: 409 while a batch reads it."""
    await service.data.do(partial(data_store.delete_file, owner=exchange.owner, name=exchange.path_id))
    await exchange.reply(encode(DeletedFile(exchange.path_id)))


def _limited(exchange: Exchange, most: int) -> Receive:
    """The exchange's receive, which raises RequestError (413) above that many bytes."""
    size = 0

    async def receive() -> Message:
        nonlocal size
        message = await exchange.receive()
        size += len(message.get("body", b""))
        if size > most:
            raise _too_large(most)
        return message

    return receive


def _too_large(most: int) -> RequestError:
    return RequestError(f"the file is above {most} bytes (--max-file-bytes)", code="body_too_large", status=413)
