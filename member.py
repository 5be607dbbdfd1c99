"""`actorserve run` with several machines (--nnodes): what node 0 needs to meet the others, and what runs on these.

Used by serve.py. A machine other than node 0 has no front, no text and no fsm actor: each of its replicas is a topology
of its own, with a supervisor of its own, all in one trio loop. It waits for node 0 for as long as it takes, and after
its end for the next one, with its weights and its cache; a signal ends it.
"""

import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from .actors.machines import address_of
from .actors.supervisor import Supervisor
from .actors.topology import MeetingPoint, member_topology
from .config import EngineConfig, ModelInfo
from .display import Display
from .errors import StartupError

BACKLOG = 128


@contextmanager
def meeting_point(config: EngineConfig) -> Iterator[MeetingPoint | None]:
    """The sockets at which node 0 waits for the others; None where there are none. Raises StartupError."""
    elsewhere = [number for number in range(config.dp_size) if config.machine_of(number) != config.node_rank]
    if not elsewhere:
        yield None
        return
    with ExitStack() as opened:
        host, port = address_of(config)
        try:
            family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
            listener = opened.enter_context(socket.create_server(address, family=family, backlog=BACKLOG))
        except OSError as error:
            raise StartupError(
                f"cannot wait for other machines at --dist-init-addr {config.dist_init_addr}: {error.strerror}"
            ) from error
        channels = {}
        for number in elsewhere:
            sends, receives = map(opened.enter_context, socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM))
            channels[number] = (sends.fileno(), receives.fileno())
        yield MeetingPoint(listener.fileno(), channels)


def members(config: EngineConfig, model: ModelInfo, display: Display) -> list[Supervisor]:
    """The supervisors of this machine's replicas, which is not node 0."""
    numbers = config.replicas_here
    which = f"replica {numbers[0]}" if len(numbers) == 1 else f"replicas {numbers[0]} to {numbers[-1]}"
    banner = (
        f"\nnode {config.node_rank} of {config.nnodes} runs {which} of {model.name}, "
        f"for node 0 at {config.dist_init_addr}\n"
    )
    up: list[str] = []

    def on_event(kind: str, node: str, detail: str, fraction: float) -> None:
        display.event(kind, node, detail, fraction)
        if kind == "up":
            up.append(node)
            if len(up) == len(numbers):
                display.greet(banner)

    return [Supervisor(member_topology(config, number), config, model, on_event=on_event) for number in numbers]
