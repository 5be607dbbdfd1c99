"""The slow reference for syntax trees: a tree as a pattern of Python's `re`, and random texts of its language."""

import random
import re

from actorserve.fsm.syntax import Chars, Choice, Concat, Node, Repeat, Text


def as_pattern(node: Node) -> str:
    """Source of a regular expression, for re.fullmatch, with the same language."""
    match node:
        case Text(text):
            return re.escape(text)
        case Chars(ranges):
            inside = "".join(f"\\U{low:08x}-\\U{high:08x}" for low, high in ranges)
            return f"[{inside}]" if inside else r"[^\s\S]"
        case Concat(parts):
            return "".join(map(as_pattern, parts))
        case Choice(options):
            return f"(?:{'|'.join(map(as_pattern, options))})" if options else r"[^\s\S]"
        case Repeat(body, low, high):
            return f"(?:{as_pattern(body)}){{{low},{'' if high is None else high}}}"


def walk(node: Node, draw: random.Random, spread: int = 3) -> str:
    """A random text; repetitions occur up to `spread` times more than they must. No node may be empty."""
    match node:
        case Text(text):
            return text
        case Chars(ranges):
            low, high = draw.choice(ranges)
            ascii_end = min(high, 0x7E)
            return chr(draw.choice([low, high, draw.randint(low, high), draw.randint(low, max(low, ascii_end))]))
        case Concat(parts):
            return "".join(walk(part, draw, spread) for part in parts)
        case Choice(options):
            return walk(draw.choice(options), draw, spread)
        case Repeat(body, low, high):
            most = low + spread if high is None else min(high, low + spread)
            count = draw.choice([low, most, high if high is not None and high <= 60 else most, draw.randint(low, most)])
            return "".join(walk(body, draw, spread) for _ in range(count))
