"""DataStore: what a server keeps on disk in --data-dir: the files of /v1/files, and the batches (batch_store.py).

One SQLite database, used in a thread of its own so that the front's loop never waits for the disk. Invariant: one
server at a time has it; what `do` has returned from survives the end of the process and of the machine; a transaction
that raises leaves nothing behind.
"""

import asyncio
import fcntl
import os
import sqlite3
import time
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any, Final, TypeVar

from ..errors import RequestError, StartupError
from .batch_types import UNFINISHED, FileList, FileObject

T = TypeVar("T")
Database = sqlite3.Connection

PIECE: Final = 1 << 20
"""Bytes of a file that are in memory at once."""
_LOCK_SECONDS: Final = 5.0
_SCHEMA: Final = """
CREATE TABLE IF NOT EXISTS files(
    number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT UNIQUE NOT NULL, owner TEXT NOT NULL, created_at INTEGER NOT NULL,
    filename TEXT NOT NULL, purpose TEXT NOT NULL, bytes INTEGER NOT NULL, content BLOB NOT NULL);
CREATE TABLE IF NOT EXISTS batches(
    number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT UNIQUE NOT NULL, owner TEXT NOT NULL, status TEXT NOT NULL,
    input TEXT NOT NULL, body BLOB NOT NULL, total INTEGER NOT NULL DEFAULT 0, completed INTEGER NOT NULL DEFAULT 0,
    failed INTEGER NOT NULL DEFAULT 0);
CREATE TABLE IF NOT EXISTS lines(
    batch INTEGER NOT NULL, place INTEGER NOT NULL, number INTEGER NOT NULL, custom_id TEXT NOT NULL,
    start INTEGER NOT NULL, size INTEGER NOT NULL, good INTEGER, answer BLOB, PRIMARY KEY(batch, place));
"""
_FILE: Final = "id, bytes, created_at, filename, purpose"
_FILE_COLUMNS: Final = "id, owner, created_at, filename, purpose, bytes, content"


