"""The same, slowly and plainly: which tokens a language allows, straight from its syntax tree.

For tests. A state is the set of all ways to go on (partial derivatives; Antimirov, "Partial derivatives of regular
expressions and finite automaton constructions", 1996), a token is read byte by byte. Knows nothing of canonical tokens
or of bytes that no token spells. Shares no code with the automata but the syntax tree.
"""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from .syntax import LAST, Chars, Choice, Concat, Node, Ranges, Repeat, Text

Rest = tuple[Node, ...]
"""What is still to come, one after another."""


@dataclass(frozen=True, slots=True)
class Way:
    """A character out of `ranges`, of which the bytes `begun` have come, then `rest`."""

    begun: bytes
    ranges: Ranges
    rest: Rest


State = frozenset[Way | None]
"""None: here the text may end."""


def start(node: Node) -> State:
    """The state before all text; empty if nothing matches."""
    return frozenset(_ways((node,)))


def step(state: State, byte: int) -> State:
    """The state after one more byte; empty if no match begins like this."""
    found: set[Way | None] = set()
    for way in state:
        if way is None:
            continue
        begun = way.begun + bytes([byte])
        low, high, complete = _characters(begun)
        last = bisect_right(way.ranges, (high, LAST)) - 1  # of the ranges that begin in time
        if low <= high and last >= 0 and low <= way.ranges[last][1]:
            found |= set(_ways(way.rest)) if complete else {Way(begun, way.ranges, way.rest)}
    return frozenset(found)


def walk(state: State, data: bytes) -> State:
    """The state after these bytes."""
    for byte in data:
        state = step(state, byte)
    return state


def allowed(state: State, tokens: Sequence[bytes | None], eos: Sequence[int]) -> list[bool]:
    """For each token whether it may come next."""
    return [
        None in state if number in eos else bool(token) and bool(walk(state, token or b""))
        for number, token in enumerate(tokens)
    ]


def possible(node: Node) -> bool:
    """Whether anything matches."""
    match node:
        case Text(text):
            return all(not 0xD800 <= ord(c) <= 0xDFFF for c in text)
        case Chars(ranges):
            return bool(ranges)
        case Concat(parts):
            return all(map(possible, parts))
        case Choice(options):
            return any(map(possible, options))
        case Repeat(body, low, _):
            return low == 0 or possible(body)


def _ways(rest: Rest) -> Iterator[Way | None]:
    """All ways to begin what is to come."""
    seen: set[Rest] = set()
    waiting = [rest]
    while waiting:
        rest = waiting.pop()
        if rest in seen or not all(map(possible, rest)):
            continue
        seen.add(rest)
        if not rest:
            yield None
            continue
        node, rest = rest[0], rest[1:]
        match node:
            case Text(""):
                waiting.append(rest)
            case Text(text):
                yield Way(b"", ((ord(text[0]), ord(text[0])),), (Text(text[1:]), *rest))
            case Chars(ranges):
                yield Way(b"", ranges, rest)
            case Concat(parts):
                waiting.append((*parts, *rest))
            case Choice(options):
                waiting += [(option, *rest) for option in options]
            case Repeat(body, low, high):
                if low == 0:
                    waiting.append(rest)
                if high != 0 and possible(body):
                    more = Repeat(body, max(low - 1, 0), None if high is None else high - 1)
                    waiting.append((body, more, *rest))


def _characters(begun: bytes) -> tuple[int, int, bool]:
    """(lowest and highest character whose UTF-8 begins like this, whether it is all of it); (1, 0, False) if none."""
    lead = begun[0]
    if lead < 0x80:
        return lead, lead, True
    length = 2 if 0xC2 <= lead < 0xE0 else 3 if 0xE0 <= lead < 0xF0 else 4 if 0xF0 <= lead < 0xF5 else 0
    if not length or any(byte & 0xC0 != 0x80 for byte in begun[1:]):
        return 1, 0, False
    code = lead & (0x7F >> length)
    for byte in begun[1:]:
        code = code << 6 | byte & 0x3F
    missing = 6 * (length - len(begun))
    least = {2: 0x80, 3: 0x800, 4: 0x10000}[length]
    return max(code << missing, least), min((code << missing) | (1 << missing) - 1, 0x10FFFF), not missing
