"""The command `actorserve`: parses, runs, and turns every way to end into an exit code.

0: done, or stopped as asked. 1: the engine died and gave up, a plan does not fit, doctor found what fails, requests of
bench failed, or those of a batch were refused. 2: it cannot be done so (a bad flag, model, port or address); one line
says why. 128 + signal: a signal ended it at once. Invariant: a mistake of the user never shows a traceback.
"""

import argparse
import contextlib
import errno
import io
import os
import sys
from collections.abc import Callable, Sequence
from typing import Final, NamedTuple, NoReturn

from . import __version__
from .chat import EXAMPLES as CHAT_EXAMPLES
from .chat import add_chat_flags, chat
from .complete import EXAMPLES as COMPLETE_EXAMPLES
from .complete import add_complete_flags, complete
from .doctor import add_doctor_flags, doctor
from .errors import ActorserveError
from .flags import USAGE_ERROR, Formatter, Parser, add_batch_flags, add_config_flags, config_from
from .plan import add_plan_flags, plan

EXAMPLES = """examples:
  actorserve run                              serve the embedded SmolLM2-135M chat model
  actorserve run --model DIR --port 8000      serve a local Hugging Face folder
  actorserve run --model FILE.gguf            serve a GGUF file (converted once into the cache)
  actorserve chat                             talk to the server on this machine
  echo Once upon a time | actorserve complete --local
  actorserve bench --max-concurrency 8        put load on the server and measure it
  actorserve doctor                           what this machine has, and which paths are taken on it
  actorserve plan --model DIR --gpu h200      does it fit, with how many requests, how fast at best
  actorserve batch -i IN.jsonl -o OUT.jsonl   answer a file of requests, and go on where it was stopped
"""
BATCH_TEXT = """Answer a file of requests and end. Each line of INPUT is a JSON object, as in OpenAI's batches:
  {"custom_id": "1", "method": "POST", "url": "/v1/chat/completions", "body": {"messages": [...]}}
OUTPUT gets a line for each as it is answered. What it answers already is not asked again: after a
crash or Ctrl-C, the same command goes on. Exit code 1: some lines were refused; their answers say why.
"""
INTERRUPTED = 130
UNWRITABLE: Final = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO}
"""Why an output takes no more: a full disk, a limit, a terminal that is gone."""


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and exit."""
    prepare_streams()
    try:
        code = command(sys.argv[1:] if arguments is None else arguments)
    except SystemExit as ended:
        if not isinstance(ended.code, int):
            raise
        code = ended.code
    try:
        sys.stdout.flush()  # here, since what fails at the interpreter's end is a traceback and 120
    except OSError as error:
        code = _unwritable(error, code)
    raise SystemExit(code)


def prepare_streams() -> None:
    """Standard streams that print and input can use, whatever the program was started with.

    One that is closed becomes /dev/null, so that no socket gets its number; what the locale cannot spell, or is not
    its text, becomes a mark in its place.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        stream = getattr(sys, name)
        if stream is None:
            null = os.open(os.devnull, os.O_RDWR)  # the lowest number that is free: the stream's own
            os.set_inheritable(null, True)
            setattr(sys, name, os.fdopen(null, mode, encoding="utf-8"))
        elif isinstance(stream, io.TextIOWrapper) and name != "stderr":  # stderr has backslashes for it
            stream.reconfigure(errors="replace")


def _unwritable(error: OSError, code: int) -> int:
    """The exit code when an output takes no more; raises what is another error."""
    broken = isinstance(error, BrokenPipeError)
    if not broken and error.errno not in UNWRITABLE:
        raise error
    with open(os.devnull, "w") as null, contextlib.suppress(OSError, ValueError):
        os.dup2(null.fileno(), sys.stdout.fileno())  # what is left in its buffer goes there
    if broken:  # who reads our output has had enough
        return code
    print(f"actorserve: cannot write: {error.strerror}", file=sys.stderr)
    return USAGE_ERROR


def command(arguments: Sequence[str]) -> int:
    """Run the command line; returns the exit code. Raises SystemExit for a bad flag and for -h."""
    try:
        if arguments[:1] == ["bench"]:
            return bench(arguments[1:])
        return _run(arguments)
    except ActorserveError as error:
        print(f"actorserve: {error}", file=sys.stderr)
        return USAGE_ERROR
    except KeyboardInterrupt:
        return INTERRUPTED
    except OSError as error:
        return _unwritable(error, 0)