class DataStore:
    """See the module's text."""

    def __init__(self, folder: str, server: int | None = None) -> None:
        """`server`: a number that all fronts of a server share, if it has several.

        Raises StartupError where the folder cannot be used, or another server uses it.
        """
        try:
            Path(folder).mkdir(parents=True, exist_ok=True)
            path = Path(folder) / "actorserve.sqlite"
            self._db = sqlite3.connect(path, timeout=_LOCK_SECONDS, check_same_thread=False)
            if server is None:
                self._db.execute("PRAGMA locking_mode=EXCLUSIVE")
            self._lock = None if server is None else _shared_lock(folder, server)
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=FULL")
            self._db.executescript(f"BEGIN IMMEDIATE; {_SCHEMA} COMMIT;")
        except sqlite3.OperationalError as error:
            what = "another server uses it" if "locked" in str(error) else str(error)
            raise StartupError(f"--data-dir {folder}: {what}") from error
        except (OSError, sqlite3.Error) as error:
            raise StartupError(f"--data-dir {folder}: {error}") from error
        self._thread = ThreadPoolExecutor(1, "data")

    async def do(self, work: Callable[[Database], T]) -> T:
        """Run a transaction; what it did is on disk when this returns. Raises what it raises."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._transact, work)

    def close(self) -> None:
        """Wait for what was begun, and close."""
        self._thread.shutdown()
        self._db.close()
        if self._lock is not None:
            os.close(self._lock)

    def _transact(self, work: Callable[[Database], T]) -> T:
        with self._db:
            self._db.execute("BEGIN IMMEDIATE")  # what it reads stays so until it has written, whoever else is there
            return work(self._db)


def _shared_lock(folder: str, server: int) -> int:
    """Return a descriptor whose life is the claim of a server's front on a folder: the first one writes who they are,
    while it alone has the lock, and all hold it together. Raises OperationalError if the folder is another server's."""
    descriptor = os.open(Path(folder) / "actorserve.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.pwrite(descriptor, b"%020d" % server, 0)
    except BlockingIOError:
        pass
    deadline = time.monotonic() + _LOCK_SECONDS
    while time.monotonic() < deadline:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(0.01)
            continue
        if os.pread(descriptor, 20, 0) == b"%020d" % server:
            return descriptor
        break
    os.close(descriptor)
    raise sqlite3.OperationalError("the folder is locked")


# ------------------------------------------------------------------ files: the work of transactions


def put_file(db: Database, owner: str, filename: str, purpose: str, content: IO[bytes], size: int) -> FileObject:
    """Keep a file of that many bytes."""
    made = FileObject(
        id=f"file-{uuid.uuid4().hex}", bytes=size, created_at=int(time.time()), filename=filename, purpose=purpose
    )
    row = (made.id, owner, made.created_at, filename, purpose, size, size)
    cursor = db.execute(f"INSERT INTO files({_FILE_COLUMNS}) VALUES(?, ?, ?, ?, ?, ?, zeroblob(?))", row)
    assert cursor.lastrowid is not None
    with db.blobopen("files", "content", cursor.lastrowid) as blob:
        while piece := content.read(PIECE):
            blob.write(piece)
    return made


def get_file(db: Database, owner: str, name: str, param: str = "file_id") -> tuple[int, FileObject]:
    """Return (row, file). Raises RequestError (404)."""
    row = db.execute(f"SELECT number, {_FILE} FROM files WHERE id = ? AND owner = ?", (name, owner)).fetchone()
    if row is None:
        raise RequestError(f"there is no file {name[:80]!r}", param=param, code="not_found", status=404)
    return row[0], _file(row[1:])


def read_file(db: Database, row: int, start: int, size: int) -> bytes:
    """Return a part of a file's content."""
    with db.blobopen("files", "content", row, readonly=True) as blob:
        blob.seek(start)
        return blob.read(size)


def list_files(
    db: Database, owner: str, purpose: str | None, after: str | None, limit: int, newest_first: bool
) -> FileList:
    """Return a page of files. Raises RequestError (404) for an unknown `after`."""
    last = 0 if after is None else get_file(db, owner, after, "after")[0]
    rows = page(db, "files", _FILE, owner, last, limit, newest_first, ("purpose", purpose))
    files = [_file(row) for row in rows[:limit]]
    first, last_one = (files[0].id, files[-1].id) if files else (None, None)
    return FileList(files, first, last_one, len(rows) > limit)


def delete_file(db: Database, owner: str, name: str) -> None:
    """Forget a file. Raises RequestError: 404, or 409 while a batch reads it."""
    get_file(db, owner, name)
    marks = ", ".join("?" * len(UNFINISHED))
    query = f"SELECT 1 FROM batches WHERE input = ? AND status IN ({marks})"
    if db.execute(query, (name, *UNFINISHED)).fetchone():
        raise RequestError("a batch that is not at its end reads this file", code="file_in_use", status=409)
    db.execute("DELETE FROM files WHERE id = ?", (name,))


def page(
    db: Database,
    table: str,
    columns: str,
    owner: str,
    last: int,
    limit: int,
    newest_first: bool,
    only: tuple[str, str | None] = ("owner", None),
) -> list[tuple[Any, ...]]:
    """Return the rows after row `last` (0: from the start), one more than `limit` if there are more."""
    where, values = ["owner = ?"], [owner]
    if only[1] is not None:
        where.append(f"{only[0]} = ?")
        values.append(only[1])
    if last:
        where.append(f"number {'<' if newest_first else '>'} {last}")
    order = "DESC" if newest_first else "ASC"
    query = f"SELECT {columns} FROM {table} WHERE {' AND '.join(where)} ORDER BY number {order} LIMIT {limit + 1}"
    return db.execute(query, values).fetchall()


def _file(row: tuple[Any, ...]) -> FileObject:
    name, size, created, filename, purpose = row
    return FileObject(id=name, bytes=size, created_at=created, filename=filename, purpose=purpose)
