"""Starts the nodes of a topology, joins them by lanes, and keeps them alive: the root of a running engine.

The command line and the embedded API run one Supervisor in a trio loop. Each node has a life (one incarnation, see
life.py): it says Hello, gets Boot, reports Progress and Ready; then each pair of ready neighbours gets fresh lanes.
When a life ends, the neighbours are told in the same step, and a new one begins after a pause. Invariant: no child
outlives `run`, whatever ends it, and a lane is never given to a second incarnation.

Children die with the *thread* that spawned them (PR_SET_PDEATHSIG), so `run` must be in a thread that lives as long
as the engine: the main thread, or one made for it, never a worker from a pool (trio's end after 10 idle seconds).
"""

import contextlib
import logging
import os
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass

import trio
from msgspec.structs import replace

from ..config import EngineConfig, ModelInfo
from ..errors import StartupError
from . import ring
from .control import (
    ActorBoot,
    Boot,
    ControlClosed,
    ControlMessage,
    ControlSocket,
    Corrupt,
    Down,
    DrainUntil,
    Failed,
    Hello,
    LaneEnd,
    Ping,
    Pong,
    Progress,
    Ready,
    Stop,
    Stopped,
    Stuck,
    Wire,
    supervisor_decoder,
)
from .desk import DESK, make_page, read_page
from .lane import LaneGauge, LaneMetrics, create_lane
from .life import AttachedLife, InlineLife, Life, MemoryKills, Node, NodeHealth, ProcessLife
from .topology import MEETING, NodeSpec, Topology

log = logging.getLogger("actorserve.supervisor")

QUICK_DRAIN = 0.4
"""Seconds that running requests have when nobody gave them any."""
WATCH_SECONDS = 0.2
"""Between two looks at who is stuck: it is killed within --hang-seconds and a little more than two of these."""
AWAY_PAUSE = 0.2
"""Seconds before the next life of a node that needs another machine."""
OnEvent = Callable[[str, str, str, float], None]
"""(kind, node, detail, fraction), called in the loop. Kinds: spawn; progress (detail "actor: stage", fraction 0 to 1);
ready; down (detail: the reason); hang; and for the whole engine, with an empty node: up, stopping, stopped."""


class GiveUp(Exception):
    """A node failed too often; the text ends with its last traceback."""


@dataclass(frozen=True)
class RestartPolicy:
    """More than `intensity` failures of a node in `period` seconds end the engine; before that it is restarted after
    `pause` seconds, `factor` times more for each of the last failures before that end, at most `longest`."""

    intensity: int = 3
    period: float = 60.0
    pause: float = 0.05
    factor: float = 4.0
    longest: float = 10.0

    def pause_after(self, failures: int) -> float:
        """Seconds before the next life of a node that failed so often lately."""
        return min(self.pause * self.factor ** max(0, failures + 2 - max(self.intensity, 3)), self.longest)


