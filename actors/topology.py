"""What the engine is made of: which actors, in which nodes, joined by which lanes. Data only; imports no actor.

The command line and the embedded API build a Topology with `engine_topology` and hand it to the supervisor. A node is
one loop with one or more actors: a process, a place in the supervisor's own loop, or a guest that attaches itself.
Invariant: names are unique, each lane joins two actors of the topology, at most one lane per direction.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final, Literal

from ..config import EngineConfig
from .lane import DEFAULT_CAPACITY

Kind = Literal["process", "inline", "attached"]
MODEL: Final = ("actorserve.actors.executor:Executor", "actorserve.actors.sampler:Sampler")
"""Who runs the model, and who draws."""
STUB: Final = ("actorserve.actors.stub_executor:StubExecutor", "actorserve.actors.stub_executor:StubSampler")
HANDED: Final = "handed"
"""context.files of a bridge: where the gate's connections come, as descriptors with a bridge.Handed each."""
MEETING_POINT: Final = "meeting_point"
"""context.files of the gate: the listening socket. Beside it, by the name of each scheduler elsewhere, the way to its
bridge."""
MEETING: Final = "meeting"
"""context.files: a listening socket on this machine, the same for all nodes of a group and all their lives."""
BIG_LANE = 4 << 20
"""Bytes of the lanes that carry prompts and batches."""


@dataclass(frozen=True)
class ActorSpec:
    """An actor: its name and its class as "module:Class" (unused if the node is attached)."""

    name: str
    class_path: str = ""


@dataclass(frozen=True)
class NodeSpec:
    """One loop with its actors. `process`: a fresh interpreter; `inline`: in the supervisor's trio loop; `attached`:
    whoever joins through a control socket (Supervisor.attach)."""

    name: str
    actors: tuple[ActorSpec, ...]
    kind: Kind = "process"
    group: str | None = None
    """Nodes of one group restart together, and have a socket to meet at (MEETING)."""
    files: Mapping[str, int] = field(default_factory=dict)
    """Open descriptors that the actors get as context.files; they stay the caller's."""
    front: bool = False
    """Requests come in here: it stops before the others."""
    start_seconds: float = 120.0
    """Without a word of progress for this long, a starting node is killed."""
    away: bool = False
    """It needs another machine: nobody waits for it at the start, and its deaths are not counted."""


@dataclass(frozen=True)
class LaneSpec:
    """One direction. `capacity` in bytes, a power of two; without meaning inside a node."""

    source: str
    target: str
    capacity: int = DEFAULT_CAPACITY


@dataclass(frozen=True)
class Topology:
    """Nodes in the order in which they depend on each other (stopped in reverse), and their lanes."""

    nodes: tuple[NodeSpec, ...]
    lanes: tuple[LaneSpec, ...]

    def __post_init__(self) -> None:
        actors = [actor.name for node in self.nodes for actor in node.actors]
        if len(set(actors)) != len(actors) or len({node.name for node in self.nodes}) != len(self.nodes):
            raise ValueError("two nodes or actors of one name")
        if len({(lane.source, lane.target) for lane in self.lanes}) != len(self.lanes):
            raise ValueError("two lanes of one direction")
        for lane in self.lanes:
            if lane.source == lane.target or lane.source not in actors or lane.target not in actors:
                raise ValueError(f"lane {lane.source} -> {lane.target} does not join two actors")

    def between(self, one: NodeSpec, other: NodeSpec) -> list[LaneSpec]:
        """The lanes from or to each other; for a node and itself those inside."""
        left, right = {actor.name for actor in one.actors}, {actor.name for actor in other.actors}
        return [
            lane
            for lane in self.lanes
            if (lane.source in left and lane.target in right) or (lane.source in right and lane.target in left)
        ]


def http_front(index: int, listen: int) -> NodeSpec:
    """The node of an HTTP front: actor "front.<index>", which gets the listening socket as files["listen"]."""
    name = f"front.{index}"
    return NodeSpec(name, (ActorSpec(name, "actorserve.http.front:HttpFront"),), files={"listen": listen}, front=True)


def attached_client(name: str = "client") -> NodeSpec:
    """The node of an embedded client: an actor of that name, in whoever holds the other end of its socket."""
    return NodeSpec(name, (ActorSpec(name),), kind="attached", front=True)


def replica_of(actor: str) -> int:
    """The number of the replica that an actor belongs to: the D of "sched.D" and "exec.D.R"; 0 where there is one."""
    kind, *numbers = actor.split(".")
    return int(numbers[0]) if len(numbers) > (kind != "sched") else 0


def rank_of(executor: str) -> int:
    """An executor's tensor parallel rank: the R of "exec.R" and "exec.D.R"."""
    return int(executor.rpartition(".")[2])


def schedulers_among(actors: Iterable[str]) -> list[str]:
    """The schedulers, by their replicas."""
    return sorted((name for name in actors if name.partition(".")[0] == "sched"), key=replica_of)


@dataclass(frozen=True)
class MeetingPoint:
    """What the head needs where there are several machines; the descriptors stay the caller's."""

    listen: int
    """The socket that the others connect to."""
    channels: Mapping[int, tuple[int, int]]
    """By replica on another machine: a pair of datagram sockets, from the gate to the replica's bridge."""


