"""A model folder's safetensors: which files there are, what tensors they hold, and the tensors.

Used by weights.py and vision.py. Tensors are views of mapped files. Invariant: whatever is wrong with a file is a
StartupError that names it.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import StartupError


@dataclass(frozen=True, slots=True)
class Header:
    """What a file says of a tensor."""

    dtype: str
    """As safetensors calls it."""
    shape: list[int]


def tensor_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder: those of its index, or the one file."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        try:
            names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
            files = [folder / Path(name).name for name in names]
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise StartupError("model.safetensors.index.json cannot be read") from None
        for file in files:
            if not file.exists():
                raise StartupError(f"the checkpoint's file {file.name} is missing")
        return files
    single = folder / "model.safetensors"
    files = [single] if single.exists() else sorted(folder.glob("*.safetensors"))
    if not files:
        raise StartupError("the model's folder holds no .safetensors files (other formats are not loaded)")
    return files


def checkpoint_tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """All tensors of a model folder's safetensors under the checkpoint's names. Raises StartupError."""
    return tensors_of(tensor_files(folder))


def headers_of(files: list[Path]) -> dict[str, Header]:
    """What the files say of all their tensors, by name. Raises StartupError."""
    found: dict[str, Header] = {}
    for file in files:
        try:
            with safe_open(file, framework="pt", device="cpu") as opened:
                for name in opened.keys():  # noqa: SIM118 (not a dict)
                    tensor = opened.get_slice(name)
                    found[name] = Header(tensor.get_dtype(), tensor.get_shape())
        except (SafetensorError, OSError) as error:
            raise StartupError(f"{file.name} is not a readable safetensors file: {error}") from None
    return found


def tensors_of(files: list[Path]) -> Iterator[tuple[str, Tensor]]:
    """All tensors of the files, each a view of the mapped file, in file order. Raises StartupError."""
    for file in files:
        try:
            with safe_open(file, framework="pt", device="cpu") as opened:
                for name in opened.keys():  # noqa: SIM118 (not a dict)
                    yield name, opened.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise StartupError(f"{file.name} is not a readable safetensors file: {error}") from None
