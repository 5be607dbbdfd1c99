"""`actorserve complete`: continue a text, or answer one question, from an argument or a pipe. Used by cli.py.

The output goes to stdout as it comes and nothing else does, so that it can be piped on; figures go to stderr.
"""

import argparse
import sys
from contextlib import closing
from typing import Final

from .errors import RequestError
from .talk import Figures, Message, Partner, add_talk_flags, options_of, partner_of

EXAMPLES: Final = """examples:
  actorserve complete "Once upon a time" --max-tokens 64
  git diff | actorserve complete --chat --system "Write a commit message for this diff."
  actorserve complete --chat "Invent a person." --json-schema person.json --local
"""


def add_complete_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of `actorserve complete`."""
    parser.add_argument("prompt", nargs="?", help="the text to continue; default, and what - stands for: stdin")
    parser.add_argument("--chat", action="store_true", help="answer it as a chat message instead of continuing it")
    parser.add_argument("--system", metavar="TEXT", help="system prompt; implies --chat")
    parser.add_argument("--stats", action="store_true", help="say on stderr what it took")
    add_talk_flags(parser)


def complete(parsed: argparse.Namespace) -> int:
    """Print the continuation; returns the exit code. Raises ActorserveError."""
    prompt = parsed.prompt if parsed.prompt not in (None, "-") else _from_stdin()
    if not prompt:
        hint = f"; --local took {parsed.local!r} for the model, so give it before that" if parsed.local else ""
        raise RequestError(f"the prompt is empty: give it as an argument or on stdin{hint}", param="prompt")
    options = options_of(parsed)
    with partner_of(parsed) as partner:
        try:
            figures = _print(partner, prompt, parsed, options)
        except KeyboardInterrupt:
            print()
            return 130
    if parsed.stats:
        print(figures.line(), file=sys.stderr)
    return 0


def _from_stdin() -> str:
    if sys.stdin.isatty():
        print("(type the prompt; Ctrl-D ends it)", file=sys.stderr)
    return sys.stdin.read().rstrip("\n")


def _print(partner: Partner, prompt: str, parsed: argparse.Namespace, options: dict[str, object]) -> Figures:
    figures, end = Figures(), "\n"
    if parsed.chat or parsed.system is not None:
        system: list[Message] = [] if parsed.system is None else [{"role": "system", "content": parsed.system}]
        pieces = partner.chat([*system, {"role": "user", "content": prompt}], options)
    else:
        pieces = partner.complete(prompt, options)
    with closing(pieces):
        for piece in pieces:
            figures.take(piece)
            if piece.text:
                print(piece.text, end="", flush=True)
                end = "" if piece.text.endswith("\n") else "\n"
    print(end=end, flush=True)
    return figures
