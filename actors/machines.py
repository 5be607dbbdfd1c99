"""The machines of one server (--nnodes): what their flags say, the key that they share, and what must be equal on them.

Used by the root, the gate and the links. Invariant: what is wrong with the flags is known before anything is started.
"""

import hashlib
from pathlib import Path
from typing import Final

import msgspec

from ..config import EngineConfig, ModelInfo
from ..errors import StartupError
from .messages import FsmInbox, SchedulerInbox, TextInbox

MIN_KEY: Final = 32
MAX_KEY: Final = 4096
"""Bytes."""
_SAME: Final = (
    "nnodes", "dp_size", "load_format", "dtype", "quantization", "kv_cache_dtype", "is_embedding",
    "embedding_attention", "skip_tokenizer_init", "random_seed",
)  # fmt: skip
"""Settings that outputs depend on, or who has which replica."""


def check_machines(config: EngineConfig) -> None:
    """Raise StartupError where flags for several machines are wrong or lacking."""
    check_shares(config)
    if config.nnodes > 1:
        address_of(config)
        read_key(config)


def check_shares(config: EngineConfig) -> None:
    """Raise StartupError where the replicas do not divide among the machines, or this is none of them."""
    count, rank = config.nnodes, config.node_rank
    if rank >= count:
        raise StartupError(f"--node-rank {rank} is of no machine: with --nnodes {count} they are 0 to {count - 1}")
    if config.dp_size % count:
        raise StartupError(
            f"--dp-size {config.dp_size} does not divide by --nnodes {count}: each machine has as many replicas; "
            "a model that GPUs share (--tp-size) stays within a machine"
        )


def address_of(config: EngineConfig) -> tuple[str, int]:
    """(host, port) of --dist-init-addr. Raises StartupError."""
    host, colon, port = (config.dist_init_addr or "").rpartition(":")
    if not colon or not host or not port.isascii() or not port.isdigit() or not 0 < int(port) < 1 << 16:
        said = "is needed with --nnodes" if config.dist_init_addr is None else f"{config.dist_init_addr} is none"
        raise StartupError(
            f"--dist-init-addr {said}: HOST:PORT on which node 0 waits for the others, e.g. 10.0.0.1:5000"
        )
    return host.removeprefix("[").removesuffix("]"), int(port)


def read_key(config: EngineConfig) -> bytes:
    """The machines' key. Raises StartupError."""
    if config.node_key_file is None:
        raise StartupError(
            "--node-key-file is needed with --nnodes: a file that is the same on all machines, e.g. of "
            "`openssl rand -hex 32`; who has it can read requests and answer them"
        )
    try:
        with Path(config.node_key_file).open("rb") as file:
            key = file.read(MAX_KEY + 1).strip()
    except OSError as error:
        raise StartupError(f"--node-key-file cannot be read: {error.strerror}") from error
    if not MIN_KEY <= len(key) <= MAX_KEY:
        raise StartupError(f"--node-key-file has {len(key)} bytes: a key has {MIN_KEY} to {MAX_KEY}")
    return key


def facts_of(config: EngineConfig, model: ModelInfo) -> dict[str, str]:
    """What must be the same on all machines, by a name that says what to look at."""
    facts = {f"--{name.replace('_', '-')}": str(getattr(config, name)) for name in _SAME}
    digest = hashlib.sha256((Path(model.path) / "config.json").read_bytes()).hexdigest()[:16]
    return facts | {
        "messages, as of another version of actorserve": _messages(),
        "page size": str(config.page_size),
        "config.json of the model": digest,
        "vocabulary": str(model.vocab_size),
        "context length": str(model.context_length),
        "tokens that end an output": str(sorted(model.eos_ids)),
    }


def _messages() -> str:
    """A digest of all that may be said to a scheduler, and by one."""
    said = [msgspec.json.schema(union) for union in (SchedulerInbox, TextInbox, FsmInbox)]
    return hashlib.sha256(msgspec.json.encode(said, order="deterministic")).hexdigest()[:16]


def differences(ours: dict[str, str], theirs: dict[str, str]) -> str:
    """What differs, in words; empty: nothing does."""
    names = [name for name in ours | theirs if ours.get(name) != theirs.get(name)]
    return ", ".join(f"{name} ({theirs.get(name, 'none')}, on node 0 {ours.get(name, 'none')})" for name in names)
