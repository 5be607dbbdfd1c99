"""Regular expressions and small vocabularies for the tests of fsm/."""

import random
from collections.abc import Callable, Sequence

PATTERNS = [
    # the easy ones, and those that other libraries got wrong
    "", "a", "abc", "a|b", "ab|abcd", "a|ab|abc", "(ab)+", "a(bc)?", "(ab)*", "(a|b)*abb", "a*b*c*", "(a*)*", "(a+)+",
    "(a|)+", "(|a)(|b)", "(a?b?){3}", "a{3}", "a{2,}", "a{,2}", "a{0}", "a{0,0}b", "(a{2}){2}", "(ab|c){1,3}", "x{,}",
    '[^"]*"', '"[^"]*"', '"([^"\\\\]|\\\\.)*"', '"([^"\\\\\\x00-\\x1f]|\\\\["\\\\/bfnrt]|\\\\u[0-9a-fA-F]{4})*"',
    "orderId|orderName", "(foo|bar|foobar)", "(he|she|hers|his)", "(a|ab)(c|bcd)(d*)", "a.c", "a.*c", ".", ".*", ".+",
    "(?s).", "(?s)a.b", "[abc]", "[^abc]", "[a-c]x", "[]a]", "[^]a]", "[a-]", "[-a]", "[a\\-z]", "[\\]\\[]",
    "[^\\n]{2}",
    # numbers, dates and the like
    "0|[1-9][0-9]*", "-?(0|[1-9][0-9]*)(\\.[0-9]+)?([eE][+-]?[0-9]+)?", "[01]{8}", "0x[0-9a-f]{1,4}", "true|false|null",
    "((25[0-5]|2[0-4][0-9]|[01]?[0-9][0-9]?)\\.){3}(25[0-5]|2[0-4][0-9]|[01]?[0-9][0-9]?)",
    "[0-9]{4}-(0[1-9]|1[0-2])-(0[1-9]|[12][0-9]|3[01])", "([01][0-9]|2[0-3]):[0-5][0-9](:[0-5][0-9])?",
    "[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", "[a-zA-Z0-9._%+-]+@[a-zA-Z0-9.-]+\\.[a-zA-Z]{2,}",
    "https?://[a-z]+(\\.[a-z]+)+(/[a-z0-9]*)*", "#[0-9A-F]{6}", "\\$[0-9]+\\.[0-9]{2}", "[+-]?[0-9]+%",
    "v[0-9]+(\\.[0-9]+){2}",
    "(Mon|Tues|Wednes|Thurs|Fri|Satur|Sun)day", "[A-Z][a-z]+( [A-Z][a-z]+)*", "(yes|no|maybe)( please)?",
    # long texts, so that bytes are forced
    "The quick brown fox", "The (quick|slow) brown (fox|dog)", "Hello there, how are you today\\? I am fine\\.",
    '\\{"name": "[a-z]{1,8}", "age": [0-9]{1,3}\\}',
    '\\{\\n    "name": "[a-z ]{1,16}",\\n    "house": "(Gryffindor|Slytherin)"\\n\\}',
    '\\["(red|green|blue)"(, "(red|green|blue)"){0,3}\\]', "def [a-z_]{1,10}\\([a-z, ]{0,12}\\):\\n    return",
    "(start|end) user assistant", "(start user|start system) end", "x( and x)*", "<b>[^<]*</b>", "a{5,10}b{5,10}",
    "Thought: .{1,20}\\nAction: (search|look)\\n", "im_start(im_end)+", "(ab){10}", "((ab)?c){4}",
    "today|fine|them|there",
    "    return x < 3 and x > 1", "(    |\\t)return", "a {1,3}b", "\\n{1,3}Hello", "question\\?|answer!", "  +over",
    # Unicode
    "é", "über", "naïve café", "[à-ÿ]+", "[\\u4e00-\\u9fff]{1,4}", "日本語", "(日|本|語)+",
    "日本(語|人)", "[^a-z]", "🎉", "🎉+",
    "[😀-🙏]{2}", "a\\u0301", "[\\u0300-\\u036f]", "\\U0001F389|\\U0001F38A", "[\\x00-\\x7f]", "[\\x80-\\u07ff]",
    "[\\u0800-\\uffff]",
    "[\\U00010000-\\U0010ffff]", "\\x00", "\\xe9", "[^\\x00-\\uffff]", "[é日🎉a]*", "x[^é]y", "\\ud800|a",
    "[\\ud7ff-\\ue000]",
    "\\w", "\\w+", "\\d{1,3}", "\\s", "\\S+", "\\D", "\\W", "[\\w\\d\\s]{1,4}", "[^\\w]", "[^\\s\\d]{2}",
    "\\w+@\\w+", "[\\W\\d]",
    # escapes and flags
    "\\t\\n\\r\\f\\v\\a", "\\\\", "\\.\\*\\+\\?\\(\\)\\[\\]\\{\\}\\|\\^\\$", "\\0", "\\07", "\\101", "[\\101]",
    "[\\b]", "\\N{DIGIT ONE}",
    "a(?#comment)b", "a(?#comment)*", "(?i)hello", "(?i)straße", "(?i)[a-f]+", "(?i)[^a-f]", "(?i:a)b", "a(?i:b)c",
    "(?is).a",
    "(?i:a(?-i:b))", "(?i)k", "(?i)ſ", "(?i)\\u0130", "(?a)\\w+", "(?a:\\d)\\d", "(?u)\\w", "(?ia)k", "^abc$",
    "^a|b$", "(^a|b$)",
    "\\Aab\\Z", "(?:ab)", "(?P<n>a)(?P<m>b)", "a*?b", "a+?", "a??b", "a{1,2}?", "{", "{a}", "a{", "a{}", "a{x}",
    "a{1", "}", "]",
    "(a|b|c|d|e){2}", "(aa|aaa)*", "(a|b)*a(a|b){3}", "[ab]*c[ab]*", "((a|b)(c|d))*", "(x+x+)+y", "a|a|a",
    "(a|aa){2,3}",
]  # fmt: skip


