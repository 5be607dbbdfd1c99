"""Compilers of grammars: processes that can be killed, for patterns and schemas of strangers may take any time.

The fsm actor starts their mother (compile_pool.py), which builds the tokenizer's tables once and says Ready; each is a
fork of her, spoken to through a socket of its own, one job at a time: it answers each Job with Made or Failed.
Invariant: a compiler holds nothing that matters; its memory is bounded (RLIMIT_AS), and all die with who started them.
The mother has one thread (a fork has no other), and never sees a grammar of strangers.
"""

import gc
import os
import resource
import signal
import socket
import struct
import sys
from functools import partial
from typing import TYPE_CHECKING, Final, NoReturn, TypeAlias

import msgspec

from ..config import Thoughts
from .courtesy import Courteous
from .messages import GrammarSpec

if TYPE_CHECKING:
    from ..fsm.budget import Budget
    from ..fsm.matcher import Matchers
    from ..fsm.syntax import Node
    from ..models.tokenizer import Tokenizer

TABLE_BYTES: Final = 16 << 20
"""Most of a grammar's transitions: a lane and a GPU take them."""
MEMORY: Final = 2 << 30
"""Bytes that compiling may take beside the tokenizer's tables."""
GRACE: Final = 0.2
"""Seconds beyond a grammar's own: after them its compiler is killed (as they are charged: fsm/budget.py)."""
TABLE_SHARE: Final = 0.7
"""Of a grammar's seconds: for its table, where llguidance may take what needs longer."""
WARM_UP: Final = (GrammarSpec("regex", "[a-z]+"), GrammarSpec("json_schema", '{"type":"string","format":"date"}'))
LENGTH: Final = struct.Struct("<I")
"""Before each message, its bytes."""
CREDIT: Final = struct.Struct("<d")
"""To the mother, with a descriptor: fork a compiler that serves it and may waste so many seconds at first."""
PID: Final = struct.Struct("<i")
"""Her answer, with a pidfd: the compiler's pid."""


class Setup(msgspec.Struct, frozen=True, array_like=True, tag=1):
    """First to the worker: where the tokenizer is, which tokens end an output, the size of the model's vocabulary,
    the seconds that a grammar may take, and EngineConfig.grammar_backend."""

    tokenizer: str
    eos_ids: tuple[int, ...]
    vocab_size: int
    seconds: float
    backend: str


class Job(msgspec.Struct, frozen=True, array_like=True, tag=2):
    """To the worker: compile this."""

    spec: GrammarSpec


class Ready(msgspec.Struct, frozen=True, array_like=True, tag=3):
    """From the worker: the tables are built. `refusal`: why this tokenizer can have no grammars."""

    refusal: str | None = None


class Made(msgspec.Struct, frozen=True, array_like=True, tag=4):
    """From the worker: arrays as in messages.LoadGrammar."""

    token_class: bytes
    transitions: bytes
    canonical: bytes


class Failed(msgspec.Struct, frozen=True, array_like=True, tag=5):
    """From the worker: the grammar cannot be used. `late`: another time it might have been ready."""

    code: str
    message: str
    late: bool = False


class MadeText(msgspec.Struct, frozen=True, array_like=True, tag=6):
    """From the worker: no table, but a grammar of llguidance's, tried once (fsm/matcher.py)."""

    grammar: str
    """Guidance"""


class Guidance(msgspec.Struct, frozen=True, array_like=True):
    """What MadeText and Translated say, as JSON: a grammar of llguidance's, and what comes before it."""

    grammar: str
    thoughts: Thoughts | None = None


Result: TypeAlias = Made | MadeText | Failed
"""What becomes of a Job."""
Answer: TypeAlias = Ready | Result
encode: Final = msgspec.msgpack.Encoder().encode
decode_answer: Final = msgspec.msgpack.Decoder(Answer).decode
_decode_setup: Final = msgspec.msgpack.Decoder(Setup).decode
_decode_job: Final = msgspec.msgpack.Decoder(Job).decode


def framed(message: msgspec.Struct) -> bytes:
    """A message as it goes through the socket."""
    data = encode(message)
    return LENGTH.pack(len(data)) + data


