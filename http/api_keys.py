"""API keys: who may use the server, and how much of it. Read once, at the front's start.

Used by app.py. Invariant: without keys everybody is the same nameless client; with keys, who brings none gets 401. A
key is compared as a digest, with all of them, in constant time.
"""

import hashlib
import hmac
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Final

import msgspec
from msgspec import Meta, Struct

from ..config import EngineConfig
from ..errors import RequestError, StartupError

Headers = list[tuple[bytes, bytes]]
_PREFIX: Final = b"bearer "


class Key(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One of the `[[keys]]` of --api-key-file (TOML). A limit that is not given is none."""

    name: Annotated[str, Meta(pattern="^[A-Za-z0-9_.@-]{1,64}$")]
    """In logs; files and batches belong to it."""
    key: Annotated[str, Meta(min_length=1, max_length=512)] | None = None
    sha256: Annotated[str, Meta(pattern="^[0-9a-f]{64}$")] | None = None
    """Instead of `key`: its digest, so that the file is no secret."""
    weight: Annotated[float, Meta(gt=0, le=1e6)] = 1.0
    """Its share of the engine's tokens, in relation to those of other keys that wait."""
    max_concurrency: Annotated[int, Meta(ge=1)] | None = None
    """Requests that it may have in the engine at once."""
    tokens_per_minute: Annotated[int, Meta(ge=1)] | None = None
    """Of prompts and outputs together."""
    max_priority: int = 0
    """The highest `priority` that its requests may have."""
    admin: bool = False
    """May empty the cache, pause the engine and abort everybody's requests."""
    shared_cache: bool = False
    """Prefixes are shared with other keys of this kind, which can then tell by its speed what these have asked."""

    @property
    def digest(self) -> bytes:
        if self.sha256 is not None:
            return bytes.fromhex(self.sha256)
        assert self.key is not None
        return hashlib.sha256(self.key.encode()).digest()

    @property
    def salt(self) -> str:
        """What its prefixes are cached under."""
        return "" if self.shared_cache else hashlib.sha256(b"cache salt\0" + self.digest).hexdigest()[:32]


class KeyFile(Struct, frozen=True, forbid_unknown_fields=True):
    keys: list[Key]


class KeyRing:
    """The keys there are; none of them if the server is open to everybody."""

    def __init__(self, keys: list[Key]) -> None:
        self._keys = [(key.digest, key) for key in keys]

    def __bool__(self) -> bool:
        return bool(self._keys)

    def __iter__(self) -> Iterator[Key]:
        return (key for _, key in self._keys)

    def key_of(self, headers: Headers) -> Key:
        """Return the key in `Authorization: Bearer` or `x-api-key`. Raises RequestError (401)."""
        brought = hashlib.sha256(_brought(headers)).digest()
        found: Key | None = None
        for digest, key in self._keys:
            if hmac.compare_digest(digest, brought):
                found = key
        if found is None:
            what = "the API key is missing or wrong; send it as `Authorization: Bearer KEY`"
            raise RequestError(what, code="invalid_api_key", status=401)
        return found


def read_keys(config: EngineConfig) -> KeyRing:
    """Return the keys of --api-key and --api-key-file. Raises StartupError."""
    keys = [] if config.api_key is None else [Key(name="default", key=config.api_key, admin=True, max_priority=1 << 31)]
    if config.api_key_file is not None:
        keys += _read(config.api_key_file)
    for key in keys:
        if key.digest == hashlib.sha256(b"").digest():
            raise StartupError(f"the API key {key.name} is empty: whoever brings none would have it")
    for field in ("name", "digest"):
        values = [getattr(key, field) for key in keys]
        for key, value in zip(keys, values, strict=True):
            if values.count(value) > 1:
                raise StartupError(f"two API keys have the same {field.replace('digest', 'key')}: {key.name}")
    return KeyRing(keys)


def _read(path: str) -> list[Key]:
    where = f"--api-key-file {path}"
    try:
        keys = msgspec.convert(tomllib.loads(Path(path).read_text(encoding="utf-8")), KeyFile).keys
    except OSError as error:
        raise StartupError(f"{where}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, msgspec.ValidationError) as error:
        raise StartupError(f"{where}: {error}") from None
    if not keys:
        raise StartupError(f"{where}: it has no keys")
    for key in keys:
        if (key.key is None) == (key.sha256 is None):
            raise StartupError(f"{where}: {key.name} needs either key or sha256")
    return keys


def _brought(headers: Headers) -> bytes:
    given = dict(headers)
    bearer = given.get(b"authorization", b"")
    if bearer[: len(_PREFIX)].lower() == _PREFIX:
        return bearer[len(_PREFIX) :].strip()
    return given.get(b"x-api-key", b"").strip()
