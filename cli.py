"""The command `actorserve`: run, plan, batch, version. Parses, runs, and turns every way to end into an exit code.

0: stopped as asked, or done. 1: the engine died and gave up, a plan does not fit, or requests of a batch were refused.
2: it cannot start so (a bad flag, model or port); one line says why. 128 + signal: a second signal ended it at once.
Invariant: a mistake of the user never shows a traceback.
"""

import sys
from collections.abc import Sequence
from typing import NoReturn

from . import __version__
from .errors import StartupError
from .flags import USAGE_ERROR, Formatter, Parser, add_batch_flags, add_config_flags, config_from
from .plan import add_plan_flags, plan

EXAMPLES = """examples:
  actorserve run                              serve the embedded SmolLM2-135M chat model
  actorserve run --model DIR --port 8000      serve a local Hugging Face folder
  actorserve run --model FILE.gguf            serve a GGUF file (converted once into the cache)
  actorserve plan --model DIR --gpu h200      does it fit, with how many requests, how fast at best
  actorserve batch -i IN.jsonl -o OUT.jsonl   answer a file of requests, and go on where it was stopped
"""
BATCH = """Answer a file of requests and end. Each line of INPUT is a JSON object, as in OpenAI's batches:
  {"custom_id": "1", "method": "POST", "url": "/v1/chat/completions", "body": {"messages": [...]}}
OUTPUT gets a line for each as it is answered. What it answers already is not asked again: after a
crash or Ctrl-C, the same command goes on. Exit code 1: some lines were refused; their answers say why.
"""


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and exit."""
    raise SystemExit(command(sys.argv[1:] if arguments is None else arguments))


def command(arguments: Sequence[str]) -> int:
    """Run the command line; returns the exit code. Raises SystemExit for a bad flag and for -h."""
    parser, _ = build_parsers()
    parsed, rest = parser.parse_known_args(arguments)
    own: Parser = getattr(parsed, "parser", parser)
    if rest:
        own.error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        match parsed.command:
            case "run":
                from .serve import serve  # with trio and the supervisor, which `-h` need not wait for

                return serve(config_from(parsed, own))
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
    except StartupError as error:
        print(f"actorserve: {error}", file=sys.stderr)
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
    commands = parser.add_subparsers(
        dest="command", title="commands", metavar="{run,plan,batch,version}", parser_class=Parser
    )
    run = commands.add_parser(
        "run",
        prog="actorserve run",
        usage="actorserve run [flags]",  # forty flags in brackets help nobody; the list below has them
        help="serve a model over HTTP (actorserve run -h lists all flags)",
        description="Serve a model over HTTP, as OpenAI and SGLang do. Every flag has a default.",
        formatter_class=Formatter,
        allow_abbrev=False,
    )
    run.set_defaults(parser=run)
    add_config_flags(run)
    planned = commands.add_parser(
        "plan",
        prog="actorserve plan",
        usage="actorserve plan [--gpu NAME] [--length N ...] [--json] [flags of run]",
        help="where a GPU's memory would go, how many requests fit, how fast it can be at best",
        description="Plan a GPU's memory. Takes the flags of `actorserve run`; needs no GPU.",
        formatter_class=Formatter,
        allow_abbrev=False,
    )
    planned.set_defaults(parser=planned)
    add_plan_flags(planned)
    batched = commands.add_parser(
        "batch",
        prog="actorserve batch",
        usage="actorserve batch -i INPUT -o OUTPUT [flags of run]",
        help="answer a file of requests, as for OpenAI's batches, without a server; goes on where it was stopped",
        description=BATCH,
        formatter_class=Formatter,
        allow_abbrev=False,
    )
    batched.set_defaults(parser=batched)
    add_batch_flags(batched)
    commands.add_parser("version", prog="actorserve version", help="print the version", allow_abbrev=False)
    return parser, run
