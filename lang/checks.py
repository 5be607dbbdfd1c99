"""Outputs that must match on servers that cannot be told so: what comes is checked, and asked for again.

Used by the backends of APIs. Invariant: a text that is returned matches as a whole; at temperature 0 nothing is asked
for twice, for the same would come again.
"""

import re
from collections.abc import Awaitable, Callable
from typing import Any, Final

import msgspec

from ..errors import RequestError, StartupError
from .backend import Reply
from .expressions import Sampling

CHECKS: Final = 3
"""Calls for a text that must match."""


async def matching(generate: Callable[[], Awaitable[Reply]], sampling: Sampling) -> Reply:
    """What `generate` brings, once all of its texts match the regex or the JSON schema.

    Raises RequestError where they do not, and what `generate` raises.
    """
    matches = _matcher(sampling)
    for _ in range(CHECKS):
        reply = await generate()
        if all(matches(text) for text in reply.texts):
            return reply
        if (sampling.temperature or 0.0) < 1e-6:
            break
    param = "regex" if sampling.regex is not None else "json_schema"
    what = sampling.regex if sampling.regex is not None else sampling.json_schema
    raise RequestError(f"the model did not say what matches {what!r}", param=param, code="no_match")


def _matcher(sampling: Sampling) -> Callable[[str], bool]:
    """Raises re.error, and StartupError where jsonschema is not installed."""
    if sampling.regex is not None:
        pattern = re.compile(sampling.regex)
        return lambda text: pattern.fullmatch(text) is not None
    validator = _validator(msgspec.json.decode(sampling.json_schema or "{}"))

    def matches(text: str) -> bool:
        try:
            return bool(validator.is_valid(msgspec.json.decode(text)))
        except msgspec.DecodeError:
            return False

    return matches


def _validator(schema: Any) -> Any:
    try:
        from jsonschema import Draft202012Validator
    except ImportError:
        raise StartupError("JSON schemas on this API need jsonschema: pip install 'actorserve[lang]'") from None
    return Draft202012Validator(schema)
