"""Actors that die of a request: the engine's own, but for the moment in which they meet the seed or grammar of GUILTY.

For test_quarantine.py, which puts them into the topology in place of the real ones; each death leaves a byte in a file.
"""

import os
import signal
from typing import Any, NoReturn

from actorserve.actors.actor import Context
from actorserve.actors.fsm import Fsm
from actorserve.actors.match_pool import Job, MatchPool
from actorserve.actors.messages import Generate, Submit
from actorserve.actors.scheduler import Scheduler
from actorserve.actors.stub_executor import StubExecutor
from actorserve.actors.text import Text

GUILTY = 666
GRAMMAR = 'root ::= "(" root ")" | "b"'
"""What fsm actors die of, and how a part of it is spelled on its way to them."""
PART = "x{62}-"
FILE = "ACTORSERVE_TEST_DEATHS"


def die() -> NoReturn:
    """Of a signal, as a fault in a library."""
    with open(os.environ[FILE], "a") as file:
        file.write("x")
    os.kill(os.getpid(), signal.SIGSEGV)
    raise AssertionError


class EncodingText(Text):
    """When it tokenizes."""

    def _encode(self, m: Generate) -> Any:
        if m.params.seed == GUILTY:
            die()
        return super()._encode(m)


class DecodingText(Text):
    """At the request's fifth token."""

    def _detokenizer(self, m: Generate, ids: Any) -> Any:
        made = super()._detokenizer(m, ids)
        return Fragile(made) if m.params.seed == GUILTY else made


class Fragile:
    """A detokenizer."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner
        self.count = 0

    def push(self, token: int) -> Any:
        self.count += 1
        if self.count == 5:
            die()
        return self.inner.push(token)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


class CrashingScheduler(Scheduler):
    """When it is asked, by an exception."""

    def _submit(self, m: Submit) -> None:
        if m.params.seed == GUILTY:
            with open(os.environ[FILE], "a") as file:
                file.write("x")
            raise ZeroDivisionError("as told")
        super()._submit(m)


class CrashingExecutor(StubExecutor):
    """When it draws."""

    def _draw(self, slots: list[int]) -> Any:
        assert self.sampler is not None
        if any(self.sampler.draws[slot].params.seed == GUILTY for slot in slots):
            die()
        return super()._draw(slots)


class CrashingMatchPool(MatchPool):
    def _work(self, job: Job) -> None:
        if PART in job.place.grammar:
            die()
        super()._work(job)


class CrashingFsm(Fsm):
    """When a thread of it follows the grammar."""

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self.matches.__class__ = CrashingMatchPool
