"""Batches in the DataStore: each function here is the work of one transaction, given to DataStore.do.

Used by batches.py and batch_runner.py. Invariant: a line of a batch has at most one answer, ever; a batch that ended
has each line of its input in exactly one of its two files, and no rows in `lines` any more.
"""

import tempfile
import time
import uuid
from collections.abc import Callable, Collection, Iterator
from typing import Final, NamedTuple

import msgspec

from ..errors import RequestError
from .batch_types import (
    UNFINISHED,
    Batch,
    BatchError,
    BatchErrors,
    BatchList,
    BatchRequest,
    InputLine,
    LineError,
    OutputLine,
    RequestCounts,
    Status,
    window_seconds,
)
from .data_store import PIECE, Database, get_file, page, put_file, read_file
from .error_replies import decode_body

MOST_LINES: Final = 50_000
MOST_ERRORS: Final = 20
"""That are told of a batch that is refused."""
SORTED_BYTES: Final = 512
"""Of a line's body, what its turn goes by."""
_COLUMNS: Final = "body, total, completed, failed"
_SPOOL_BYTES: Final = 8 << 20
_line_decoder: Final = msgspec.json.Decoder(InputLine)
_body_decoder: Final = msgspec.json.Decoder(dict[str, msgspec.Raw])


class Job(NamedTuple):
    """A batch that is not at its end. `row` is its number in the database, `file` its input's."""

    row: int
    file: int
    owner: str
    batch: Batch


class Line(NamedTuple):
    """A line without an answer. `place`: its turn among the lines of the batch."""

    place: int
    custom_id: str
    request: bytes


def create(db: Database, owner: str, request: BatchRequest) -> Batch:
    """Keep a new batch. Raises RequestError (404) where there is no such file."""
    _, file = get_file(db, owner, request.input_file_id, "input_file_id")
    if file.purpose != "batch":
        raise RequestError("the purpose of the file is not `batch`", param="input_file_id")
    now = int(time.time())
    batch = Batch(
        id=f"batch_{uuid.uuid4().hex}",
        endpoint=request.endpoint,
        input_file_id=file.id,
        completion_window=request.completion_window,
        status="validating",
        created_at=now,
        expires_at=now + window_seconds(request.completion_window),
        metadata=request.metadata,
    )
    row = (batch.id, owner, batch.status, file.id, msgspec.json.encode(batch))
    db.execute("INSERT INTO batches(id, owner, status, input, body) VALUES(?, ?, ?, ?, ?)", row)
    return batch


def get(db: Database, owner: str, name: str, param: str = "batch_id") -> tuple[int, Batch]:
    """Return (row, batch). Raises RequestError (404)."""
    row = db.execute(f"SELECT number, {_COLUMNS} FROM batches WHERE id = ? AND owner = ?", (name, owner)).fetchone()
    if row is None:
        raise RequestError(f"there is no batch {name[:80]!r}", param=param, code="not_found", status=404)
    return row[0], _batch(row[1:])


def list_batches(db: Database, owner: str, after: str | None, limit: int) -> BatchList:
    """Return a page of batches, newest first. Raises RequestError (404) for an unknown `after`."""
    last = 0 if after is None else get(db, owner, after, "after")[0]
    rows = page(db, "batches", _COLUMNS, owner, last, limit, newest_first=True)
    batches = [_batch(row) for row in rows[:limit]]
    first, last_one = (batches[0].id, batches[-1].id) if batches else (None, None)
    return BatchList(batches, first, last_one, len(rows) > limit)


def cancel(db: Database, owner: str, name: str) -> Batch:
    """Have the runner end a batch. Raises RequestError: 404, or 400 for one that has ended."""
    row, batch = get(db, owner, name)
    if batch.status not in ("validating", "in_progress", "cancelling"):
        raise RequestError(f"the batch is {batch.status}", param="batch_id", code="not_cancellable")
    return _move(db, row, batch, "cancelling", cancelling_at=batch.cancelling_at or int(time.time()))


def next_job(db: Database) -> Job | None:
    """Return the oldest batch that is not at its end."""
    marks = ", ".join("?" * len(UNFINISHED))
    query = f"SELECT b.number, f.number, b.owner, {_COLUMNS} FROM batches b JOIN files f ON f.id = b.input"
    row = db.execute(f"{query} WHERE b.status IN ({marks}) ORDER BY b.number LIMIT 1", UNFINISHED).fetchone()
    return None if row is None else Job(row[0], row[1], row[2], _batch(row[3:]))


def status(db: Database, row: int) -> str:
    """Return the status of a batch, which may have been cancelled."""
    found: str = db.execute("SELECT status FROM batches WHERE number = ?", (row,)).fetchone()[0]
    return found


def validate(db: Database, job: Job, most_bytes: int) -> Batch:
    """Note the lines of a new batch's input; or what is wrong with them, and the batch has failed.

    Lines take their turns sorted by how their bodies begin: those with the same system prompt find it cached.
    """
    errors: list[BatchError] = []
    seen: set[str] = set()
    rows = []
    for number, (start, text) in enumerate(_input_lines(db, job.file, most_bytes)):
        if not text.strip():
            continue
        try:
            line = checked_line(text, [job.batch.endpoint], seen, most_bytes)
            rows.append((bytes(line.body)[:SORTED_BYTES], number, line.custom_id, start, len(text)))
        except RequestError as error:
            errors.append(BatchError(error.code, error.message, number + 1, error.param))
        if len(errors) >= MOST_ERRORS:
            break
        if len(rows) > MOST_LINES:
            errors.append(BatchError("too_many_lines", f"a batch has at most {MOST_LINES} lines"))
            break
    if not rows and not errors:
        errors.append(BatchError("empty_file", "the file has no lines"))
    now = int(time.time())
    if errors:
        return _move(db, job.row, job.batch, "failed", failed_at=now, errors=BatchErrors(errors))
    query = "INSERT INTO lines(batch, place, number, custom_id, start, size) VALUES(?, ?, ?, ?, ?, ?)"
    db.executemany(query, ((job.row, place, *row[1:]) for place, row in enumerate(sorted(rows))))
    db.execute("UPDATE batches SET total = ? WHERE number = ?", (len(rows), job.row))
    return _move(db, job.row, job.batch, "in_progress", in_progress_at=now)


