"""What the scheduler costs a window: receive its results, plan the next, build and encode the messages.

    python -m actorserve.perf.scheduler [--running 256 10000] [--k 1 8] [--json FILE]

Runs the real Scheduler actor against a fake executor that answers every plan at once with k full steps; no model, no
processes. Printed beside it: the time a GPU needs for such a window at its physical limit (batch 256, context 1024,
Qwen2-7B in bf16 on an H200: 8.19 ms a step), which is what the scheduler must hide behind.
"""

import argparse
import statistics
import time
from array import array
from pathlib import Path

import msgspec
import numpy as np

from actorserve.actors.actor import Context, connect
from actorserve.actors.messages import (
    ExecutorInbox,
    ExecutorReady,
    Plan,
    SamplerInbox,
    SchedulerInbox,
    StepOut,
    Submit,
    TextInbox,
)
from actorserve.actors.scheduler import Scheduler
from actorserve.config import EngineConfig, ModelInfo
from actorserve.sampler.params import SamplingParams

GPU_STEP_MS = 8.19
NOTHING = memoryview(b"")


class Bench:
    """A scheduler with `running` requests that decode for ever, and everything around it faked."""

    def __init__(self, running: int, k: int, prompt: int, shared: int) -> None:
        config = EngineConfig(num_continuous_decode_steps=k, window_ms=0, plans_in_flight=1)
        model = ModelInfo(name="m", path="", model_type="llama", vocab_size=32000, context_length=8192, eos_ids=())
        contexts = {
            name: Context(name, config, model, inbox, sends_to=to)
            for name, inbox, to in (
                ("sched", SchedulerInbox, ["text", "exec.0", "sampler.0"]),
                ("exec.0", ExecutorInbox, ["sched"]),
                ("sampler.0", SamplerInbox, []),
                ("text", TextInbox, ["sched"]),
            )
        }
        for a, b in (("sched", "text"), ("text", "sched"), ("sched", "exec.0"), ("exec.0", "sched")):
            connect(contexts[a], contexts[b], codec=True)
        connect(contexts["sched"], contexts["sampler.0"], codec=True)
        self.contexts, self.running, self.k = contexts, running, k
        self.scheduler = Scheduler(contexts["sched"])
        pages = running * (prompt + 4096) // 16
        contexts["exec.0"].ref("sched").post(ExecutorReady(pages, running, 512, "cuda"))
        prefix = list(range(shared))
        for rid in range(running):
            ids = array("i", prefix + np.random.default_rng(rid).integers(0, 32000, prompt - shared).tolist())
            params = SamplingParams(max_new_tokens=4000, seed=rid)
            contexts["text"].ref("sched").post(Submit(rid, memoryview(ids.tobytes()), params))
        self.rid_of: dict[int, int] = {}
        self.drawing: list[int] = []

    def answer(self) -> bool:
        """Answer the next plan as an executor would, with every token 7."""
        item = self.contexts["exec.0"].inbox.poll()
        while item is not None and not isinstance(item[0], Plan):
            item = self.contexts["exec.0"].inbox.poll()
        if item is None:
            return False
        plan = item[0]
        self.rid_of.update((a.slot, a.rid) for a in plan.admits)
        slots, last = np.frombuffer(plan.chunk_slots, np.int32), np.frombuffer(plan.chunk_last, np.int32)
        self.drawing += slots[last > 0].tolist()
        rids = np.array([self.rid_of[s] for s in self.drawing], dtype=np.int64)
        ids = np.full(len(rids), 7, dtype=np.int32)
        arrays = [memoryview(a.tobytes()) for a in (rids, ids, np.zeros(len(rids), np.uint8))]
        for step in range(plan.k):
            out = StepOut(plan.window, step, *arrays, NOTHING, 0, NOTHING, NOTHING, 8_000_000)
            self.contexts["exec.0"].ref("sched").post(out)
        return True

    def drop(self, name: str) -> None:
        while self.contexts[name].inbox.poll() is not None:
            continue

    def window(self) -> float:
        """Let the scheduler handle one window; return its time in ms."""
        started = time.perf_counter()
        self.scheduler.drain()
        took = time.perf_counter() - started
        self.answer()
        self.drop("text")
        self.drop("sampler.0")
        return took * 1e3


def measure(running: int, k: int, windows: int) -> dict[str, float]:
    bench = Bench(running, k, prompt=512, shared=256)
    while len(bench.drawing) < running:
        bench.window()
    for _ in range(5):
        bench.window()
    times = [bench.window() for _ in range(windows)]
    schedule = bench.scheduler.schedule
    assert schedule is not None
    schedule.check()
    return {
        "running": running, "k": k, "median_ms": statistics.median(times), "p99_ms": float(np.quantile(times, 0.99)),
        "per_step_us": 1e3 * statistics.median(times) / k, "gpu_window_ms": GPU_STEP_MS * k,
        "share_of_gpu": statistics.median(times) / (GPU_STEP_MS * k),
    }  # fmt: skip


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--running", type=int, nargs="+", default=[32, 256, 10000])
    p.add_argument("--k", type=int, nargs="+", default=[1, 8])
    p.add_argument("--windows", type=int, default=60)
    p.add_argument("--json", type=Path)
    a = p.parse_args()
    print(f"{'running':>8} {'k':>3} {'window ms':>10} {'p99 ms':>8} {'us/step':>8} {'GPU floor ms':>13} {'share':>7}")
    rows = []
    for running in a.running:
        for k in a.k:
            r = measure(running, k, a.windows)
            rows.append(r)
            print(
                f"{running:>8} {k:>3} {r['median_ms']:>10.3f} {r['p99_ms']:>8.3f} {r['per_step_us']:>8.0f} "
                f"{r['gpu_window_ms']:>13.2f} {r['share_of_gpu']:>7.1%}"
            )
    if a.json:
        a.json.write_bytes(msgspec.json.encode(rows))


if __name__ == "__main__":
    main()
