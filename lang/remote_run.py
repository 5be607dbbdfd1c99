"""Sends a recorded program to its backend's server, and fills the program's state with what comes back.

Used by program.py for `run(remote=True)`. Invariant: the state ends as a run of the body here would have left it, as
far as readers can see: text, messages, variables, errors with the program's lines, and what the body returned.
"""

from typing import TYPE_CHECKING, Any

from .backend import Backend
from .interpreter import Executor
from .recording import Recorded, restored, typed
from .remote import Failure, Outcome, ProgramReply, ProgramRequest, error_of
from .variables import ProgramError, Slot

if TYPE_CHECKING:
    from .state import ProgramState


async def run_remotely(state: "ProgramState", recorded: Recorded, backend: Backend, executor: Executor) -> None:
    """Raises what keeps the server from running the program; errors of the program are the state's."""
    try:
        async with backend.turn:
            request = ProgramRequest(recorded.statements, executor.defaults, backend.chat_template)
            _fill(state, recorded, executor, await backend.run_program(request))
    except Exception as error:
        state.body_error = error
        raise
    finally:
        executor.life.set()


def _fill(state: "ProgramState", recorded: Recorded, executor: Executor, reply: ProgramReply) -> None:
    executor.context.text, executor.context.messages = reply.text, reply.messages
    kinds = {name: kind for leaf in recorded.leaves for name, kind in leaf.kinds.items()}
    for name, outcome in reply.variables.items():
        executor.slots[name] = _slot(name, outcome, kinds[name].output_type if name in kinds else None)
    if reply.error is not None:
        executor.error = _program_error(reply.error)
    if reply.leaf is None:
        state.body_error = executor.error
    else:
        state.ret_value = restored(recorded.leaves[reply.leaf], reply.returned)


def _slot(name: str, outcome: Outcome, output_type: Any) -> Slot:
    slot = Slot(name)
    if outcome.error is not None:
        slot.error = _program_error(outcome.error)
        slot.fill(None)
        return slot
    try:
        value = typed(outcome.value, output_type)
    except Exception as error:
        slot.fail(error)
    else:
        slot.fill(value, outcome.meta)
    return slot


def _program_error(failure: Failure) -> ProgramError:
    error = ProgramError(failure.message, "")
    error.line = failure.line
    error.code, error.status, error.param = failure.code or error.code, failure.status, failure.param
    error.__cause__ = error_of(failure)
    return error