class Compiler:
    """The tables of one tokenizer, and the compilations with them."""

    def __init__(self, setup: Setup) -> None:
        from ..fsm.vocabulary import build_tables
        from ..models.tokenizer import load_tokenizer

        tokenizer = load_tokenizer(setup.tokenizer)
        size = min(tokenizer.vocab_size, setup.vocab_size)
        tokens = [None if i in tokenizer.added else tokenizer.token_bytes(i) for i in range(size)]
        self.seconds, self.backend = setup.seconds, setup.backend
        self.tokenizer = tokenizer
        self.tables = build_tables(tokens, setup.eos_ids or tokenizer.eos_ids)
        self.refusal: str | None = None
        if tokenizer.scheme is None:
            self.refusal = "the tokens of this model's tokenizer have no fixed bytes: outputs cannot be constrained"
        elif not self.tables.eos:
            self.refusal = "this model has no token that ends an output: outputs cannot be constrained"
        self.matchers: Matchers | None = None
        if self.refusal is None and self.backend != "fsm":
            self.matchers = make_matchers(tokenizer, setup)
        if self.refusal is None:
            for first in WARM_UP:  # imports and caches: a client's first grammar takes no longer than its second
                self.compile(first)

    def compile(self, spec: GrammarSpec) -> Result:
        """Compile a grammar; never raises."""
        from ..fsm.errors import BudgetError, GrammarError

        try:
            return self._made(spec)
        except BudgetError as error:
            return Failed(error.code, f"{spec.kind}: {error.message}", late=error.resource == "seconds")
        except GrammarError as error:
            return Failed(error.code, f"{spec.kind}: {error.message}")
        except (MemoryError, RecursionError):
            return Failed("grammar_too_large", f"{spec.kind}: the grammar is too large")

    def _made(self, spec: GrammarSpec) -> Made | MadeText:
        """A table, else what llguidance can have exactly. Where neither can, the first one's reasons count."""
        from ..fsm.errors import BudgetError, GrammarError, NotRegular
        from ..fsm.shapes import Unsupported

        refusal: GrammarError | None = None
        node: Node | None = None
        whole = self._budget(self.seconds + GRACE)
        if self.backend != "llguidance":
            budget = self._budget(self.seconds * (1.0 if self.matchers is None else TABLE_SHARE))
            try:
                if spec.kind == "regex":
                    budget.need_pattern(len(spec.text))
                node = syntax_of(spec)
                return self._table(spec, node, budget)
            except (BudgetError, NotRegular, Unsupported) as error:
                if self.matchers is None:
                    raise
                refusal = error
        try:
            return self._translated(spec, node, whole)
        except GrammarError as error:
            if refusal is None or isinstance(refusal, NotRegular):
                raise
            if error.message != refusal.message:
                refusal.message += f"; llguidance: {error.message}"
            raise refusal from error

    def _budget(self, seconds: float) -> "Budget":
        from ..fsm.budget import Budget

        return Budget(seconds=seconds, table_bytes=TABLE_BYTES)

    def _table(self, spec: GrammarSpec, node: "Node", budget: "Budget") -> Made:
        from ..fsm.compiler import compile_tokens
        from ..fsm.thoughts import Tables, after_thoughts

        table = compile_tokens(node, self.tables, self._spell, budget)
        arrays = Tables(table.token_class, table.transitions, table.canonical)
        if spec.thoughts is not None:
            arrays = after_thoughts(arrays, spec.thoughts, self.tables.place >= 0)
        return Made(*(array.tobytes() for array in arrays))

    def _translated(self, spec: GrammarSpec, node: "Node | None", budget: "Budget") -> MadeText:
        """`node`: its tree, where that is known. Raises GrammarError also for what the library refuses, and where the
        request's own matcher, which takes as long as this one, would come when the time is up."""
        import numpy as np

        from ..fsm.errors import BudgetError

        assert self.matchers is not None
        control = set(self.tokenizer.control.tokens)
        special = {text: i for i, text in self.tokenizer.added.items() if text in control and i < self.tables.size}
        grammar = translation(spec, special, node)
        before = budget.spent()
        self.matchers.new(grammar).fill(np.zeros(self.matchers.words, np.int32))
        if 2 * budget.spent() - before > budget.seconds:
            raise BudgetError("seconds", self.seconds)
        return MadeText(msgspec.json.encode(Guidance(grammar, spec.thoughts)).decode())

    def _spell(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)


def syntax_of(spec: GrammarSpec) -> "Node":
    """The syntax tree of a grammar. Raises NotRegular, Unsupported where it has none, other GrammarErrors."""
    from ..fsm.errors import NotRegular
    from ..fsm.gbnf import looks_like_gbnf, parse_gbnf, rules_to_syntax
    from ..fsm.json_schema import choices, schema_to_syntax
    from ..fsm.pattern import parse_pattern
    from ..fsm.spelling import policy
    from ..models.call_grammar import Calls, calls_syntax

    match spec.kind:
        case "regex":
            return parse_pattern(spec.text)
        case "tool_calls":
            return calls_syntax(msgspec.json.decode(spec.text, type=Calls))
        case "choice":
            return choices(msgspec.json.decode(spec.text))
        case "json_schema":
            return schema_to_syntax(msgspec.json.decode(spec.text), policy(spec.whitespace))
        case "ebnf":
            if not looks_like_gbnf(spec.text):
                raise NotRegular("Lark is for llguidance: the server runs with --grammar-backend fsm")
            return rules_to_syntax(parse_gbnf(spec.text))
        case _:
            raise NotRegular("it is for llguidance: the server runs with --grammar-backend fsm")


