"""The command `actorserve`: run, version. Parses, runs, and turns every way to end into an exit code.

0: stopped as asked. 1: the engine died and gave up. 2: it cannot start so (a bad flag, model or port); one line says
why. 128 + signal: a second signal ended it at once. Invariant: a mistake of the user never shows a traceback.
"""

import sys
from collections.abc import Sequence
from typing import NoReturn

from . import __version__
from .errors import StartupError
from .flags import USAGE_ERROR, Formatter, Parser, add_config_flags, config_from

EXAMPLES = """examples:
  actorserve run                              serve the embedded SmolLM2-135M chat model
  actorserve run --model DIR --port 8000      serve a local Hugging Face folder
  actorserve run --model FILE.gguf            serve a GGUF file (converted once into the cache)
"""


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and exit."""
    raise SystemExit(command(sys.argv[1:] if arguments is None else arguments))


def command(arguments: Sequence[str]) -> int:
    """Run the command line; returns the exit code. Raises SystemExit for a bad flag and for -h."""
    parser, run_parser = build_parsers()
    parsed, rest = parser.parse_known_args(arguments)
    if rest:
        (run_parser if parsed.command == "run" else parser).error(f"unrecognized arguments: {' '.join(rest)}")
    match parsed.command:
        case "run":
            from .serve import serve  # with trio and the supervisor, which `-h` need not wait for

            try:
                return serve(config_from(parsed, run_parser))
            except StartupError as error:
                print(f"actorserve: {error}", file=sys.stderr)
                return USAGE_ERROR
        case "version":
            print(f"actorserve {__version__}")
            return 0
        case _:
            parser.print_help()
            return USAGE_ERROR


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
    commands = parser.add_subparsers(dest="command", title="commands", metavar="{run,version}", parser_class=Parser)
    run = commands.add_parser(
        "run",
        prog="actorserve run",
        usage="actorserve run [flags]",  # forty flags in brackets help nobody; the list below has them
        help="serve a model over HTTP (actorserve run -h lists all flags)",
        description="Serve a model over HTTP, as OpenAI and SGLang do. Every flag has a default.",
        formatter_class=Formatter,
        allow_abbrev=False,
    )
    add_config_flags(run)
    commands.add_parser("version", prog="actorserve version", help="print the version", allow_abbrev=False)
    return parser, run