def _close_fds(descriptors: list[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)


class Supervisor:
    """`await nursery.start(supervisor.run)` returns when all nodes but the attached ones are ready and joined."""

    def __init__(
        self,
        topology: Topology,
        config: EngineConfig,
        model: ModelInfo,
        *,
        on_event: OnEvent | None = None,
        policy: RestartPolicy | None = None,
        grace: float = 2.0,
        codec: bool = False,
    ) -> None:
        """`grace`: seconds for an orderly end before SIGKILL. `codec`: local lanes encode and decode (tests)."""
        self.topology = topology
        self.config = config
        self.model = model
        self._on_event = on_event
        self._policy = policy or RestartPolicy(config.max_restarts)
        self._grace = grace
        self._codec = codec
        self._nodes = [Node(spec) for spec in topology.nodes]
        self._gauges: dict[tuple[str, str], LaneGauge] = {}
        self._meetings: dict[str, socket.socket] = {}
        """By group, made at need."""
        self._failure: Exception | None = None
        self._stopping = False
        self._drain = 0.0
        self._accused: list[Stuck] = []
        self._memory_kills = MemoryKills()
        self._end = trio.Event()
        self._all_ready = trio.Event()
        self._token: trio.lowlevel.TrioToken | None = None

    # ------------------------------------------------------------------ for the owner

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Run the engine until `request_stop`, then stop it in order and return.

        Raises StartupError if an actor raised that before its node was ever ready, GiveUp if a node failed too often.
        Cancelled: all nodes are killed.
        """
        self._token = trio.lowlevel.current_trio_token()
        ring.types()  # compiled here once, and not in each node at the same time
        try:
            async with trio.open_nursery() as nursery:
                for node in self._nodes:
                    nursery.start_soon(self._keep_alive, node)
                nursery.start_soon(self._watch_hangs)
                nursery.start_soon(self._tell_up, task_status)
                await self._end.wait()
                await self._shut_down()
                nursery.cancel_scope.cancel()
        finally:
            self._close()
        self._event("stopped")
        if self._failure is not None:
            raise self._failure

    def request_stop(self, drain: float = 0.0) -> None:
        """Let `run` stop the engine in order. From any thread or signal handler; again: no effect.

        `drain`: seconds that running requests have to end; new ones are refused meanwhile.
        """
        if not self._end.is_set():
            self._drain = drain
        self._in_loop(self._end.set)

    def attach(self, name: str, sock: socket.socket) -> None:
        """Give the attached node `name` a guest: our end of a SOCK_SEQPACKET pair, owned by the supervisor from now
        on. From any thread, also before `run`. While an earlier guest is there the new one waits."""
        node = next((node for node in self._nodes if node.spec.name == name), None)
        if node is None or node.spec.kind != "attached":
            raise ValueError(f"no attached node {name}")
        node.guests.append(ControlSocket(sock))
        self._in_loop(node.guest_came.set)

    def health(self) -> dict[str, NodeHealth]:
        """How each node is."""
        return {node.spec.name: node.health() for node in self._nodes}

    def lane_metrics(self) -> dict[tuple[str, str], LaneMetrics]:
        """(source, target) -> what the header page shows, for each connected lane between nodes. From the loop."""
        return {lane: gauge.read() for lane, gauge in self._gauges.items()}

    # ------------------------------------------------------------------ a node's lives

    async def _keep_alive(self, node: Node) -> None:
        while not self._stopping:
            try:
                life = await self._new_life(node)
            except OSError as error:
                node.begin(None)
                end = f"cannot be spawned: {error}"
            else:
                end = await self._live(node, life)
            if self._stopping or node.leaving:
                break
            node.last_error = node.why(end)
            if node.spec.kind != "attached" and not node.with_group:
                await self._failed(node)
        node.state = "stopped"
        node.stopped.set()

    async def _new_life(self, node: Node) -> Life:
        match node.spec.kind:
            case "process":
                return ProcessLife(node.spec.name)
            case "inline":
                return InlineLife()
            case "attached":
                while not node.guests:
                    node.guest_came = trio.Event()
                    await node.guest_came.wait()
                return AttachedLife(node.guests.popleft())

    async def _live(self, node: Node, life: Life) -> str:
        """From the beginning of a life to its end, whose reason is returned."""
        node.begin(life)
        node.desk = make_page()
        node.epoch += 1
        node.state = "starting"
        self._event("spawn", node)
        end = "cancelled"
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._listen, node, life)
                nursery.start_soon(self._expect_progress, node)
                end = await life.ended()
                nursery.cancel_scope.cancel()
            with contextlib.suppress(ControlClosed):
                self._hear(node, life)  # its last words
        finally:
            self._down(node, end)
            life.close()
            os.close(node.desk)
        return end

    async def _listen(self, node: Node, life: Life) -> None:
        try:
            while True:
                await trio.lowlevel.wait_readable(life.control.fileno())
                self._hear(node, life)
        except ControlClosed:
            await trio.sleep(life.linger)
            node.kill("closed its control socket")

    def _hear(self, node: Node, life: Life) -> None:
        while (item := life.control.receive(supervisor_decoder)) is not None:
            message, fds = item
            _close_fds(fds)  # nobody sends us any
            node.heard_at = time.monotonic()
            match message:
                case Hello():
                    node.greeted = True
                    self._boot(node)
                case Progress():
                    self._event("progress", node, f"{message.actor}: {message.stage}", message.fraction)
                case Ready():
                    self._ready(node)
                case Failed():
                    node.failed = message
                case Corrupt():
                    self._kill_corrupt(node, message)
                case Pong():
                    node.pinged = False
                case Stuck():
                    self._accused.append(message)
                case Stopped():
                    node.verdict = node.verdict or "left"

    async def _expect_progress(self, node: Node) -> None:
        limit = node.spec.start_seconds
        while node.state == "starting":
            left = node.heard_at + limit - time.monotonic()
            if left <= 0:
                await self._kill_stuck(node, f"no progress for {limit:g} s while starting")
                return
            await trio.sleep(left)

    async def _failed(self, node: Node) -> None:
        """Decide what follows from a failure: the engine's end, or a new life after a pause."""
        policy, now = self._policy, time.monotonic()
        failed, reason = node.failed, node.last_error
        trace = f"\n{failed.traceback}" if failed else ""
        if failed is not None and failed.startup_message is not None and (node.spec.away or not node.was_ready):
            await self._give_up(StartupError(failed.startup_message))
        if node.spec.away:  # another machine was lost: the next life waits for it
            log.warning("%s: %s", node.spec.name, reason)
            log.debug("%s", trace)
            await trio.sleep(AWAY_PAUSE)
            return
        node.failures.append(now)
        while node.failures[0] < now - policy.period:
            node.failures.popleft()
        count = len(node.failures)
        if count > policy.intensity:
            text = f"{node.spec.name} failed {count} times in {policy.period:g} s, at last: {reason}"
            await self._give_up(GiveUp(text + trace))
        log.error("%s is down (%s), restarting%s", node.spec.name, reason, trace)
        for other in self._nodes:
            if node.spec.group is not None and other is not node and other.spec.group == node.spec.group:
                other.with_group, other.outside = other.life is not None, not node.at_fault
                other.kill(f"restarts together with {node.spec.name}")
        await trio.sleep(policy.pause_after(count))

    async def _give_up(self, error: Exception) -> None:
        self._failure = self._failure or error
        self._end.set()
        await trio.sleep_forever()  # until run() cancels us

    # ------------------------------------------------------------------ lanes

    def _boot(self, node: Node) -> None:
        spec, lanes = node.spec, self.topology.lanes
        actors = [
            ActorBoot(actor.name, actor.class_path, [lane.target for lane in lanes if lane.source == actor.name])
            for actor in spec.actors
        ]
        inside = [(lane.source, lane.target) for lane in self.topology.between(spec, spec)]
        files = {**self._files(spec), DESK: node.desk}
        config = self.config if "listen" in spec.files else replace(self.config, api_key=None, api_key_file=None)
        boot = Boot(spec.name, node.epoch, actors, inside, self._codec, list(files), config, self.model)
        self._tell(node, boot, list(files.values()))

    def _files(self, spec: NodeSpec) -> dict[str, int]:
        """The descriptors that a node gets: its own, and its group's if it is not alone in it."""
        group = spec.group
        if group is None or sum(other.group == group for other in self.topology.nodes) == 1:
            return dict(spec.files)
        if group not in self._meetings:
            self._meetings[group] = socket.create_server(("127.0.0.1", 0))
        return {**spec.files, MEETING: self._meetings[group].fileno()}

    def _ready(self, node: Node) -> None:
        node.state = "running"
        node.was_ready = True
        self._event("ready", node)
        for other in self._nodes:
            if other is not node and other.state == "running":
                self._join(node, other)
        needed = [one for one in self._nodes if one.spec.kind != "attached" and not one.spec.away]
        if all(one.state == "running" for one in needed):
            self._all_ready.set()

    def _join(self, node: Node, other: Node) -> None:
        """Fresh lanes between two ready nodes. The sockets carry duplicates, so ours are closed at once."""
        lanes = self.topology.between(node.spec, other.spec)
        fds: list[int] = []
        try:
            for lane in lanes:
                made = create_lane(lane.capacity, node.epoch)
                fds.extend(made)
                self._gauges[lane.source, lane.target] = LaneGauge(made)
            for side, peer in ((node, other), (other, node)):
                ends = [
                    LaneEnd(lane.source, lane.target, True)
                    if side.has(lane.source)
                    else LaneEnd(lane.target, lane.source, False)
                    for lane in lanes
                ]
                if ends:
                    self._tell(side, Wire(peer.epoch, ends), fds)
        finally:
            _close_fds(fds)

    def _down(self, node: Node, end: str) -> None:
        """The end of a life: its lanes are gone, and the neighbours learn it now."""
        was_running = node.state == "running"
        node.life, life = None, node.life
        node.state = "down"
        assert life is not None
        if self._stopping:
            return
        reason, at_work = node.why(end), tuple(read_page(node.desk))
        node.judge(life, self._memory_kills.lately())
        self._event("down", node, reason)
        down = Down([actor.name for actor in node.spec.actors], node.epoch, reason, node.at_fault, at_work)
        for other in self._nodes:
            lanes = self.topology.between(node.spec, other.spec) if other is not node else []
            if was_running and lanes and other.state == "running":
                self._tell(other, down)
            for lane in lanes:
                gauge = self._gauges.pop((lane.source, lane.target), None)
                if gauge is not None:
                    gauge.close()

    def _tell(self, node: Node, message: ControlMessage, fds: list[int] | None = None) -> None:
        if node.life is None:
            return
        try:
            node.life.control.send(message, fds or ())
        except ControlClosed:
            return  # it is dying; its end is noticed elsewhere
        except BlockingIOError:
            node.kill("does not read its control socket")

    # ------------------------------------------------------------------ trouble

    def _kill_corrupt(self, node: Node, message: Corrupt) -> None:
        """A lane got garbage: whoever is at the other end of it starts afresh."""
        for other in self._nodes:
            if other.has(message.peer):
                other.kill(f"broke its lane with {message.actor}: {message.detail}")

    async def _kill_stuck(self, node: Node, verdict: str) -> None:
        life = node.life
        self._event("hang", node, verdict)
        if life is not None and node.greeted:
            life.dump_stacks()
            await trio.sleep(0.1)  # the stacks are written by a signal handler
        if node.life is life:
            node.kill(verdict)

    async def _watch_hangs(self) -> None:
        """Kill who is stuck for hang_seconds: takes no frames of its lanes, or answers no Ping; and who is accused."""
        limit = self.config.hang_seconds
        interval = min(WATCH_SECONDS, limit / 4)
        # Time that our own loop lost does not count: the node may have lost it too.
        stalled: dict[str, tuple[int, int, float]] = {}  # actor -> epoch, frames received, seconds without any
        silent: dict[str, tuple[int, float]] = {}  # node -> epoch, seconds since the Ping that it has not answered
        while True:
            await trio.sleep(interval)
            self._memory_kills.look()
            accused, self._accused = self._accused, []
            metrics = self.lane_metrics()
            for node in self._nodes:
                if node.state != "running" or node.life is None or not node.life.killable:
                    continue
                epoch, waited = silent.get(node.spec.name, (0, 0.0))
                waited = waited + interval if node.pinged and epoch == node.epoch else 0.0
                silent[node.spec.name] = (node.epoch, waited)
                verdict = f"{node.spec.name} did not react for {limit:g} s" if waited >= limit else None
                for actor in node.spec.actors:
                    lanes = [lane for (_, target), lane in metrics.items() if target == actor.name]
                    received = sum(lane.received for lane in lanes)
                    epoch, before, seconds = stalled.get(actor.name, (0, 0, 0.0))
                    stuck = any(lane.depth_frames for lane in lanes) and (epoch, before) == (node.epoch, received)
                    seconds = seconds + interval if stuck else 0.0
                    stalled[actor.name] = (node.epoch, received, seconds)
                    if seconds >= limit:
                        verdict = f"{actor.name} took no message for {limit:g} s"
                verdict = next((one.detail for one in accused if node.has(one.peer)), verdict)
                if verdict is not None:
                    await self._kill_stuck(node, verdict)
                elif not node.pinged:
                    node.pinged = True
                    self._tell(node, Ping())

    # ------------------------------------------------------------------ the end

    async def _shut_down(self) -> None:
        """Fronts first, when their requests have ended; they have the time to drain, during which the others are kept
        alive. Then each of these with half of the time that is left; what remains is killed by the cancellation."""
        self._event("stopping")
        drained = time.monotonic() + max(self._drain, QUICK_DRAIN)
        for node in self._nodes:
            if node.state == "running":
                self._tell(node, DrainUntil(int(drained * 1e9)))
        async with trio.open_nursery() as nursery:
            for node in self._nodes:
                if node.spec.front:
                    nursery.start_soon(self._stop, node, drained + self._grace / 2)
        self._stopping = True
        deadline = time.monotonic() + self._grace / 2
        for node in reversed(self._nodes):
            if not node.spec.front:
                now = time.monotonic()
                await self._stop(node, now + max(deadline - now, 0.0) / 2)

    async def _stop(self, node: Node, deadline: float) -> None:
        """Let a node end, until the deadline at most."""
        node.leaving = True
        if node.state != "running":
            node.kill("the engine stops")
            return
        seconds = max(deadline - time.monotonic(), 0.0)
        self._tell(node, Stop(seconds))
        with trio.move_on_after(seconds):
            await node.stopped.wait()

    def _close(self) -> None:
        for gauge in self._gauges.values():
            gauge.close()
        self._gauges.clear()
        for meeting in self._meetings.values():
            meeting.close()
        for node in self._nodes:
            node.state = "stopped"
            while node.guests:
                node.guests.popleft().close()

    # ------------------------------------------------------------------ small things

    async def _tell_up(self, task_status: trio.TaskStatus[None]) -> None:
        await self._all_ready.wait()
        self._event("up")
        task_status.started()

    def _event(self, kind: str, node: Node | None = None, detail: str = "", fraction: float = 0.0) -> None:
        if self._on_event is not None:
            self._on_event(kind, node.spec.name if node else "", detail, fraction)

    def _in_loop(self, call: Callable[[], None]) -> None:
        if self._token is None:
            call()
            return
        with contextlib.suppress(trio.RunFinishedError):
            self._token.run_sync_soon(call, idempotent=False)
