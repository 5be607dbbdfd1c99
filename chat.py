"""`actorserve chat`: a conversation in the terminal. Used by cli.py.

Answers stream; Ctrl-C stops one, and at the prompt it clears the line. Without a terminal it reads lines and prints
plain answers. Invariant: the history holds whole turns only, so a failed or empty answer takes its question back.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Final, TextIO

from .display import has_colours
from .errors import ActorserveError, RequestError
from .models.cache import cache_folder
from .talk import SAMPLING, Figures, Message, Options, Partner, add_talk_flags, options_of, partner_of

EXAMPLES: Final = """examples:
  actorserve chat                              talk to the server on this machine
  actorserve chat --local                      no server: start the embedded model here
  actorserve chat --url https://host --api-key KEY --system "You are brief."
"""
HISTORY_LINES: Final = 1000
FENCE: Final = '"""'


def add_chat_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of `actorserve chat`."""
    parser.add_argument("--system", metavar="TEXT", help="system prompt")
    parser.add_argument("--load", metavar="FILE", help="go on with a conversation that /save wrote")
    add_talk_flags(parser)


def chat(parsed: argparse.Namespace) -> int:
    """Talk until the end of the input; returns the exit code. Raises ActorserveError if it cannot begin."""
    options = options_of(parsed)
    with partner_of(parsed) as partner:
        talk = Chat(partner, options, parsed.system or "", Paint(sys.stdout))
        if parsed.load:
            talk.load(parsed.load)
        terminal = sys.stdin.isatty()
        if terminal:
            talk.greet()
        with _line_editor(terminal, talk):
            while talk.open:
                line = _read("> " if terminal else "")
                if line is None:
                    break
                talk.take(line)
        if terminal:
            print()
    return 0


def _read(prompt: str) -> str | None:
    """One message: a line, lines that end in a backslash, or lines between two fences; None at the end of input."""
    try:
        line = input(prompt)
        if line.strip().startswith(FENCE):
            return _read_fenced(line.strip()[len(FENCE) :], prompt)
        while line.endswith("\\"):
            line = line[:-1] + "\n" + input(prompt and ". ")
        return line
    except EOFError:
        return None
    except KeyboardInterrupt:
        print()
        return ""


def _read_fenced(first: str, prompt: str) -> str:
    lines = [first] if first else []
    if first.endswith(FENCE):
        return first[: -len(FENCE)]
    while not (line := input(prompt and ". ")).rstrip().endswith(FENCE):
        lines.append(line)
    last = line.rstrip()[: -len(FENCE)]
    return "\n".join([*lines, last] if last else lines)


class Paint:
    """Where text goes; colours only on a terminal that has them, and not where $NO_COLOR is set (no-color.org)."""

    def __init__(self, out: TextIO) -> None:
        self._out = out
        self._plain = not has_colours(out)

    def say(self, text: str, end: str = "\n") -> None:
        """Print as it is."""
        print(text, end=end, file=self._out, flush=True)

    def note(self, text: str, end: str = "\n") -> None:
        """Print what is not the model's."""
        self._paint("2", text, end)

    def warn(self, text: str) -> None:
        """Print what went wrong."""
        self._paint("31", text, "\n")

    def _paint(self, code: str, text: str, end: str) -> None:
        self.say(text if self._plain or not text else f"\x1b[{code}m{text}\x1b[0m", end)