def _elsewhere(config: EngineConfig, point: MeetingPoint) -> tuple[list[NodeSpec], list[LaneSpec]]:
    """The stand-ins of the schedulers that are on other machines, and the gate."""
    nodes, lanes = [], []
    for number, (_, receives) in point.channels.items():
        name = f"sched.{number}"
        actor = ActorSpec(name, "actorserve.actors.bridge:Bridge")
        nodes.append(NodeSpec(name, (actor,), files={HANDED: receives}, start_seconds=math.inf, away=True))
        lanes += _lanes_of(name, config)
    files = {f"sched.{number}": sends for number, (sends, _) in point.channels.items()}
    gate = ActorSpec("gate", "actorserve.actors.gate:Gate")
    return [NodeSpec("gate", (gate,), files={**files, MEETING_POINT: point.listen}), *nodes], lanes


def _lanes_of(sched: str, config: EngineConfig) -> list[LaneSpec]:
    """A scheduler's lanes to and from text and fsm."""
    peers = ["text"] if config.skip_tokenizer_init else ["text", "fsm"]  # nobody else knows what tokens spell
    ends = [ends for peer in peers for ends in ((peer, sched), (sched, peer))]
    return [LaneSpec(source, target, BIG_LANE) for source, target in ends]


def member_topology(config: EngineConfig, replica: int) -> Topology:
    """One replica on a machine that is not the head: the link is there what text and fsm are on the head."""
    executors, scheduler, lanes = _replica(config, replica)
    link = "actorserve.actors.link:"
    actors = [ActorSpec("text", link + "Link")]
    if not config.skip_tokenizer_init:
        actors.append(ActorSpec("fsm", link + "LinkedFsm"))
    joined = NodeSpec(f"link.{replica}", tuple(actors), front=True, start_seconds=math.inf, away=True)
    return Topology((*executors, scheduler, joined), tuple(lanes))


def _replica(config: EngineConfig, number: int) -> tuple[list[NodeSpec], NodeSpec, list[LaneSpec]]:
    """One scheduler and the executors that are its own: their nodes, its node, and the lanes between them."""
    executor, sampler = STUB if config.load_format == "stub" else MODEL
    place = f".{number}" if config.dp_size > 1 else ""
    sched, first, draws = f"sched{place}", f"exec{place}.0", f"sampler{place}.0"
    # Rank 0 draws for all tensor parallel ranks. A stub has no model to share.
    ranks = 1 if config.load_format == "stub" else config.tp_size
    followers = [f"exec{place}.{rank}" for rank in range(1, ranks)]
    group = f"executors{place}"
    executors = [
        NodeSpec(first, (ActorSpec(first, executor), ActorSpec(draws, sampler)), group=group),
        *(NodeSpec(name, (ActorSpec(name, executor),), group=group) for name in followers),
    ]
    lanes = [
        *_lanes_of(sched, config),
        LaneSpec(first, sched, BIG_LANE),
        LaneSpec(sched, first, BIG_LANE),
        LaneSpec(sched, draws, BIG_LANE),
        *(LaneSpec(first, name, BIG_LANE) for name in followers),
    ]
    return executors, NodeSpec(sched, (ActorSpec(sched, "actorserve.actors.scheduler:Scheduler"),)), lanes


def engine_topology(
    config: EngineConfig,
    fronts: Iterable[NodeSpec],
    placement: Literal["process", "inline"] | None = None,
    point: MeetingPoint | None = None,
) -> Topology:
    """The engine of the configuration with these fronts (`http_front`, `attached_client`), each of one actor.

    `placement` (default: the configuration's) moves text, schedulers, fsm and executors between processes of their own
    and one node "engine" in the supervisor's loop. Fronts are what they are in both. `point`: where the other machines
    join, if there are any.
    """
    front_nodes = tuple(fronts)
    replicas = [_replica(config, number) for number in config.replicas_here]
    executors = [node for nodes, _, _ in replicas for node in nodes]
    schedulers = [node for _, node, _ in replicas]
    fsm = [] if config.skip_tokenizer_init else [NodeSpec("fsm", (ActorSpec("fsm", "actorserve.actors.fsm:Fsm"),))]
    elsewhere, bridges = ([], []) if point is None else _elsewhere(config, point)
    text = NodeSpec("text", (ActorSpec("text", "actorserve.actors.text:Text"),))
    nodes = (*executors, *fsm, *schedulers, *elsewhere, text)
    if (placement or config.placement) == "inline":
        if len(executors) > 1:
            raise ValueError("executors wait for each other or for a device, so that they need processes of their own")
        nodes = (NodeSpec("engine", tuple(actor for node in nodes for actor in node.actors), kind="inline"),)
    lanes = [lane for _, _, lanes in replicas for lane in lanes] + bridges
    for node in front_nodes:
        for actor in node.actors:
            lanes += [LaneSpec(actor.name, "text", BIG_LANE), LaneSpec("text", actor.name, BIG_LANE)]
    return Topology((*nodes, *front_nodes), tuple(lanes))