def _run(arguments: Sequence[str]) -> int:
    parser, _ = build_parsers()
    parsed, rest = parser.parse_known_args(arguments)
    own: Parser = getattr(parsed, "parser", parser)
    if rest:
        own.error(f"unrecognized arguments: {' '.join(rest)}")
    match parsed.command:
        case "run":
            from .serve import serve  # with trio and the supervisor, which `-h` need not wait for

            return serve(config_from(parsed, own))
        case "chat":
            return chat(parsed)
        case "complete":
            return complete(parsed)
        case "doctor":
            return doctor(parsed, config_from(parsed, own))
        case "plan":
            return plan(parsed, config_from(parsed, own), own)
        case "batch":
            from .batch import batch

            return batch(parsed, config_from(parsed, own), own)
        case "version":
            print(f"actorserve {__version__}")
            return 0
        case _:
            parser.print_help()
            return USAGE_ERROR


def bench(arguments: Sequence[str]) -> int:
    """Run the load client, whose flags are its own. Raises SystemExit as `command`."""
    from .perf.serve import main as load  # with numpy and what measures GPUs

    try:
        load(arguments, "actorserve bench")
    except SystemExit as ended:
        if not isinstance(ended.code, str):
            raise
        print(f"actorserve: {ended.code}", file=sys.stderr)
        return USAGE_ERROR
    return 0


class Command(NamedTuple):
    """A command with flags of ours: what its parser says."""

    name: str
    usage: str
    text: str
    about: str
    flags: Callable[[argparse.ArgumentParser], None]
    epilog: str = ""

    def add_to(self, commands: "argparse._SubParsersAction[Parser]") -> Parser:
        """Make its parser."""
        # The usage is ours: forty flags in brackets help nobody; the list below it has them.
        parser = commands.add_parser(
            self.name,
            prog=f"actorserve {self.name}",
            usage=f"actorserve {self.name} {self.usage}",
            help=self.text,
            description=self.about,
            epilog=self.epilog,
            formatter_class=Formatter,
            allow_abbrev=False,
        )
        parser.set_defaults(parser=parser)
        self.flags(parser)
        return parser


RUN = Command(
    "run",
    "[flags]",
    "serve a model over HTTP (actorserve run -h lists all flags)",
    "Serve a model over HTTP, as OpenAI and SGLang do. Every flag has a default.",
    add_config_flags,
)
CHAT = Command(
    "chat",
    "[flags]",
    "talk to a model in the terminal",
    "Talk to a running server, or with --local to an engine started for it. /help lists the commands inside.",
    add_chat_flags,
    CHAT_EXAMPLES,
)
COMPLETE = Command(
    "complete",
    "[PROMPT] [flags]",
    "continue a text from an argument or a pipe",
    "Continue a text, or with --chat answer it. The output goes to stdout as it comes.",
    add_complete_flags,
    COMPLETE_EXAMPLES,
)
DOCTOR = Command(
    "doctor",
    "[--json] [flags of run]",
    "what this machine has, which paths the engine takes on it, and why",
    "Look at this machine with the eyes of `actorserve run` and its flags. Starts nothing.\n"
    "Exit code 1 if something would keep `actorserve run` from starting.",
    add_doctor_flags,
)
PLAN = Command(
    "plan",
    "[--gpu NAME] [--length N ...] [--json] [flags of run]",
    "where a GPU's memory would go, how many requests fit, how fast it can be at best",
    "Plan a GPU's memory. Takes the flags of `actorserve run`; needs no GPU.",
    add_plan_flags,
)
BATCH = Command(
    "batch",
    "-i INPUT -o OUTPUT [flags of run]",
    "answer a file of requests without a server; goes on where it was stopped",
    BATCH_TEXT,
    add_batch_flags,
)


def build_parsers() -> tuple[Parser, Parser]:
    """(the whole command line, that of `run`)."""
    parser = Parser(
        prog="actorserve",
        usage="actorserve COMMAND [flags]",
        description="An LLM serving engine built from actors.",
        epilog=EXAMPLES,
        formatter_class=Formatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"actorserve {__version__}")
    commands = parser.add_subparsers(dest="command", title="commands", metavar="COMMAND", parser_class=Parser)

    run = RUN.add_to(commands)
    CHAT.add_to(commands)
    COMPLETE.add_to(commands)
    commands.add_parser("bench", help="put load on a server and measure it (actorserve bench -h)", add_help=False)
    for one in (DOCTOR, PLAN, BATCH):
        one.add_to(commands)
    commands.add_parser("version", prog="actorserve version", help="print the version", allow_abbrev=False)
    return parser, run
