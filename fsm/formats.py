"""The values of `format` as syntax. Used by schema_types.py.

Each is a subset of what its RFC and the `jsonschema` package accept, as large as stays small in states; what is left
out stands beside it. Formats that nobody defined say nothing, as the specification has it; defined ones that are not
here are refused. Invariant: no text of a format is refused by a validator that asserts formats.
"""

from functools import lru_cache
from typing import Final

from .pattern import parse_pattern
from .syntax import Node

_YEAR: Final = "(?:[0-9]{3}[1-9]|[0-9]{2}[1-9]0|[0-9][1-9]00|[1-9]000)"
_LEAP_YEAR: Final = "(?:[0-9]{2}(?:0[48]|[2468][048]|[13579][26])|(?:0[48]|[2468][048]|[13579][26])00)"
_LONG: Final = "(?:0[13578]|1[02])-(?:0[1-9]|[12][0-9]|3[01])"
_SHORT: Final = "(?:0[469]|11)-(?:0[1-9]|[12][0-9]|30)"
_FEBRUARY: Final = "02-(?:0[1-9]|1[0-9]|2[0-8])"
_DATE: Final = f"(?:{_YEAR}-(?:{_LONG}|{_SHORT}|{_FEBRUARY})|{_LEAP_YEAR}-02-29)"
_CLOCK: Final = "(?:[01][0-9]|2[0-3]):[0-5][0-9]"
_TIME: Final = rf"{_CLOCK}:[0-5][0-9](?:\.[0-9]{{1,9}})?(?:Z|[+\-]{_CLOCK})"

_HEX: Final = "[0-9A-Fa-f]"
_BYTE: Final = "(?:[0-9]|[1-9][0-9]|1[0-9]{2}|2[0-4][0-9]|25[0-5])"
_GROUP: Final = f"{_HEX}{{1,4}}"


def _ipv6() -> str:
    """RFC 3986: eight groups, or `::` for at least one of them. Without a dotted tail."""
    ways = [f"(?:{_GROUP}:){{7}}{_GROUP}"]
    for right in range(8):
        left = f"(?:{_GROUP}(?::{_GROUP}){{0,{6 - right}}})?" if right < 7 else ""
        ways.append(f"{left}::" + (f"(?:{_GROUP}:){{{right - 1}}}{_GROUP}" if right else ""))
    return f"(?:{'|'.join(ways)})"


_LABEL: Final = "[0-9A-Za-z](?:-?[0-9A-Za-z]){0,24}"
_ATOM: Final = r"[0-9A-Za-z!#$%&'*+/=?\^_`{|}~\-]+"
_DOMAIN_LABEL: Final = "[0-9A-Za-z]+(?:-[0-9A-Za-z]+)*"

_PCHAR: Final = rf"(?:[0-9A-Za-z\-._~!$&'()*+,;=:@]|%{_HEX}{{2}})"
_AUTHORITY: Final = rf"(?:[0-9A-Za-z\-._~!$&'()*+,;=:]|%{_HEX}{{2}})"
_NAME: Final = rf"(?:[0-9A-Za-z\-._~!$&'()*+,;=]|%{_HEX}{{2}})"
_PATH: Final = f"(?://(?:{_AUTHORITY}*@)?{_NAME}*(?::[0-9]*)?(?:/{_PCHAR}*)*|/?(?:{_PCHAR}+(?:/{_PCHAR}*)*)?)"
_TAIL: Final = rf"(?:{_PCHAR}|[/?])*"

_TIME_PART: Final = "T(?:[0-9]{1,9}H(?:[0-9]{1,9}M(?:[0-9]{1,9}S)?)?|[0-9]{1,9}M(?:[0-9]{1,9}S)?|[0-9]{1,9}S)"
_DAYS: Final = "(?:[0-9]{1,9}Y(?:[0-9]{1,9}M(?:[0-9]{1,9}D)?)?|[0-9]{1,9}M(?:[0-9]{1,9}D)?|[0-9]{1,9}D)"

FORMATS: Final = {
    "date": _DATE,  # RFC 3339, without year 0
    "time": _TIME,  # with an offset; without leap seconds, lower case, more than nine digits of fraction
    "date-time": f"{_DATE}T{_TIME}",
    "duration": f"P(?:{_DAYS}(?:{_TIME_PART})?|{_TIME_PART}|[0-9]{{1,9}}W)",  # RFC 3339, up to nine digits each
    "uuid": f"{_HEX}{{8}}-{_HEX}{{4}}-{_HEX}{{4}}-{_HEX}{{4}}-{_HEX}{{12}}",
    "email": rf"{_ATOM}(?:\.{_ATOM})*@{_DOMAIN_LABEL}(?:\.{_DOMAIN_LABEL})*",  # no quoted names, no address literals
    "ipv4": rf"(?:{_BYTE}\.){{3}}{_BYTE}",
    "ipv6": _ipv6(),
    # up to five labels of up to 25 letters and digits; without `--`, which begins punycode
    "hostname": rf"{_LABEL}(?:\.{_LABEL}){{0,4}}",
    "uri": rf"[A-Za-z][0-9A-Za-z+\-.]*:{_PATH}(?:\?{_TAIL})?(?:#{_TAIL})?",  # RFC 3986, without IPv6 hosts
    "json-pointer": "(?:/(?:[^/~]|~[01])*)*",
}
"""Name -> a regular expression of parse_pattern's dialect for the whole text."""

REFUSED: Final = frozenset(
    "regex uri-reference uri-template iri iri-reference idn-email idn-hostname relative-json-pointer".split()
)
"""Formats that the specification defines and that are not here."""


@lru_cache(maxsize=32)
def format_syntax(name: str) -> Node | None:
    """Texts of the format; None if it says nothing of texts. Raises LookupError for one of REFUSED."""
    if name in REFUSED:
        raise LookupError(name)
    return parse_pattern(FORMATS[name]) if name in FORMATS else None
