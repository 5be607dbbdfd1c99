"""What the interpreter asks of a model: Backend, the base of every one, and what all of them share.

Invariant: all coroutines run in the backend's `loop` (that of loop.py, but for programs on a server), as many calls at
once as `most_calls`; the rest waits its turn there.
"""

from collections.abc import AsyncIterator, Sequence
from typing import Any, Final

import anyio
import msgspec

from ..errors import RequestError
from .choices import METHODS, ChoicesDecision, ChoicesMethod
from .context import Context
from .expressions import Sampling
from .loop import LOOP, Tasks
from .remote import ProgramReply, ProgramRequest
from .templates import ChatTemplate
from .tools import call_schema

DTYPES: Final = {
    "int": (r"[-+]?[0-9]+[ \n]*", (" ", "\n")),
    "float": (r"[-+]?[0-9]*\.?[0-9]+[ \n]*", (" ", "\n")),
    "bool": ("(True|False)", ()),
    "str": (r'"[\w\d\s]*"', ()),
}
"""SGLang's (regular expression, stop strings) of a dtype."""


class Reply(msgspec.Struct, frozen=True):
    """`texts`: one for each of the n. `meta`: SGLang's meta_info of the first, as far as the server tells it."""

    texts: list[str]
    meta: dict[str, Any]


class Backend:
    """A model somewhere. Subclasses override what they can do; what stays raises RequestError."""

    is_chat_model: bool = False
    """It takes conversations, not texts."""
    takes_pictures: bool = False
    takes_tools: bool = False
    """Its API has tools; for other backends a call is a JSON schema."""
    tells_tokens: bool = True
    """It takes `return_logprob`."""
    takes_programs: bool = False
    """It runs whole programs (remote.py)."""
    most_calls: int = 256

    def __init__(self, name: str, chat_template: ChatTemplate) -> None:
        self.name = name
        self.chat_template = chat_template
        self.loop: Tasks = LOOP
        self._limiter: anyio.CapacityLimiter | None = None

    @property
    def turn(self) -> anyio.CapacityLimiter:
        """Entered around each call to the model."""
        if self._limiter is None:
            self._limiter = anyio.CapacityLimiter(self.most_calls)
        return self._limiter

    async def generate(self, context: Context, sampling: Sampling) -> Reply:
        """Continue the context's text, n times. Raises ActorserveError."""
        raise self._cannot("generate")

    def stream(self, context: Context, sampling: Sampling) -> AsyncIterator[tuple[str, dict[str, Any]]]:
        """As `generate` with n 1, in pieces: (new text, meta_info so far)."""
        raise self._cannot("stream")

    async def select(
        self, context: Context, choices: Sequence[str], temperature: float, method: ChoicesMethod
    ) -> ChoicesDecision:
        """Choose the continuation. Raises RequestError where the backend cannot score choices by this method."""
        raise self._cannot("select")

    async def run_program(self, request: ProgramRequest) -> ProgramReply:
        """Run a whole program there. Raises ActorserveError."""
        raise self._cannot("run programs")

    async def commit(self, context: Context) -> None:
        """Compute the context's text into the prefix cache; without effect where there is none to talk to."""

    def leave(self, context: Context) -> None:
        """A branch has been joined: nobody is expected to go on with its text."""

    async def cache_prefix(self, text: str) -> None:
        """The same for a text."""

    async def flush_cache(self, empty_cache: bool = True) -> bool:
        """Empty the prefix cache; whether it was."""
        raise self._cannot("flush its cache")

    async def get_server_info(self) -> dict[str, Any]:
        """What the server says of itself."""
        return {"model": self.name}

    def get_chat_template(self) -> ChatTemplate:
        return self.chat_template

    def get_model_name(self) -> str:
        return self.name

    def _cannot(self, what: str) -> RequestError:
        return RequestError(f"{type(self).__name__} ({self.name}) cannot {what}", code="unsupported_value")


def constrained(sampling: Sampling, takes_tools: bool = False) -> Sampling:
    """The same with `dtype` as a regular expression, and tools as a schema unless the backend takes them as they are.

    Raises RequestError for an unknown dtype, or beside a regex.
    """
    if sampling.tools is not None and not takes_tools:
        return msgspec.structs.replace(sampling, tools=None, json_schema=call_schema(sampling.tools))
    if sampling.dtype is None:
        return sampling
    if sampling.dtype not in DTYPES:
        raise RequestError(f"dtype must be one of {', '.join(DTYPES)}, not {sampling.dtype}", param="dtype")
    if sampling.regex is not None or sampling.json_schema is not None:
        raise RequestError("dtype and regex or json_schema exclude each other", param="dtype")
    regex, stops = DTYPES[sampling.dtype]
    return msgspec.structs.replace(sampling, dtype=None, regex=regex, stop=(*(sampling.stop or ()), *stops))


def method_named(name: str) -> ChoicesMethod:
    """Raises RequestError for an unknown name."""
    if name not in METHODS:
        raise RequestError(f"choices_method must be one of {', '.join(METHODS)}", param="choices_method")
    return METHODS[name]


class _Defaults:
    backend: Any = None


def set_default_backend(backend: Any) -> None:
    """Programs that are run without a backend use this one, in the whole process. None: none."""
    _Defaults.backend = backend


def resolve(backend: Any) -> Backend:
    """The given backend or the default one; what wraps one has it as `endpoint`. Raises RequestError for none."""
    backend = _Defaults.backend if backend is None else backend
    backend = getattr(backend, "endpoint", backend)
    if not isinstance(backend, Backend):
        raise RequestError("no backend: sgl.set_default_backend(...) or run(..., backend=...)", param="backend")
    return backend


def flush_cache(backend: Any = None, empty_cache: bool = True) -> bool:
    """Empty the prefix cache of a backend."""
    return LOOP.call(resolve(backend).flush_cache, empty_cache)


async def aflush_cache(backend: Any = None, empty_cache: bool = True) -> bool:
    """As `flush_cache`, in any event loop."""
    return await LOOP.acall(resolve(backend).flush_cache, empty_cache)


def get_server_info(backend: Any = None) -> dict[str, Any]:
    """What the backend's server says of itself."""
    return LOOP.call(resolve(backend).get_server_info)


async def aget_server_info(backend: Any = None) -> dict[str, Any]:
    """As `get_server_info`, in any event loop."""
    return await LOOP.acall(resolve(backend).get_server_info)