def random_pattern(rng: random.Random, depth: int = 3) -> str:
    """A pattern that `re` and our dialect read alike."""
    kind = rng.randrange(9) if depth else rng.randrange(3)
    if kind == 0:
        return rng.choice(["a", "b", "ab", "the", " ", "é", "日", "🎉", "\\n", '"', "Hello", "ing"])
    if kind == 1:
        return rng.choice(["[ab]", "[^a]", "[a-f]", "\\d", ".", "[é-ü]", "[^\\s]", "[日本🎉]", "[0-9]"])
    if kind == 2:
        return "".join(rng.choice("abcdefgh the") for _ in range(rng.randrange(1, 9)))
    if kind in (3, 4, 5):
        return "".join(random_pattern(rng, depth - 1) for _ in range(rng.randrange(1, 4)))
    if kind in (6, 7):
        return f"({'|'.join(random_pattern(rng, depth - 1) for _ in range(rng.randrange(1, 4)))})"
    return f"(?:{random_pattern(rng, depth - 1)})" + rng.choice(["*", "+", "?", "{2}", "{1,3}", "{,2}", "{2,}", "*?"])


def random_patterns(number: int, seed: int = 0) -> list[str]:
    rng = random.Random(seed)
    return [random_pattern(rng) for _ in range(number)]


def bytes_vocabulary(*texts: str | bytes) -> list[bytes | None]:
    """A token per byte, then these, then an id without bytes that ends an output: the last one."""
    tokens: list[bytes | None] = [bytes([value]) for value in range(256)]
    tokens += [text.encode() if isinstance(text, str) else text for text in texts]
    return [*tokens, None]


def longest_first(tokens: Sequence[bytes | None]) -> Callable[[str], list[int]]:
    """A tokenizer that takes the longest token at each place, and stops where there is none."""
    numbers = {token: i for i, token in enumerate(tokens) if token}
    longest = max(map(len, numbers))

    def encode(text: str) -> list[int]:
        data, place, found = text.encode(), 0, []
        while place < len(data):
            size = next((n for n in range(longest, 0, -1) if data[place : place + n] in numbers), 0)
            if not size:
                break
            found.append(numbers[data[place : place + size]])
            place += size
        return found

    return encode
