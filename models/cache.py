"""The cache folder: converted models and the embedded model's file. Used by embedded.py and resolve.py in the root.

Invariant: what bears its final name is complete. Work happens in `<name>.partial` beside it under a lock, and one
rename publishes it; a killed process leaves only a `.partial`, which the next one removes.
"""

import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeAlias

from ..errors import StartupError

Progress: TypeAlias = Callable[[str, int, int], None]
"""progress(stage, done, total) in bytes; stages are "download" (of the embedded model), "fetch", "convert" and "wait"
(for another process; 0, 0)."""


def no_progress(stage: str, done: int, total: int) -> None:
    """A Progress for callers that show none."""


def cache_folder() -> Path:
    """`$ACTORSERVE_CACHE`, or `actorserve` under `$XDG_CACHE_HOME` or `~/.cache`; made if it is not there.

    Raises StartupError if it cannot be made.
    """
    own, xdg = os.environ.get("ACTORSERVE_CACHE"), os.environ.get("XDG_CACHE_HOME")
    folder = Path(own) if own else (Path(xdg) if xdg else Path.home() / ".cache") / "actorserve"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StartupError(
            f"cannot create the cache folder {folder} ({error.strerror}); set ACTORSERVE_CACHE to a writable one"
        ) from error
    return folder


@contextmanager
def locked(target: Path, progress: Progress = no_progress) -> Iterator[None]:
    """Hold the lock of one cache entry; the kernel drops it with the process, so no lock outlives its holder.

    An OSError of the block (disk full, no permission) becomes a StartupError.
    """
    try:
        target.parent.mkdir(exist_ok=True)
        with open(target.with_name(f".{target.name}.lock"), "w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                progress("wait", 0, 0)
                fcntl.flock(lock, fcntl.LOCK_EX)
            yield
    except OSError as error:
        raise StartupError(f"cannot write to the cache folder {target.parent}: {error.strerror or error}") from error


@contextmanager
def scratch(target: Path) -> Iterator[Path]:
    """Yield an empty `<target>.partial`, removed afterwards, like one a killed process left. Hold the lock."""
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir()
        yield partial
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def publish(target: Path) -> Iterator[Path]:
    """Yield an empty folder that becomes `target` if the block succeeds and vanishes if it raises. Hold the lock."""
    with scratch(target) as folder:
        yield folder
        folder.rename(target)