def translation(spec: GrammarSpec, special: dict[str, int], node: "Node | None" = None) -> str:
    """A grammar as llguidance has it. `special`: the model's special tokens, text to id. `node`: what syntax_of made of
    the grammar, where it did. Raises GrammarError."""
    from ..fsm.guidance import ebnf_grammar, grammar_of, json_grammar
    from ..fsm.spelling import policy
    from ..fsm.structural_tag import tag_grammar

    match spec.kind:
        case "json_schema":
            return json_grammar(msgspec.json.decode(spec.text), policy(spec.whitespace), checked=node is not None)
        case "ebnf":
            return ebnf_grammar(spec.text)
        case "structural_tag":
            return tag_grammar(msgspec.json.decode(spec.text), special)
        case _:
            return grammar_of(syntax_of(spec) if node is None else node)


def make_matchers(tokenizer: "Tokenizer", setup: Setup) -> "Matchers":
    """What makes the matchers of a tokenizer. Added tokens that are no control tokens are text like any other."""
    from ..fsm.matcher import Matchers

    size, control = min(tokenizer.vocab_size, setup.vocab_size), set(tokenizer.control.tokens)
    added = {i: text for i, text in tokenizer.added.items() if i < size}
    tokens = [added[i].encode() if i in added else tokenizer.token_bytes(i) for i in range(size)]
    special = [i for i, text in added.items() if text in control]
    eos = [i for i in setup.eos_ids or tokenizer.eos_ids if i < size]
    return Matchers(tokens, special, eos, lambda text: tokenizer.encode(text, add_special_tokens=False))


def without_table(result: Result) -> bool:
    """Whether the time that a grammar took went for nothing: refusals and translations take none to speak of."""
    return not isinstance(result, Made)


def limit_memory() -> None:
    """Let this process take MEMORY more than it has."""
    with open("/proc/self/statm", encoding="ascii") as file:
        pages = int(file.read().split()[0])
    most = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (most, most))


def bear(channel: socket.socket) -> None:
    """The mother's life: tables, then a fork for each order, until the other end closes."""
    (size,) = LENGTH.unpack(_received(channel, LENGTH.size))
    compiler = Compiler(_decode_setup(_received(channel, size)))
    gc.collect()
    gc.freeze()  # what is never moved or freed stays shared
    channel.sendall(framed(Ready(compiler.refusal)))
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for them
    mother = os.getpid()
    while True:
        data, descriptors, _, _ = socket.recv_fds(channel, CREDIT.size, 1)
        if len(data) < CREDIT.size or not descriptors:
            return
        pid = os.fork()
        if not pid:
            be_born(channel, socket.socket(fileno=descriptors[0]), compiler, mother, CREDIT.unpack(data)[0])
        os.close(descriptors[0])
        try:
            pidfd = os.pidfd_open(pid)
        except ProcessLookupError:  # it has ended already
            channel.sendall(PID.pack(pid))
            continue
        socket.send_fds(channel, [PID.pack(pid)], [pidfd])
        os.close(pidfd)


def be_born(
    inherited: socket.socket, channel: socket.socket, compiler: Compiler, mother: int, saved: float
) -> NoReturn:
    """A compiler's life."""
    from .node import die_with_parent

    code = 1
    try:
        die_with_parent(mother)
        inherited.close()
        limit_memory()
        serve(channel, compiler, saved)
        code = 0
    finally:
        os._exit(code)


def serve(channel: socket.socket, compiler: Compiler, saved: float) -> None:
    """Answer until the other end closes."""
    courteous = Courteous(saved)
    gc.disable()  # trees and sets hold no cycles, and looking for some would be half of the time: that is done behind
    while (head := _received(channel, LENGTH.size)) != b"":
        job = _decode_job(_received(channel, LENGTH.unpack(head)[0]))
        answer = courteous.do(partial(compiler.compile, job.spec), without_table)
        channel.sendall(framed(answer))
        gc.collect()


def _received(channel: socket.socket, size: int) -> bytes:
    """So many bytes; fewer where the other end closes."""
    data = bytearray()
    while len(data) < size and (part := channel.recv(size - len(data))):
        data += part
    return bytes(data)


def main() -> None:
    """Entry: `python -c "...; main()" SOCKET_FD PARENT_PID`. Never returns."""
    from .node import die_with_parent

    for number in (signal.SIGINT, signal.SIGTERM):  # terminals send them to everybody; we end with our parent
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT, signal.SIGTERM})
    die_with_parent(int(sys.argv[2]))
    bear(socket.socket(fileno=int(sys.argv[1])))
    os._exit(0)
