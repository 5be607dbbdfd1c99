"""The executor: the actor that owns one device, its weights and its KV pages, and runs windows of k steps.

It takes Plans from the scheduler in order, applies their deltas and launches their steps: forward, draw, advance. The
tokens of each step are published as soon as they are on the host (StepOut), so clients stream every token although
scheduling happens once a window. On a GPU a window is launched whole while the one before still runs; a thread waits
for the device and wakes the actor. Invariant: it holds nothing that the scheduler could not send again.

With tensor parallel ranks (--tp-size) each is an executor, rank 0 is the one that the scheduler knows, and hands its
plans on to the others: so all have the same, whenever who dies. A step's work must then be the same on all ranks, and
depend on nothing but plans: see `decoding`.
"""

import contextlib
import time
from collections import deque
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Final, Literal

import msgspec
import numpy as np
import torch
import trio
from msgspec.structs import replace

from ..config import EngineConfig
from ..errors import ActorserveError, RequestError, StartupError
from ..models.decoder import Decoder
from ..models.dtypes import DTYPES
from ..models.gguf import KEPT_FILE
from ..models.group import DistributedGroup
from ..models.image_features import ImageFeatures, image_features
from ..models.kv_cache import KVCache, kv_dtype
from ..models.kv_checksums import KVChecksums
from ..models.parallel import RankDrawer
from ..models.pooler import Pooler
from ..models.runner import ChunkWork, Runner
from ..models.stepper import Drawer, Stepper
from ..models.vision import VisionTower
from ..models.weights import load_decoder, pick_device
from .actor import Actor, Context
from .desk import NOBODY
from .device_waiter import DeviceWaiter
from .malloc import keep_freed_memory
from .memory import batch_slots, kv_pages
from .messages import (
    NOTHING,
    Carried,
    ChunkEnd,
    Drain,
    DropImage,
    ExecutorInbox,
    ExecutorReady,
    Forget,
    ImagePixels,
    Instruct,
    PeerDown,
    PeerUp,
    Plan,
    StepOut,
)
from .profiler import ProfileOptions, Profiler
from .ref import Gone
from .sampler import Sampler
from .step_messages import Launched, pooled_of, scores_of, step_out
from .topology import MEETING, rank_of, replica_of, schedulers_among

COMPILER_SECONDS: Final = 5.0


def ints(view: memoryview) -> np.ndarray:
    """Return an int32 array over a message's bytes (valid as long as the message)."""
    return np.frombuffer(view, dtype=np.int32)


