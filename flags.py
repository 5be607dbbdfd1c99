"""EngineConfig on the command line: one flag per field, its help from the field's description. Used by cli.py.

Invariant: a field added to EngineConfig is a flag without a line here; a bad flag or value is one line and exit code 2.
"""

import argparse
import math
import sys
from typing import Any, NoReturn

import msgspec
from msgspec import inspect

from .config import EngineConfig

GROUPS = {
    "model": "model",
    "host": "server",
    "max_queued_requests": "limits",
    "device": "device and memory",
    "schedule_policy": "scheduling",
    "placement": "actors",
}
"""The first field of each group, in the order of EngineConfig's fields."""

ALIASES = {
    "model": ["--model-path"],
    "tp_size": ["--tp", "--tensor-parallel-size"],
    "dp_size": ["--dp", "--data-parallel-size"],
    "dist_init_addr": ["--nccl-init-addr"],
}
"""Other names that SGLang has for the same thing."""

USAGE_ERROR = 2


class Parser(argparse.ArgumentParser):
    """argparse, but an error is one line."""

    def error(self, message: str) -> NoReturn:
        print(f"actorserve: {message} (see {self.prog} -h)", file=sys.stderr)
        raise SystemExit(USAGE_ERROR)


class Formatter(argparse.RawDescriptionHelpFormatter):
    """Room for our longest flags; descriptions keep their lines."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=34, width=110)


def add_config_flags(parser: argparse.ArgumentParser) -> None:
    """Add a flag for each field of EngineConfig, in groups."""
    group: Any = parser
    info = inspect.type_info(EngineConfig)
    assert isinstance(info, inspect.StructType)
    for field in info.fields:
        if field.name in GROUPS:
            group = parser.add_argument_group(GROUPS[field.name])
        names = [_flag(field.name), *ALIASES.get(field.name, [])]
        group.add_argument(*names, dest=field.name, default=argparse.SUPPRESS, **_settings(field))


def add_batch_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `actorserve batch` and those of `actorserve run`."""
    group = parser.add_argument_group("batch")
    group.add_argument("-i", "--input", required=True, metavar="FILE", help="requests, a line each")
    group.add_argument("-o", "--output", required=True, metavar="FILE", help="answers, a line each; is added to")
    add_config_flags(parser)


def config_from(parsed: argparse.Namespace, parser: argparse.ArgumentParser) -> EngineConfig:
    """The EngineConfig of the flags given; a value out of range ends the program as any bad flag does."""
    given = {name: value for name, value in vars(parsed).items() if name in EngineConfig.__struct_fields__}
    try:
        return msgspec.convert(given, EngineConfig)
    except msgspec.ValidationError as error:
        message, _, place = str(error).partition(" - at `$.")
        name = place.rstrip("`")
        parser.error(f"argument {_flag(name)}: {message[0].lower()}{message[1:]}, not {given.get(name)!r}")


def _flag(field_name: str) -> str:
    return "--" + field_name.replace("_", "-")


def _settings(field: inspect.Field) -> dict[str, Any]:
    """argparse's keywords for one field: type or choices, metavar, help."""
    kind, description = _plain(field.type)
    default = field.default
    if isinstance(kind, inspect.BoolType):
        assert default is False, "a flag can only switch on"
        return {"action": "store_true", "help": description}
    shown = "" if default is None else f" (default: {default})"
    settings: dict[str, Any] = {"help": (description + shown).strip().replace("%", "%%")}
    match kind:
        case inspect.IntType():
            return settings | {"type": _whole, "metavar": "N"}
        case inspect.FloatType():
            return settings | {"type": _number, "metavar": "X"}
        case inspect.LiteralType():
            return settings | {"choices": kind.values, "metavar": "{" + ",".join(map(str, kind.values)) + "}"}
        case inspect.StrType():
            return settings | {"metavar": "S"}
    raise TypeError(f"EngineConfig.{field.name}: no flag for {kind}")


def _whole(text: str) -> int:
    """An int that messages between actors can carry."""
    value = int(text)
    if not -(1 << 63) <= value < 1 << 63:
        raise argparse.ArgumentTypeError(f"{text} is too large")
    return value


def _number(text: str) -> float:
    """A float; none is without end, which no clock could wait for."""
    value = float(text)
    if math.isinf(value):
        raise argparse.ArgumentTypeError(f"{text} is no number of a certain size")
    return value


_whole.__name__, _number.__name__ = "int", "float"  # argparse tells them to the user


def _plain(kind: inspect.Type) -> tuple[inspect.Type, str]:
    """The type without its Meta and without None, and the Meta's description."""
    description = ""
    while isinstance(kind, inspect.Metadata | inspect.UnionType):
        if isinstance(kind, inspect.Metadata):
            description = (kind.extra_json_schema or {}).get("description", description)
            kind = kind.type
        else:
            (kind,) = (member for member in kind.types if not isinstance(member, inspect.NoneType))
    return kind, description
