"""ProgramState: the `s` of a program, and ProgramStateGroup: its branches. What programs and their callers touch.

Reading a variable waits until it is there: blocking in plain programs, with `await` in `async def` ones (`await s`
waits for everything). Invariant: a variable that could not be made raises where it is read, naming the program's line.
"""

from collections.abc import AsyncIterator, Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, TypeAlias

from .context import ChatTurn
from .expressions import RoleBegin, RoleEnd, VarScopeBegin, VarScopeEnd, sequence
from .interpreter import Executor
from .loop import Signal
from .variables import Slot

Appended: TypeAlias = Any
"""A text, an expression, or a number; see expressions.flatten."""


class ProgramState:
    """One state. Its methods may be called from any thread, but not from two at once."""

    def __init__(self, executor: Executor) -> None:
        self.stream_executor = executor
        self.body_error: Exception | None = None
        """What ended the program's function."""
        self.remote = False
        """The whole program was sent to the backend's server (`run(remote=True)`)."""
        self.local_reason: str | None = None
        """Why it was not, though this was asked for."""
        self._ret_value: Any = None

    # ------------------------------------------------------------------ append

    def __iadd__(self, other: Appended) -> "ProgramState":
        if other is not None:
            self.stream_executor.submit(other)
        return self

    def system(self, expr: Appended = None) -> Any:
        """Append a turn; without `expr` a context manager around what is appended in it."""
        return self._role("system", expr)

    def user(self, expr: Appended = None) -> Any:
        """As `system`."""
        return self._role("user", expr)

    def assistant(self, expr: Appended = None) -> Any:
        """As `system`."""
        return self._role("assistant", expr)

    def var_scope(self, name: str) -> AbstractContextManager[None]:
        """What is appended inside becomes the variable `name`."""
        return self._scope(VarScopeBegin(name), VarScopeEnd(name))

    def fork(self, size: int = 1, position_ids_offset: list[int] | None = None) -> "ProgramStateGroup":
        """`size` branches that go on from here. `position_ids_offset` is taken for SGLang's sake, without effect."""
        return ProgramStateGroup([ProgramState(branch) for branch in self.stream_executor.fork(int(size))], self)

    @contextmanager
    def copy(self, position_ids_offset: list[int] | None = None) -> Iterator["ProgramState"]:
        """A branch for the length of a block; its new variables are gathered at the end."""
        group = self.fork(1)
        try:
            yield group[0]
        finally:
            group.join()

    # ------------------------------------------------------------------ read

    def __getitem__(self, name: str) -> Any:
        return self.get_var(name)

    def __setitem__(self, name: str, value: Any) -> None:
        self.set_var(name, value)

    def __contains__(self, name: str) -> bool:
        executor = self.stream_executor
        if name not in executor.slots:
            executor.idle.wait()
        slot = executor.slots.get(name)
        if slot is not None and slot.optional:
            slot.done.wait()
        return slot is not None and not slot.missing

    def get_var(self, name: str) -> Any:
        """The variable's value. Raises KeyError if there is none, ProgramError if it could not be made."""
        slot = self.stream_executor.find(name)
        slot.done.wait()
        return slot.result()

    async def aget_var(self, name: str) -> Any:
        """As `get_var`, in any event loop."""
        return (await self._done(name)).result()

    def set_var(self, name: str, value: Any) -> None:
        self.stream_executor.set_var(name, value)

    def get_meta_info(self, name: str, timeout: float | None = None) -> dict[str, Any] | None:
        """What the backend says of the call that made a variable. Raises TimeoutError after `timeout` seconds."""
        slot = self.stream_executor.find(name)
        if not slot.done.wait(timeout):
            raise TimeoutError(f"variable {name!r} is not there after {timeout} s")
        slot.result()
        return slot.meta

    async def aget_meta_info(self, name: str) -> dict[str, Any] | None:
        """As `get_meta_info`, in any event loop."""
        slot = await self._done(name)
        slot.result()
        return slot.meta

    def sync(self) -> None:
        """Wait until everything that was appended is done, or has failed."""
        self.stream_executor.flush()
        self.stream_executor.idle.wait()

    def __await__(self) -> Generator[Any, None, "ProgramState"]:
        """`await s`: as `sync`, in any event loop; then all reads return at once."""
        return self._settled().__await__()

    def text(self) -> str:
        """The whole text. Raises ProgramError if a part of it could not be made."""
        self.sync()
        self._raise()
        return self.stream_executor.context.text

    def messages(self) -> list[ChatTurn]:
        """The turns that have ended, in OpenAI's form. Raises as `text`."""
        self.sync()
        self._raise()
        return list(self.stream_executor.context.messages)

    def error(self) -> Exception | None:
        """What went wrong, or None."""
        self.sync()
        return self.stream_executor.error

    @property
    def ret_value(self) -> Any:
        """What the program's function returned. Raises what ended it, in a batch or a stream."""
        self.stream_executor.life.wait()
        if self.body_error is not None:
            raise self.body_error
        return self._ret_value

    @ret_value.setter
    def ret_value(self, value: Any) -> None:
        self._ret_value = value

    def text_iter(self, var_name: str | None = None) -> Iterator[str]:
        """The text, or a variable, in pieces as it is made (`run(..., stream=True)`)."""
        for step in self._pieces(var_name):
            if isinstance(step, Signal):
                step.wait()
            else:
                yield step[0]

    async def text_async_iter(self, var_name: str | None = None, return_meta_data: bool = False) -> AsyncIterator[Any]:
        """As `text_iter`, in any event loop; with `return_meta_data` pairs of a piece and the meta_info so far."""
        for step in self._pieces(var_name):
            if isinstance(step, Signal):
                await step.reached()
            else:
                yield step if return_meta_data else step[0]

    # ------------------------------------------------------------------ inner

    def _role(self, name: str, expr: Appended) -> Any:
        if expr is None:
            return self._scope(RoleBegin(name), RoleEnd(name))
        turn = sequence((RoleBegin(name), expr, RoleEnd(name)))
        self.stream_executor.submit(turn)
        return turn

    @contextmanager
    def _scope(self, begin: Any, end: Any) -> Iterator[None]:
        self.stream_executor.submit(begin)
        yield
        self.stream_executor.submit(end)

    async def _done(self, name: str) -> Slot:
        slot = await self.stream_executor.find_async(name)
        await slot.done.reached()
        return slot

    async def _settled(self) -> "ProgramState":
        self.stream_executor.flush()
        await self.stream_executor.idle.reached()
        return self

    def _raise(self) -> None:
        if self.stream_executor.error is not None:
            raise self.stream_executor.error.with_traceback(None)

    def _pieces(self, name: str | None) -> Iterator[Signal | tuple[str, dict[str, Any] | None]]:
        """Pieces with their meta_info, and signals to wait for before going on."""
        return self._text_pieces() if name is None else self._variable_pieces(name)

    def _text_pieces(self) -> Iterator[Signal | tuple[str, dict[str, Any] | None]]:
        executor, sent = self.stream_executor, 0
        while True:
            changed, ended = executor.changed, self._has_ended()
            text = executor.context.text
            if len(text) > sent:
                yield text[sent:], None
                sent = len(text)
            elif ended:
                self._raise()
                return
            else:
                yield changed

    def _variable_pieces(self, name: str) -> Iterator[Signal | tuple[str, dict[str, Any] | None]]:
        executor, sent = self.stream_executor, 0
        while True:
            changed, ended = executor.changed, self._has_ended()
            if name in executor.slots:
                break
            if ended:
                executor.find(name)  # raises what is wrong
            yield changed
        slot = executor.find(name)
        while True:
            changed, ended = slot.changed, slot.done.is_set
            text = slot.text
            if len(text) > sent:
                yield text[sent:], slot.meta
                sent = len(text)
            elif ended:
                slot.result()
                return
            else:
                yield changed

    def _has_ended(self) -> bool:
        return self.stream_executor.life.is_set and self.stream_executor.idle.is_set