class Executor(Actor):
    """See the module's text."""

    inbox_type: ClassVar[Any] = ExecutorInbox

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self.rank = rank_of(context.name)
        here = context.config.replicas_here.start
        self.place = (replica_of(context.name) - here) * context.config.tp_size + self.rank
        """Among all executors of this machine; on GPUs its device's number."""
        self.scheduler = next(iter(schedulers_among(context.peers())), "")
        """Its name, if this is rank 0."""
        self.followers = [name for name in context.peers() if name.startswith("exec.")]
        """The other ranks, if this is rank 0."""
        self.up: set[str] = set()
        """Those and the scheduler, as far as they are up."""
        self.group: DistributedGroup | None = None
        self.runner: Runner | None = None
        self.sampler: Sampler | None = None
        self.drawer: Drawer | None = None
        self.stepper: Stepper | None = None
        self.ready: ExecutorReady | None = None
        self.images: ImageFeatures | None = None
        """Of a vision-language model."""
        self.rid_of: dict[int, int] = {}
        self.decoding: list[int] = []
        """Slots that draw in each step, in the order in which they joined; on a GPU some of them may be done. Who is
        done leaves when its step is on the host; on ranks that would know it at different times, with its release."""
        self.launched: deque[Launched] = deque()
        self.waiter: DeviceWaiter | None = None
        self.checksums: KVChecksums | None = None
        self.profiler = Profiler(context.config.profile_dir, context.name)
        self.loaded: tuple[str, Decoder] | None = None
        """Weights beside those in use, and their folder."""
        self.waiting = False
        """For other ranks, while starting."""
        self.schedulers_lost = 0
        """How many died: weights that were loaded for one of them are of no use to the next."""
        self.threads = cpu_threads(context.config)
        self._last_done_ns = 0

    async def start(self) -> None:
        """Load the weights, size the KV pool, and prepare the device."""
        torch.set_num_threads(self.threads)  # of this thread, which runs the steps; _load's has a number of its own
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._tell_of_compilers)
            await trio.to_thread.run_sync(self._prepare)
            nursery.cancel_scope.cancel()
        assert self.stepper is not None
        enter(self.stepper.device)
        if not self.stepper.exact:
            self.waiter = DeviceWaiter()
            self.stepper.on_launch(self.waiter.add)
            self.context.inbox.watch(self.waiter.fileno(), self)

    async def _tell_of_compilers(self) -> None:
        """While compilers run for us, minutes for a library's kernels, the start is not stuck."""
        while True:
            await trio.sleep(COMPILER_SECONDS)
            if await trio.to_thread.run_sync(has_children):
                self.context.report("compiling kernels (once)", 1.0)
            elif self.waiting:
                self.context.report("waiting for the other ranks", 1.0)

    def _sampler(self) -> Sampler:
        sampler = self.context.local(self.context.name.replace("exec.", "sampler."))
        assert isinstance(sampler, Sampler)
        return sampler

    def _prepare(self) -> None:
        config, model = self.context.config, self.context.model
        decoder = self._load()
        device = decoder.device
        image_token_bytes = 0
        if model.image_token_id is not None:
            dummy = config.load_format == "dummy"
            self.images = image_features(VisionTower(Path(model.path), device, decoder.dtype, dummy))
            image_token_bytes = decoder.spec.hidden * decoder.dtype.itemsize
        slots = batch_slots(config, device.type)
        self.drawer = self._drawer(slots, decoder)  # before what is free is measured
        pages = self._agreed(kv_pages(config, decoder, model))
        per_slot = min(pages, -(-model.context_length // config.page_size))
        dtype = kv_dtype(config, decoder.dtype)
        kv = KVCache(decoder.spec, pages + 1, config.page_size, device, dtype, decoder.dtype)
        self._make_runner(decoder, kv, slots, per_slot)
        if config.kv_checksums:
            if device.type != "cpu":
                raise StartupError("--kv-checksums is for a CPU: a GPU's steps run ahead of who could check them")
            self.checksums = KVChecksums(kv)
        kind: Literal["cpu", "cuda"] = "cuda" if device.type == "cuda" else "cpu"
        self.ready = ExecutorReady(pages, slots, per_slot, kind, image_token_bytes=image_token_bytes)

    def _make_runner(self, decoder: Decoder, kv: KVCache, slots: int, per_slot: int) -> None:
        assert self.drawer is not None
        self.runner = Runner(decoder, kv, slots, per_slot)
        pooling = self.context.model.pooling
        pooler = None if pooling is None else Pooler(pooling, decoder, slots)
        graphs = self._graphs(self.runner, self.drawer, slots) if pooler is None else None
        self.stepper = Stepper(self.runner, self.drawer, graphs, pooler)

    def _drawer(self, slots: int, decoder: Decoder) -> Drawer:
        """What draws: the sampler, and on other ranks than 0 what it tells them."""
        if self.rank == 0:
            self.sampler = self._sampler()
            if self.context.model.pooling is None:
                self.sampler.prepare(slots, decoder.whole.vocab, self.context.model.eos_ids, decoder.device)
            else:
                self.sampler.prepare(slots, 1, (), decoder.device)  # it draws nothing
            if self.group is None:
                return self.sampler
        assert self.group is not None
        return RankDrawer(self.sampler, self.group)

    def _agreed(self, pages: int) -> int:
        """As many pages as the rank with the fewest has."""
        if self.group is None:
            return pages
        self.waiting = True
        pages = self.group.least(pages)
        self.waiting = False
        return pages

    def _graphs(self, runner: Runner, drawer: Drawer, slots: int) -> Any:
        config = self.context.config
        if runner.exact or config.disable_cuda_graph:
            return None  # a CPU's steps are none, nor are those that the host plans before each
        from ..models.graphs import StepGraphs

        return StepGraphs(runner, drawer, min(slots, config.cuda_graph_max_bs or slots))

    def _load(self) -> Decoder:
        config, model = self.context.config, self.context.model
        torch.set_num_threads(self.threads)
        keep_freed_memory()
        device = pick_device(config.device, self.place, config.executors)
        enter(device)
        if config.tp_size > 1:
            self.waiting = True
            self.group = DistributedGroup(self.context.files[MEETING], self.rank, config.tp_size, device)
            self.waiting = False
        progress = partial(self.context.report, "weights")
        return load_decoder(model.path, config, progress, model.pooling, self.group, device)

    # ------------------------------------------------------------------ messages

    async def run(self) -> None:
        """Take plans and run them; publish what is ready; while idle, capture graphs for later."""
        inbox = self.context.inbox
        while True:
            item = inbox.poll()
            if item is not None:
                message, source = item
                if isinstance(message, Plan):
                    if self._hand_on(message):
                        await self._run_window(message)
                else:
                    self.receive(message, source)
            elif self.launched or not self._prepare_ahead():
                await inbox.wait()
            else:
                await trio.lowlevel.checkpoint()

    def receive(self, message: Any, source: str) -> None:
        """Greet a scheduler that comes up, once all ranks are; forget the batch of one that died."""
        match message:
            case PeerUp(name=name):
                self.up.add(name)
                if self.up.issuperset((self.scheduler, *self.followers)):
                    assert self.ready is not None
                    self._publish(self.ready)
            case PeerDown(name=name):
                self.up.discard(name)
                if name == self.scheduler:
                    self.schedulers_lost += 1
                    self.loaded = None
                    self._forget()
                    self._hand_on(Forget())
            case Forget():
                self._forget()
            case Instruct(task="swap_weights"):
                self._swap_weights()  # before the plans behind it
                self._publish(Carried(message.rid, message.task))
            case Instruct():
                self.context.nursery.start_soon(self._instructed, message)
            case ImagePixels():
                assert self.images is not None
                self.images.take(message)
                self._hand_on(message)
            case DropImage():
                assert self.images is not None
                self.images.drop(message.image)
                self._hand_on(message)
            case Drain():
                pass  # only the scheduler's life matters here

    def _forget(self) -> None:
        self.rid_of.clear()
        self.decoding.clear()
        self.launched.clear()
        if self.images is not None:
            self.images.clear()

    def _hand_on(self, message: Plan | Forget | ImagePixels | DropImage) -> bool:
        """Send a message to the other ranks; False if one is down: then we are about to be killed, too."""
        try:
            for name in self.followers:
                self.context.ref(name).post(message)
        except Gone:
            return False
        return True

    def pump(self) -> bool:
        """Called by the inbox when the waiter's descriptor is readable."""
        assert self.waiter is not None
        self.waiter.check()
        self._publish_ready()
        return False

    def _prepare_ahead(self) -> bool:
        """Capture one more graph; False when there is nothing to do. Not before the first request had its turn."""
        return bool(self.rid_of) and self.stepper is not None and self.stepper.prepare_ahead()

    # ------------------------------------------------------------------ beside windows

    async def _instructed(self, m: Instruct) -> None:
        """Do what the scheduler asks beside windows, and say what came of it."""
        text, lost = "", self.schedulers_lost
        try:
            if m.task == "start_profile":
                self.profiler.start(msgspec.json.decode(m.detail or "{}", type=ProfileOptions))
            elif m.task == "stop_profile":
                text = await self.profiler.stop()
            else:
                loaded = await trio.to_thread.run_sync(self._load_beside, m.detail)
                if lost != self.schedulers_lost:
                    return  # the next one asks again
                self.loaded = loaded
        except ActorserveError as error:
            status = 400 if isinstance(error, StartupError) else error.status
            param = "model_path" if isinstance(error, StartupError) else error.param
            self._publish(Carried(m.rid, m.task, error.message, status, error.code, param))
        else:
            self._publish(Carried(m.rid, m.task, text))

    def _load_beside(self, folder: str) -> tuple[str, Decoder]:
        """Load weights of the model's shapes; both are in memory until they are swapped. Raises StartupError."""
        assert self.runner is not None
        if self.group is not None:
            raise StartupError("weights cannot be exchanged with --tp-size above 1 yet")
        if self.images is not None:
            raise StartupError("the weights of a vision-language model cannot be exchanged while it runs")
        now = self.runner.decoder
        enter(now.device)  # this thread, too
        config = replace(self.context.config, model=folder, load_format="auto")
        if not (Path(folder) / KEPT_FILE).exists():
            name = next(name for name, dtype in DTYPES.items() if dtype == now.dtype)
            config = replace(config, dtype=name)
        try:
            pooling = self.context.model.pooling
            decoder = load_decoder(folder, config, lambda fraction: None, pooling, device=now.device)
        except torch.OutOfMemoryError:
            raise StartupError("there is no memory for a second set of weights") from None
        if decoder.spec != now.spec or decoder.dtype != now.dtype:
            raise StartupError("these weights are of another model: config.json has other shapes or settings")
        return folder, decoder

    def _swap_weights(self) -> None:
        """Run the loaded weights over the same pages, from an empty batch."""
        assert self.loaded is not None and self.runner is not None and self.ready is not None
        (folder, decoder), self.loaded = self.loaded, None
        if decoder.device.type == "cuda":
            torch.cuda.synchronize()
        self._forget()
        self._make_runner(decoder, self.runner.kv, self.ready.max_slots, self.ready.max_pages_per_slot)
        assert self.stepper is not None
        if self.waiter is not None:
            self.stepper.on_launch(self.waiter.add)
        self.ready = replace(self.ready, weights=folder)

    def _publish(self, message: ExecutorReady | StepOut | Carried) -> None:
        if self.rank:
            return
        try:
            self.context.ref(self.scheduler).post(message)
        except Gone:
            return  # the next scheduler starts from nothing

    # ------------------------------------------------------------------ a window

    async def _run_window(self, plan: Plan) -> None:
        assert self.stepper is not None
        chunks = self._apply(plan)
        once = set(ints(plan.once_slots).tolist())
        for number in range(plan.k):
            work = chunks if number == 0 else []
            chunked = {c.slot for c in work}
            if work:  # a slot that jumps has its chunk instead of a row
                self.decoding = [s for s in self.decoding if s not in chunked]
            rows = self.decoding if number else [*self.decoding, *sorted(once - chunked)]
            started = time.perf_counter_ns()
            # Where the scheduler dies with us (placement inline), only this says what it was of.
            self.context.desk.now(next(iter(self.rid_of.values())) if len(self.rid_of) == 1 else NOBODY)
            step = self.stepper.launch(np.array(rows, dtype=np.int64), work)
            self.context.desk.rest()
            if self.checksums is not None and self.runner is not None:
                self.checksums.written(self.runner.written_slots(np.array(rows, dtype=np.int64), work))
            rids = np.array([self.rid_of[s] for s in step.slots.tolist()], dtype=np.int64)
            self.launched.append(Launched(plan.window, number, rids, step, started))
            self.decoding += [c.slot for c in work if c.draws and c.slot not in once]
            self._publish_ready()
            await trio.lowlevel.checkpoint()
        if self.profiler.ran(plan.k):
            self.context.nursery.start_soon(self._end_profile)

    async def _end_profile(self) -> None:
        try:
            self.context.log.info("profile written: %s", await self.profiler.stop())
        except RequestError as error:
            if error.code != "not_profiling":  # that it was stopped in the same moment
                self.context.log.warning("no profile: %s", error.message)

    def _apply(self, plan: Plan) -> list[ChunkWork]:
        """Change the batch by the plan's deltas, in the order of its fields; return its chunks."""
        runner, sampler = self.runner, self.sampler
        assert runner is not None
        released = set(ints(plan.release).tolist())
        if released:
            self.decoding = [s for s in self.decoding if s not in released]
        if len(plan.copies):
            runner.kv.copy_pages(ints(plan.copies).reshape(-1, 3))
            if self.checksums is not None:
                self.checksums.copied(ints(plan.copies).reshape(-1, 3))
        for a in plan.admits:
            self.rid_of[a.slot] = a.rid
            shift = 0 if self.images is None else self.images.admit(a.slot, a.images)
            runner.admit(a.slot, ints(a.pages), a.cached, a.limit, shift, a.second)
            if self.checksums is not None:
                self.checksums.verify(ints(a.pages), a.cached)
        if sampler is not None:
            sampler.sync(plan.window, plan.sampler_changes)
        runner.slots.grow(ints(plan.grow_slots), ints(plan.grow_pages))
        runner.slots.flush()
        slots, lengths, last = ints(plan.chunk_slots), ints(plan.chunk_lengths), ints(plan.chunk_last)
        parts = np.split(ints(plan.chunk_ids), np.cumsum(lengths)[:-1]) if len(lengths) else []
        work = zip(slots.tolist(), ints(plan.chunk_starts).tolist(), parts, last.tolist(), strict=True)
        chunks = [
            ChunkWork(slot, start, ids, draws=end == ChunkEnd.DRAW, ends=end == ChunkEnd.POOL)
            for slot, start, ids, end in work
        ]
        if len(plan.chunk_scored):
            targets = np.split(ints(plan.score_ids), np.cumsum(ints(plan.chunk_scored))[:-1])
            for chunk, score_from, wanted in zip(chunks, ints(plan.score_starts).tolist(), targets, strict=True):
                chunk.score_from, chunk.targets = score_from, wanted
        if self.images is not None:
            self.images.apply(chunks)
        return chunks

    @property
    def leaves_at_once(self) -> bool:
        """Whether who is done leaves the batch when that is known; see `decoding`."""
        assert self.stepper is not None
        return self.group is None or self.stepper.exact

    def _publish_ready(self) -> None:
        while self.launched and self.launched[0].step.ready:
            self._publish_step(self.launched.popleft())

    def _publish_step(self, item: Launched) -> None:
        """Send a step's tokens; rows that finished leave the batch."""
        step = item.step
        took = step.done_ns - max(item.launched_ns, self._last_done_ns)
        self._last_done_ns = step.done_ns
        rows = step.rows()
        if rows is None:
            scores = scores_of(step.scores)
            rest = (NOTHING, NOTHING, NOTHING, NOTHING, 0, NOTHING, NOTHING, took, scores)
            self._publish(StepOut(item.window, item.number, *rest, pooled=pooled_of(item)))
            return
        rids = item.rids[rows.live]
        if rows.finish.any() and self.leaves_at_once:
            done = rows.finish != 0
            finished = dict(zip(rows.slots[done].tolist(), rids[done].tolist(), strict=True))
            # A slot that was given to another request meanwhile goes on.
            self.decoding = [s for s in self.decoding if s not in finished or self.rid_of[s] != finished[s]]
        self._publish(step_out(item, rids, rows, took))


def has_children() -> bool:
    """Whether this process has child processes (Linux)."""
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(OSError):  # a thread that ended meanwhile
            if task.joinpath("children").read_text().strip():
                return True
    return False


def cpu_threads(config: EngineConfig) -> int:
    """Threads for an executor's work; more than cores make each other wait, so executors share them."""
    return config.cpu_threads or max(1, torch.get_num_threads() // config.executors)


def enter(device: torch.device) -> None:
    """Let this thread launch kernels on the device of a rank."""
    if device.index is not None:
        torch.cuda.set_device(device)
