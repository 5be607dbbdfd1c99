"""A scripted backend that also runs whole programs, from their JSON and back; a program's run here beside one there.

For the tests of programs as data.
"""

from typing import Any

import msgspec
from scripted_backend import ScriptedBackend

from actorserve.lang.program import SglFunction
from actorserve.lang.remote import ProgramReply, ProgramRequest
from actorserve.lang.replay import replay
from actorserve.lang.state import ProgramState


class ProgramServer(ScriptedBackend):
    """`sent` is the last program's JSON."""

    takes_programs = True
    sent: bytes = b""

    async def run_program(self, request: ProgramRequest) -> ProgramReply:
        self.sent = msgspec.json.encode(request)
        reply = await replay(msgspec.json.decode(self.sent, type=ProgramRequest), self)
        return msgspec.json.decode(msgspec.json.encode(reply), type=ProgramReply)


def outcome(state: ProgramState) -> tuple[str, list[dict[str, Any]], dict[str, Any], Any]:
    """All that a reader can see of a state."""
    slots = state.stream_executor.slots
    return state.text(), state.messages(), {name: state[name] for name in slots if name in state}, state.ret_value


def both(program: SglFunction, server: ProgramServer, *args: Any, **kwargs: Any) -> Any:
    """The outcome, which is the same here and there."""
    server.prompts.clear()
    here = program.run(*args, backend=server, **kwargs)
    expected, prompts = outcome(here), sorted(server.prompts)
    server.prompts.clear()
    there = program.run(*args, backend=server, remote=True, **kwargs)
    assert there.remote and there.local_reason is None and not here.remote, there.local_reason
    assert outcome(there) == expected and sorted(server.prompts) == prompts
    for name in there.stream_executor.slots:
        assert there.get_meta_info(name) == here.get_meta_info(name)
    return outcome(there)