def open_lines(db: Database, job: Job, after: int, limit: int) -> list[Line]:
    """Return lines without an answer beyond place `after`, in order."""
    query = "SELECT place, custom_id, start, size FROM lines WHERE batch = ? AND place > ? AND answer IS NULL"
    rows = db.execute(f"{query} ORDER BY place LIMIT ?", (job.row, after, limit)).fetchall()
    return [Line(place, name, read_file(db, job.file, start, size)) for place, name, start, size in rows]


def answer(db: Database, row: int, place: int, good: bool, line: OutputLine) -> None:
    """Keep a line's answer, if it has none yet."""
    query = "UPDATE lines SET good = ?, answer = ? WHERE batch = ? AND place = ? AND answer IS NULL"
    if db.execute(query, (good, msgspec.json.encode(line), row, place)).rowcount:
        column = "completed" if good else "failed"
        db.execute(f"UPDATE batches SET {column} = {column} + 1 WHERE number = ?", (row,))


def finish(db: Database, job: Job, end: Status, reason: LineError | None = None) -> Batch:
    """Write a batch's files and end it as `end`; lines without an answer get `reason`, and without one there are none.

    Raises RuntimeError otherwise: the batch goes on.
    """
    query = "SELECT place, custom_id FROM lines WHERE batch = ? AND answer IS NULL"
    for place, custom_id in db.execute(query, (job.row,)).fetchall():
        if reason is None:
            raise RuntimeError(f"line {custom_id!r} of {job.batch.id} has no answer")
        answer(db, job.row, place, False, OutputLine(new_line_id(), custom_id, None, reason))
    batch = get(db, job.owner, job.batch.id)[1]
    files = {}
    for kind, good in (("output", True), ("error", False)):
        with tempfile.SpooledTemporaryFile(_SPOOL_BYTES) as content:
            query = "SELECT answer FROM lines WHERE batch = ? AND good = ? ORDER BY number"
            for (line,) in db.execute(query, (job.row, good)):
                content.write(line + b"\n")
            if size := content.tell():
                content.seek(0)
                name = f"{batch.id}_{kind}.jsonl"
                files[f"{kind}_file_id"] = put_file(db, job.owner, name, "batch_output", content, size).id
    db.execute("DELETE FROM lines WHERE batch = ?", (job.row,))
    now = int(time.time())
    return _move(db, job.row, batch, end, finalizing_at=now, **{f"{end}_at": now}, **files)


def new_line_id() -> str:
    return f"batch_req_{uuid.uuid4().hex}"


def _move(db: Database, row: int, batch: Batch, status: Status, **fields: object) -> Batch:
    batch = msgspec.structs.replace(batch, status=status, **fields)
    db.execute("UPDATE batches SET status = ?, body = ? WHERE number = ?", (status, msgspec.json.encode(batch), row))
    return batch


def _batch(row: tuple[bytes, int, int, int]) -> Batch:
    body, *counts = row
    return msgspec.structs.replace(msgspec.json.decode(body, type=Batch), request_counts=RequestCounts(*counts))


def checked_line(text: bytes, endpoints: Collection[str], seen: set[str], most_bytes: int) -> InputLine:
    """Return a line of an input; its custom_id is `seen` then. Raises RequestError."""
    if len(text) > most_bytes:
        raise RequestError(f"the line is above {most_bytes} bytes", code="body_too_large")
    line = decode_body(_line_decoder, text)
    if line.url not in endpoints:
        raise RequestError(f"url must be {' or '.join(endpoints)}", param="url", code="mismatched_endpoint")
    if not bytes(line.body).lstrip().startswith(b"{"):
        raise RequestError("body is not an object", param="body", code="invalid_type")
    decode_body(_body_decoder, bytes(line.body))  # a Raw is taken as it stands, also where it is not UTF-8
    if line.custom_id in seen:
        raise RequestError(f"custom_id {line.custom_id!r} comes twice", param="custom_id", code="duplicate_custom_id")
    seen.add(line.custom_id)
    return line


def _input_lines(db: Database, file: int, most_bytes: int) -> Iterator[tuple[int, bytes]]:
    with db.blobopen("files", "content", file, readonly=True) as blob:
        yield from split_lines(blob.read, most_bytes)


def split_lines(read: Callable[[int], bytes], most_bytes: int) -> Iterator[tuple[int, bytes]]:
    """(where it starts, text) of each line of what `read` gives out; one above the limit comes in parts above it."""
    start, rest = 0, b""
    while piece := read(PIECE):
        *whole, rest = (rest + piece).split(b"\n")
        for text in whole:
            yield start, text
            start += len(text) + 1
        if len(rest) > most_bytes:
            yield start, rest
            start, rest = start + len(rest), b""
    if rest:
        yield start, rest
