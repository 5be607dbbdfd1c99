"""A tensor parallel rank as a process: it loads its part of models and computes, with the others over gloo.

    python rank_process.py MEETING RANK SIZE     # as `Ranks` starts it; tasks are lines of JSON on its input

Used by test_parallel.py. What comes back is JSON too, logits a safetensors file.
"""

import json
import os
import queue
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import tiny
import torch
from safetensors.torch import load_file, save_file
from tiny import Driver
from torch import Tensor

from actorserve.config import EngineConfig
from actorserve.models.decoder import Decoder
from actorserve.models.group import DistributedGroup
from actorserve.models.parallel import Group
from actorserve.models.weights import load_decoder

PATIENCE = 120.0
"""Seconds for one task."""
STEPS = 6


def load(folder: str, group: Group | None, **fields: Any) -> Decoder:
    """A rank's part of a tiny model, or all of it."""
    config = EngineConfig(**{"dtype": "float32", "device": "cpu"} | fields)
    return load_decoder(folder, config, lambda fraction: None, group=group)


@torch.inference_mode()
def said(decoder: Decoder, group: Group | None) -> tuple[Tensor, list[int]]:
    """(logits of a prompt in two chunks and of two requests in one batch, one of them decoding; how the first goes on
    greedily). Logits are rank 0's."""
    driver = Driver.of(decoder)
    first, second = driver.request(tiny.prompt(41), room=STEPS), driver.request(tiny.prompt(19, seed=2))
    works = [[(first, 25)], [(first, 15)], [(first, 1), (second, 19)]]
    logits = torch.cat([driver.forward(work) for work in works])
    last = logits[40]
    while True:
        drawn = last.argmax()
        first.ids.append(int(drawn if group is None else group.broadcast(drawn)))
        if len(first.ids) == first.goal:
            return logits, first.ids[41:]
        last = driver.forward([(first, 1)])[-1]


def main() -> None:
    meeting, rank, size = map(int, sys.argv[1:])
    torch.set_num_threads(1)
    group = DistributedGroup(meeting, rank, size, torch.device("cpu"))
    for line in sys.stdin:
        task = json.loads(line)
        try:
            logits, ids = said(load(task["folder"], group, **task["fields"]), group)
            if rank == 0:
                save_file({"logits": logits.contiguous()}, task["out"])
            reply: dict[str, Any] = {"ids": ids}
        except Exception as error:
            reply = {"error": f"rank {rank}: {type(error).__name__}: {error}"}
        print(json.dumps(reply), flush=True)


class Ranks:
    """The processes of a group. One that fails ends them all, and the next task starts new ones."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.processes: list[subprocess.Popen[str]] = []
        self.replies: queue.Queue[dict[str, Any]] = queue.Queue()

    def said(self, folder: str, out: Path, **fields: Any) -> tuple[Tensor, list[list[int]]]:
        """(rank 0's logits, every rank's ids) of `said`; `out`: where the logits' file goes."""
        if not self.processes:
            self._start()
        for process in self.processes:
            assert process.stdin is not None
            process.stdin.write(json.dumps({"folder": folder, "fields": fields, "out": str(out)}) + "\n")
            process.stdin.flush()
        ids = []
        for _ in self.processes:
            try:
                reply = self.replies.get(timeout=PATIENCE)
            except queue.Empty:
                reply = {"error": f"no answer within {PATIENCE} s"}
            if "error" in reply:
                self.close()
                raise AssertionError(reply["error"])
            ids.append(reply["ids"])
        return load_file(out)["logits"], ids

    def _start(self) -> None:
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
        self.replies = queue.Queue()
        with socket.create_server(("127.0.0.1", 0)) as meeting:
            for rank in range(self.size):
                command = [sys.executable, __file__, str(meeting.fileno()), str(rank), str(self.size)]
                process = subprocess.Popen(
                    command, pass_fds=[meeting.fileno()], env=environment, text=True,
                    stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                )  # fmt: skip
                self.processes.append(process)
                threading.Thread(target=self._listen, args=(process, self.replies), daemon=True).start()

    @staticmethod
    def _listen(process: "subprocess.Popen[str]", replies: "queue.Queue[dict[str, Any]]") -> None:
        """Hand on what a process says, and that it has ended."""
        assert process.stdout is not None
        for line in process.stdout:
            replies.put(json.loads(line))
        replies.put({"error": f"a rank ended with {process.wait()}"})

    def close(self) -> None:
        """End the processes."""
        for process in self.processes:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                assert pipe is not None
                pipe.close()
        self.processes = []


if __name__ == "__main__":
    main()