class Chat:
    """One conversation and its settings. `open` until /quit."""

    def __init__(self, partner: Partner, options: Options, system: str, paint: Paint) -> None:
        self.partner = partner
        self.options = dict(options)
        self.system = system
        self.turns: list[Message] = []
        self.open = True
        self.paint = paint
        self.commands: dict[str, tuple[Callable[[str], None], str, str]] = {
            "help": (self._help, "", "this list"),
            "system": (self._system, "[TEXT]", "set the system prompt; without a text, show it; - takes it away"),
            "temp": (lambda given: self._set(f"temperature {given}"), "X", "the temperature"),
            "max": (lambda given: self._set(f"max_tokens {given}"), "N", "the longest answer, in tokens"),
            "set": (self._set, "[NAME X]", "another sampling parameter; without a name, show all; X - is the default"),
            "retry": (self._retry, "", "answer the last message again"),
            "undo": (self._undo, "", "take the last message and its answer back"),
            "clear": (self._clear, "", "begin anew; the system prompt stays"),
            "save": (self._save, "FILE", "write the conversation: Markdown for .md, otherwise JSON"),
            "load": (self.load, "FILE", "go on with a conversation that was saved as JSON"),
            "quit": (self._quit, "", "leave, as Ctrl-D does"),
        }

    def greet(self) -> None:
        """Say who is there."""
        self.paint.say(f"{self.partner.name}, {self.partner.place}")
        self.paint.note('/help lists the commands; """ begins and ends a text of several lines; Ctrl-C stops an answer')

    def take(self, line: str) -> None:
        """Obey a command, or send a message; what goes wrong is said, and the conversation stays as it was."""
        text = line.strip()
        try:
            if text.startswith("/") and "\n" not in text:
                self._command(text)
            elif text:
                self._say(text)
        except ActorserveError as error:
            self.paint.warn(error.message)

    def _command(self, text: str) -> None:
        word, _, rest = text[1:].partition(" ")
        found = [name for name in self.commands if name == word] or [n for n in self.commands if n.startswith(word)]
        if not word or len(found) != 1:
            which = f"/{word} may be {' or '.join('/' + name for name in found)}" if word and found else f"no /{word}"
            raise RequestError(f"{which}; /help lists the commands")
        self.commands[found[0]][0](rest.strip())

    def _say(self, text: str) -> None:
        self.turns.append({"role": "user", "content": text})
        answer = ""
        try:
            answer = self._answer()
        finally:
            if answer:
                self.turns.append({"role": "assistant", "content": answer})
            else:
                self.turns.pop()

    def _answer(self) -> str:
        """Print the answer to the conversation as it comes, and return it; Ctrl-C ends it with what there is."""
        system: list[Message] = [{"role": "system", "content": self.system}] if self.system else []
        figures, said, thinking = Figures(), "", False
        try:
            with closing(self.partner.chat([*system, *self.turns], self.options)) as pieces:
                for piece in pieces:
                    figures.take(piece)
                    if piece.thought:
                        self.paint.note(piece.thought, end="")
                        thinking = True
                    if piece.text:
                        self.paint.say(("\n\n" if thinking else "") + piece.text, end="")
                        said, thinking = said + piece.text, False
        except KeyboardInterrupt:
            figures.finish = "stopped"
        finally:
            self.paint.say("")  # an error's text begins on a line of its own
        self.paint.note(figures.line() + "\n")
        return said

    # ------------------------------------------------------------------ commands

    def _help(self, _: str) -> None:
        rows = [(f"/{name} {takes}".rstrip(), text) for name, (_, takes, text) in self.commands.items()]
        width = max(len(left) for left, _ in rows) + 2
        self.paint.say("\n".join(f"  {left:{width}}{text}" for left, text in rows))
        self.paint.note("Commands may be shortened while it is clear which is meant.")

    def _system(self, text: str) -> None:
        if text:
            self.system = "" if text == "-" else text
        self.paint.note(f"system prompt: {self.system}" if self.system else "there is no system prompt")

    def _set(self, given: str) -> None:
        name, _, value = given.partition(" ")
        if not name:
            for each, (_, text) in SAMPLING.items():
                self.paint.note(f"  {each} = {self.options.get(each, 'default')}  ({text})")
            return
        if name not in SAMPLING:
            raise RequestError(f"no parameter {name}; there are {', '.join(SAMPLING)}", param=name)
        kind = SAMPLING[name][0]
        if value == "-":
            self.options.pop(name, None)
        elif value:
            try:
                self.options[name] = kind(value)
            except ValueError:
                text = f"{name} takes {'a whole number' if kind is int else 'a number'}, not {value!r}"
                raise RequestError(text, param=name) from None
        self.paint.note(f"{name} is {self.options.get(name, 'the default')}")

    def _retry(self, _: str) -> None:
        self._say(self._take_back())

    def _undo(self, _: str) -> None:
        self._take_back()
        self.paint.note(f"taken back; {len(self.turns)} turns left")

    def _take_back(self) -> str:
        if not self.turns:
            raise RequestError("there is nothing to take back")
        while (turn := self.turns.pop())["role"] != "user" and self.turns:
            continue
        return turn["content"]

    def _clear(self, _: str) -> None:
        self.turns.clear()
        self.paint.note("a new conversation")

    def _save(self, name: str) -> None:
        turns: list[Message] = [*([{"role": "system", "content": self.system}] if self.system else []), *self.turns]
        if name.endswith(".md"):
            text = "\n\n".join(f"**{turn['role']}**\n\n{turn['content']}" for turn in turns) + "\n"
        else:
            text = json.dumps(turns, ensure_ascii=False, indent=1) + "\n"
        try:
            _path(name).write_text(text, encoding="utf-8")
        except OSError as error:
            raise RequestError(f"{name} cannot be written: {error.strerror}") from None
        self.paint.note(f"{len(turns)} turns in {name}")

    def load(self, name: str) -> None:
        """Take a saved conversation in the place of this one. Raises RequestError, and then nothing has changed."""
        try:
            turns = json.loads(_path(name).read_text(encoding="utf-8"))
            loaded = [{"role": str(turn["role"]), "content": str(turn["content"])} for turn in turns]
        except OSError as error:
            raise RequestError(f"{name} cannot be read: {error.strerror}") from None
        except (ValueError, LookupError, TypeError):
            raise RequestError(f"{name} is not a conversation that was saved as JSON") from None
        self.system = next((turn["content"] for turn in loaded if turn["role"] == "system"), "")
        self.turns = [turn for turn in loaded if turn["role"] != "system"]
        self.paint.note(f"{len(self.turns)} turns of {name}")

    def _quit(self, _: str) -> None:
        self.open = False


def _path(name: str) -> Path:
    if not name:
        raise RequestError("give a file's name")
    return Path(name).expanduser()


@contextmanager
def _line_editor(terminal: bool, talk: Chat) -> Iterator[None]:
    """On a terminal: editing, the lines of earlier conversations, and Tab for commands."""
    if not terminal:
        yield
        return
    try:
        import readline
    except ImportError:  # some builds of Python have none
        yield
        return

    def matching(text: str, number: int) -> str | None:
        names = [f"/{name} " for name in talk.commands if text.startswith("/") and f"/{name}".startswith(text)]
        return names[number] if number < len(names) else None

    try:
        file = cache_folder() / "chat_history"
    except ActorserveError:  # it is only history
        file = Path(os.devnull)
    readline.set_completer(matching)
    readline.set_completer_delims(" ")
    readline.parse_and_bind("tab: complete")
    readline.set_history_length(HISTORY_LINES)
    with suppress(OSError):
        readline.read_history_file(file)
    try:
        yield
    finally:
        with suppress(OSError):
            file.touch(mode=0o600)
            readline.write_history_file(file)
