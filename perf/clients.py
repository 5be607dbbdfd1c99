"""Client processes of a load: a job of requests is split among them, each sends its part and hands back records.

Used by serve.py and join.py. A Python client costs about as much per token as the server does, so one process cannot
load a fast server; all start at the same moment. Invariant: every request of a job has one record.
"""

import asyncio
import gc
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import msgspec
import uvloop

from actorserve.perf.stream_client import Client, Record


class Job(msgspec.Struct):
    """What one client process does. Times are seconds; `offsets` from the common start, one a body."""

    url: str
    headers: dict[str, str]
    indices: list[int]
    bodies: list[str]
    wanted: list[int]
    offsets: list[float]
    concurrency: int
    timeout: float
    stop: float | None = None
    """Seconds from the common start after which what still runs is dropped, without an error in its record."""


class Result(msgspec.Struct):
    """What one client process hands back."""

    records: list[Record]
    cpu_seconds: float


def split(job: Job, processes: int) -> list[Job]:
    """Share a job among client processes: every n-th request, and their share of the concurrency."""
    processes = min(processes, job.concurrency, len(job.bodies))
    return [
        msgspec.structs.replace(
            job,
            **{name: getattr(job, name)[i::processes] for name in ("indices", "bodies", "wanted", "offsets")},
            concurrency=job.concurrency // processes + (i < job.concurrency % processes),
        )
        for i in range(processes)
    ]


async def run_job(job: Job, begin: float) -> list[Record]:
    """Send a job's requests from the clock time `begin` (CLOCK_MONOTONIC seconds) on."""
    client = Client(job.url, job.headers)
    free = asyncio.Semaphore(job.concurrency)
    records = []

    async def one(record: Record, body: bytes) -> None:
        await client.stream(body, record, job.timeout)
        free.release()

    left = None if job.stop is None else begin + job.stop - client.clock()
    with suppress(TimeoutError):
        async with asyncio.timeout(left), asyncio.TaskGroup() as tasks:
            for index, body, wanted, offset in zip(job.indices, job.bodies, job.wanted, job.offsets, strict=True):
                record = Record(index, planned=begin + offset, wanted_tokens=wanted)
                records.append(record)
                if (wait := record.planned - client.clock()) > 0:
                    await asyncio.sleep(wait)
                await free.acquire()
                tasks.create_task(one(record, body.encode()))
    client.close()
    await asyncio.sleep(0)  # lets the connections end before the loop does
    return records


def work(job: Job, begin: float) -> Result:
    """run_job in this process, without pauses of the garbage collector."""
    gc.collect()
    gc.freeze()
    before = time.process_time()
    try:
        records = uvloop.run(run_job(job, begin))
    finally:
        gc.unfreeze()
    return Result(records, time.process_time() - before)


def work_in_processes(jobs: Sequence[Job]) -> list[Result]:
    """Run each job in a fresh interpreter; all start at the same time. Raises RuntimeError if one fails."""
    command = [sys.executable, "-m", "actorserve.perf.clients"]
    workers = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) for _ in jobs]
    try:
        for worker, job in zip(workers, jobs, strict=True):
            _stream(worker.stdin).write(msgspec.json.encode(job) + b"\n")
            _stream(worker.stdin).flush()
        if any(_stream(worker.stdout).readline() != b"ready\n" for worker in workers):
            raise RuntimeError("a client process did not start")
        begin = time.monotonic() + 0.1
        outputs = []
        for worker in workers:
            _stream(worker.stdin).write(b"%r\n" % begin)
            _stream(worker.stdin).flush()
        for worker in workers:
            outputs.append(_stream(worker.stdout).read())
            if worker.wait():
                raise RuntimeError("a client process failed")
        return [msgspec.json.decode(output, type=Result) for output in outputs]
    finally:
        for worker in workers:
            worker.kill()
            worker.communicate()


def _stream(pipe: Any) -> Any:
    assert pipe is not None
    return pipe


def main() -> None:
    """A client process: job in, `ready` out, start time in, result out."""
    job = msgspec.json.decode(sys.stdin.buffer.readline(), type=Job)
    print("ready", flush=True)
    result = work(job, float(sys.stdin.buffer.readline()))
    with open(1, "wb", closefd=False) as out:  # under PYTHONUNBUFFERED sys.stdout may write only a part
        out.write(msgspec.json.encode(result))


if __name__ == "__main__":
    main()