class ProgramStateGroup:
    """The branches of a fork: `forks[i]`, `for f in forks`, `forks += ...`, `forks.join()`."""

    def __init__(self, states: list[ProgramState], src_state: ProgramState) -> None:
        self.states = states
        self.src_state = src_state

    def join(self, mode: str = "gather_variable") -> None:
        """End the branches. gather_variable: variables that are new in them become lists in the state they came from,
        branch by branch (names that it had before stay). concate_and_append: their texts are appended to its text.
        """
        self.src_state.stream_executor.join([state.stream_executor for state in self.states], mode)

    def __await__(self) -> Generator[Any, None, "ProgramStateGroup"]:
        """`await forks`: until all that was appended to the branches is done, or has failed."""
        for state in self.states:
            yield from state.__await__()
        return self

    def __getitem__(self, index: int) -> ProgramState:
        return self.states[index]

    def __setitem__(self, index: int, state: ProgramState) -> None:
        """For `forks[i] += ...`, which puts the same state back. Raises ValueError for another one."""
        if self.states[index] is not state:
            raise ValueError("a branch cannot be replaced")

    def __len__(self) -> int:
        return len(self.states)

    def __iter__(self) -> Iterator[ProgramState]:
        return iter(self.states)

    def __iadd__(self, other: "Appended | Callable[[int], Appended] | Sequence[Appended]") -> "ProgramStateGroup":
        """Append the same to all, one of a list to each, or what a function makes of each branch's number."""
        items: Sequence[Any]
        if callable(other):
            items = [other(i) for i in range(len(self.states))]
        elif isinstance(other, list | tuple):
            items = other
        else:
            items = [other] * len(self.states)
        for state, item in zip(self.states, items, strict=True):
            state += item
        return self
