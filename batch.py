"""`actorserve batch`: answers a file of requests with the embedded engine, and goes on where it was stopped.

Used by cli.py. Requests go to the handlers that the HTTP server has, so an answer is what the server would say.
Invariant: the output has at most one line for each custom_id; a line that a crash cut is removed before work goes on.
"""

import argparse
import asyncio
import fcntl
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, Final

import msgspec

from .config import EngineConfig
from .engine import Engine
from .errors import EngineDown, RequestError, StartupError
from .flags import Parser
from .http.app import BATCHED, build_app
from .http.batch_runner import ROWS, ask
from .http.batch_store import checked_line, split_lines
from .http.batch_types import InputLine, OutputLine
from .http.metrics import Metrics
from .http.service import Service

AHEAD: Final = 2
"""Requests in the engine for each of its rows: the queue never runs dry."""
WATCH_SECONDS: Final = 0.5
INTERRUPTED: Final = 130
ANSWER: Final = b'{"id":'
"""How a line of ours begins: one without an end that does not is somebody else's, and stays."""


def batch(parsed: argparse.Namespace, config: EngineConfig, parser: Parser) -> int:
    """Answer what has no answer yet; returns the exit code. Raises StartupError."""
    source, target = Path(parsed.input), Path(parsed.output)
    _check_files(source, target)
    try:
        with source.open("rb") as requests, target.open("a+b") as answers:
            fcntl.flock(answers, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return asyncio.run(_Run(config, requests, answers).run())
    except BlockingIOError:
        raise StartupError(f"{target} is being written by another process") from None
    except OSError as error:
        parser.error(f"{error.filename or target}: {error.strerror}")
    except EngineDown as error:
        print(f"actorserve: {error.message}; the same command goes on", file=sys.stderr)
        return 1
    except (KeyboardInterrupt, asyncio.CancelledError):
        print("actorserve: stopped; the same command goes on", file=sys.stderr)
        return INTERRUPTED


def _check_files(source: Path, target: Path) -> None:
    """Raises StartupError for what cannot be read twice, and for answers that would go into the requests."""
    for path in (source, target):
        if path.exists() and not (path.is_file() or path.is_dir()):
            raise StartupError(f"{path} is a pipe or a device: a file is needed, which is read more than once")
    if source.exists() and target.exists() and source.samefile(target):
        raise StartupError(f"{target} is the input: the answers need a file of their own")


class _Run:
    """One run over an input. Lines are checked before the engine starts, and read again when it is their turn."""

    def __init__(self, config: EngineConfig, requests: IO[bytes], answers: IO[bytes]) -> None:
        self._config = config
        self._requests = requests
        self._answers = answers
        self._refused = 0
        self._room = asyncio.Semaphore(AHEAD * (config.max_running_requests or ROWS))

    async def run(self) -> int:
        done = self._answered()
        asked = {line.custom_id for line in self._lines()}
        task = asyncio.current_task()
        assert task is not None
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
        with _bar(len(asked), len(asked & done)) as bar:
            if asked - done:
                settings = msgspec.structs.asdict(self._config)
                try:
                    async with Engine(**settings) as engine, asyncio.TaskGroup() as group:
                        watch = group.create_task(_watch(engine))
                        await self._ask_all(engine, done, bar)
                        watch.cancel()
                except* (EngineDown, StartupError) as failed:
                    raise _first(failed) from None
        if self._refused:
            print(f"actorserve: {self._refused} requests were refused; their answers say why", file=sys.stderr)
        return 1 if self._refused else 0

    async def _ask_all(self, engine: Engine, done: set[str], bar: Any) -> None:
        service = Service(engine._client, engine.config, engine.model, Metrics(), int(time.time()))
        build_app(service)
        async with asyncio.TaskGroup() as group:
            for line in self._lines():
                if line.custom_id not in done:
                    await self._room.acquire()
                    group.create_task(self._ask(service, line, bar))

    async def _ask(self, service: Service, line: InputLine, bar: Any) -> None:
        output, good = await ask(service, line)
        try:
            self._answers.write(msgspec.json.encode(output) + b"\n")
            self._answers.flush()
        except OSError as error:
            raise StartupError(f"{self._answers.name} cannot be written: {error.strerror}") from None
        self._refused += not good
        self._room.release()
        bar.update()

    def _answered(self) -> set[str]:
        """The custom_ids that the output has; a last line without an end is removed."""
        self._answers.seek(0)
        done: set[str] = set()
        whole = 0
        for text in self._answers:
            if not text.endswith(b"\n") and text[: len(ANSWER)] == ANSWER[: len(text)]:
                break
            try:
                answer = msgspec.json.decode(text, type=OutputLine)
            except msgspec.MsgspecError:
                raise StartupError(f"{self._answers.name} has a line that is no answer of a batch") from None
            self._refused += answer.response is None or answer.response.status_code != 200
            done.add(answer.custom_id)
            whole += len(text)
        self._answers.truncate(whole)
        return done

    def _lines(self) -> Iterator[InputLine]:
        """The requests. Raises StartupError for a line that is none."""
        self._requests.seek(0)
        seen: set[str] = set()
        most = self._config.max_body_bytes
        for number, (_, text) in enumerate(split_lines(self._requests.read, most), 1):
            if not text.strip():
                continue
            try:
                yield checked_line(text, BATCHED, seen, most)
            except RequestError as error:
                raise StartupError(f"{self._requests.name}, line {number}: {error.message}") from None


def _first(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """The first error of a group of groups."""
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def _bar(total: int, done: int) -> Any:
    from tqdm import tqdm

    return tqdm(total=total, initial=done, unit="request", file=sys.stderr, dynamic_ncols=True)


async def _watch(engine: Engine) -> None:
    """Raise EngineDown when the engine has ended for good."""
    while True:
        _ = engine._client
        await asyncio.sleep(WATCH_SECONDS)
