"""What the engine is made of: which actors, in which nodes, joined by which lanes. Data only; imports no actor.

The command line and the embedded API build a Topology with `engine_topology` and hand it to the supervisor. A node is
one loop with one or more actors: a process, a place in the supervisor's own loop, or a guest that attaches itself.
Invariant: names are unique, each lane joins two actors of the topology, at most one lane per direction.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final, Literal

from ..config import EngineConfig
from .lane import DEFAULT_CAPACITY

Kind = Literal["process", "inline", "attached"]
MODEL: Final = ("actorserve.actors.executor:Executor", "actorserve.actors.sampler:Sampler")
"""Who runs the model, and who draws."""
STUB: Final = ("actorserve.actors.stub_executor:StubExecutor", "actorserve.actors.stub_executor:StubSampler")
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


def engine_topology(
    config: EngineConfig,
    fronts: Iterable[NodeSpec],
    placement: Literal["process", "inline"] | None = None,
) -> Topology:
    """The engine of the configuration with these fronts (`http_front`, `attached_client`), each of one actor.

    `placement` (default: the configuration's) moves text, scheduler, fsm and executors between processes of their own
    and one node "engine" in the supervisor's loop. Fronts are what they are in both.
    """
    front_nodes = tuple(fronts)
    executor, sampler = STUB if config.load_format == "stub" else MODEL
    # Rank 0 draws for all tensor parallel ranks. A stub has no model to share.
    leader = (ActorSpec("exec.0", executor), ActorSpec("sampler.0", sampler))
    followers = () if config.load_format == "stub" else tuple(f"exec.{rank}" for rank in range(1, config.tp_size))
    sched = ActorSpec("sched", "actorserve.actors.scheduler:Scheduler")
    text = ActorSpec("text", "actorserve.actors.text:Text")
    # Without a tokenizer nobody knows what tokens spell: there are no grammars.
    fsm = () if config.skip_tokenizer_init else (ActorSpec("fsm", "actorserve.actors.fsm:Fsm"),)
    if (placement or config.placement) == "inline":
        if followers:
            raise ValueError("ranks wait for each other, so that they need processes of their own")
        nodes: tuple[NodeSpec, ...] = (NodeSpec("engine", (*leader, *fsm, sched, text), kind="inline"),)
    else:
        nodes = (
            NodeSpec("exec.0", leader, group="executors"),
            *(NodeSpec(name, (ActorSpec(name, executor),), group="executors") for name in followers),
            *(NodeSpec(actor.name, (actor,)) for actor in fsm),
            NodeSpec("sched", (sched,)),
            NodeSpec("text", (text,)),
        )
    lanes = [
        LaneSpec("text", "sched", BIG_LANE),
        LaneSpec("sched", "text", BIG_LANE),
        LaneSpec("exec.0", "sched", BIG_LANE),
        LaneSpec("sched", "exec.0", BIG_LANE),
        LaneSpec("sched", "sampler.0", BIG_LANE),
        *(LaneSpec("exec.0", name, BIG_LANE) for name in followers),
    ]
    for actor in fsm:
        lanes += [LaneSpec("sched", actor.name, BIG_LANE), LaneSpec(actor.name, "sched", BIG_LANE)]
    for node in front_nodes:
        for actor in node.actors:
            lanes += [LaneSpec(actor.name, "text", BIG_LANE), LaneSpec("text", actor.name, BIG_LANE)]
    return Topology((*nodes, *front_nodes), tuple(lanes))
