"""The executor: the actor that owns one device, its weights and its KV pages, and runs windows of k steps.

It takes Plans from the scheduler in order, applies their deltas and runs their steps: forward, draw, advance, with
the tokens of each step published at once (StepOut), so that clients stream every token although scheduling happens
once a window. Invariant: it holds nothing that the scheduler could not send again.
"""

import time
from typing import Any, ClassVar, Final, Literal

import numpy as np
import torch
import trio

from ..config import EngineConfig
from ..models.decoder import Decoder
from ..models.kv_cache import KVCache
from ..models.runner import ChunkWork, Runner
from ..models.weights import load_decoder
from ..sampler.reference import Sampled
from ..sampler.state import SamplerState
from .actor import Actor, Context
from .memory import batch_slots, keep_freed_memory, kv_pages
from .messages import Drain, ExecutorInbox, ExecutorReady, Finish, PeerDown, PeerUp, Plan, StepOut
from .ref import Gone
from .sampler import Sampler

NOTHING: Final = memoryview(b"")


def ints(view: memoryview) -> np.ndarray:
    """Return an int32 array over a message's bytes (valid as long as the message)."""
    return np.frombuffer(view, dtype=np.int32)


class Executor(Actor):
    """See the module's text."""

    inbox_type: ClassVar[Any] = ExecutorInbox

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self.runner: Runner | None = None
        self.sampler: Sampler | None = None
        self.ready: ExecutorReady | None = None
        self.rid_of: dict[int, int] = {}
        self.decoding: list[int] = []
        """Slots that draw in each step, in the order in which they joined."""

    async def start(self) -> None:
        """Load the weights, size the KV pool, and run one forward so that the first request finds all warm."""
        decoder = await trio.to_thread.run_sync(self._load)
        config = self.context.config
        pages = kv_pages(config, decoder, self.context.model)
        slots = batch_slots(config, decoder.device.type)
        per_slot = min(pages, -(-self.context.model.context_length // config.page_size))
        kv = KVCache(decoder.spec, pages, config.page_size, decoder.device, decoder.dtype)
        self.runner = Runner(decoder, kv, slots, per_slot, config.page_size)
        self.sampler = self._sampler()
        self.sampler.state = SamplerState(slots, decoder.spec.vocab, self.context.model.eos_ids, decoder.device)
        kind: Literal["cpu", "cuda"] = "cuda" if decoder.device.type == "cuda" else "cpu"
        self.ready = ExecutorReady(pages, slots, per_slot, kind)

    def _sampler(self) -> Sampler:
        sampler = self.context.local(self.context.name.replace("exec.", "sampler."))
        assert isinstance(sampler, Sampler)
        return sampler

    def _load(self) -> Decoder:
        set_threads(self.context.config)
        keep_freed_memory()
        config, path = self.context.config, self.context.model.path
        return load_decoder(path, config, lambda fraction: self.context.report("weights", fraction))

    async def run(self) -> None:
        """Take plans and run them; other messages are taken between windows."""
        inbox = self.context.inbox
        while True:
            item = inbox.poll()
            if item is None:
                await inbox.wait()
                continue
            message, source = item
            if isinstance(message, Plan):
                await self._run_window(message)
            else:
                self.receive(message, source)

    def receive(self, message: Any, source: str) -> None:
        """Greet a scheduler that comes up; forget the batch of one that died."""
        match message:
            case PeerUp(name="sched"):
                assert self.ready is not None
                self._publish(self.ready)
            case PeerDown(name="sched"):
                self.rid_of.clear()
                self.decoding.clear()
            case PeerUp() | PeerDown() | Drain():
                pass  # only the scheduler's life matters here

    def _publish(self, message: ExecutorReady | StepOut) -> None:
        try:
            self.context.ref("sched").post(message)
        except Gone:
            return  # the next scheduler starts from nothing

    # ------------------------------------------------------------------ a window

    async def _run_window(self, plan: Plan) -> None:
        chunks = self._apply(plan)
        for step in range(plan.k):
            started = time.perf_counter_ns()
            self._publish(self._step(plan.window, step, chunks if step == 0 else [], started))
            await trio.lowlevel.checkpoint()

    def _apply(self, plan: Plan) -> list[ChunkWork]:
        """Change the batch by the plan's deltas, in the order of its fields; return its chunks."""
        runner, sampler = self.runner, self.sampler
        assert runner is not None and sampler is not None
        released = set(ints(plan.release).tolist())
        if released:
            self.decoding = [s for s in self.decoding if s not in released]
        if len(plan.copies):
            runner.kv.copy_pages(ints(plan.copies).reshape(-1, 3))
        for a in plan.admits:
            self.rid_of[a.slot] = a.rid
            runner.admit(a.slot, ints(a.pages), a.cached, a.limit)
        sampler.sync(plan.window, len(plan.admits))
        runner.grow(ints(plan.grow_slots), ints(plan.grow_pages))
        slots, lengths, last = ints(plan.chunk_slots), ints(plan.chunk_lengths), ints(plan.chunk_last)
        parts = np.split(ints(plan.chunk_ids), np.cumsum(lengths)[:-1]) if len(lengths) else []
        work = zip(slots.tolist(), parts, last.tolist(), strict=True)
        return [ChunkWork(slot, ids, bool(draws)) for slot, ids, draws in work]

    @torch.inference_mode()
    def _step(self, window: int, step: int, chunks: list[ChunkWork], started: int) -> StepOut:
        """One forward, one draw, one advance. Finished slots leave the batch at once."""
        runner, sampler = self.runner, self.sampler
        assert runner is not None and sampler is not None
        draws = [c.slot for c in chunks if c.draws]
        slots = self.decoding + draws
        if not slots and not chunks:
            return self._step_out(window, step, [], None, started)
        out = runner.step(self.decoding, chunks)
        if not slots:
            return self._step_out(window, step, [], None, started)
        drawn = sampler.draw(out.logits, out.slots, out.positions)
        at_limit = runner.advance(out.slots, drawn.ids)
        finish = torch.where(at_limit & (drawn.finish == Finish.NONE), int(Finish.LENGTH), drawn.finish)
        drawn.finish = finish.to(torch.uint8)
        result = self._step_out(window, step, slots, drawn, started)
        self.decoding = slots
        if any(result.finish):
            self.decoding = [s for s, done in zip(slots, result.finish, strict=True) if not done]
        return result

    def _step_out(self, window: int, step: int, slots: list[int], drawn: Sampled | None, started: int) -> StepOut:
        took = time.perf_counter_ns() - started
        if drawn is None:
            return StepOut(window, step, NOTHING, NOTHING, NOTHING, NOTHING, 0, NOTHING, NOTHING, took)
        rids = np.array([self.rid_of[s] for s in slots], dtype=np.int64)
        ids, finish = drawn.ids.to(torch.int32).cpu().numpy(), drawn.finish.cpu().numpy()
        logprobs = top_ids = top_logprobs = NOTHING
        if drawn.logprobs is not None:
            logprobs = memoryview(drawn.logprobs.cpu().numpy().tobytes())
        if drawn.top_ids is not None and drawn.top_logprobs is not None:
            top_ids = memoryview(drawn.top_ids.cpu().numpy().tobytes())
            top_logprobs = memoryview(drawn.top_logprobs.cpu().numpy().tobytes())
        return StepOut(
            window=window,
            step=step,
            rids=memoryview(rids.tobytes()),
            ids=memoryview(ids.tobytes()),
            finish=memoryview(finish.tobytes()),
            logprobs=logprobs,
            top_n=drawn.top_n,
            top_ids=top_ids,
            top_logprobs=top_logprobs,
            step_ns=time.perf_counter_ns() - started,
        )


def set_threads(config: EngineConfig) -> None:
    """Give torch the cores it may use; more threads than cores make each other wait."""
    if config.cpu_threads is not None:
        torch.set_num_threads(config.cpu_threads)
