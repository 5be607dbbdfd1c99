"""Several machines (--nnodes), played by servers on this one: what they say, and what clients see when one is lost."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import tiny
from live_load import LiveLoad
from live_server import LiveServer, live_server, wait_until
from processes import is_alive
from stub_model import stub_folder

from actorserve.perf.engines import free_port

TIMEOUT = 2.5
KEY = "0123456789abcdef" * 4
STUB = ["--load-format", "stub", "--stub-step-ms", "4", "--max-total-tokens", "65536"]
TOKENS = 150
BODIES: list[dict[str, Any]] = [
    {"prompt": f"{i} " * 20 + "Once upon a time", "max_tokens": TOKENS, "ignore_eos": True, "seed": i, "logprobs": 1}
    | ({"temperature": 0} if i % 2 else {})
    | ({"regex": "[a-z ]{500,600}"} if i % 4 == 3 else {})
    for i in range(8)
]


@dataclass
class Machine:
    """One that is not node 0."""

    process: "subprocess.Popen[str]"
    log: Path

    def children(self) -> dict[str, int]:
        return LiveServer(self.process, "", self.log).children()

    def joins(self) -> None:
        """Wait until it has."""
        wait_until(lambda: "joined node 0" in self.log.read_text(), 60, "it joins")

    def kill(self, number: signal.Signals) -> list[int]:
        """Send it to all its processes; returns them."""
        pids = [self.process.pid, *self.children().values()]
        os.killpg(self.process.pid, number)
        return pids


@dataclass
class Cluster:
    """Node 0, and how to start others."""

    head: LiveServer
    flags: list[str]
    address: str
    tmp: Path

    def ranks(self, seconds: float = 30) -> None:
        """Wait until all replicas serve."""
        wait_until(lambda: self.head.get("/ready").json() == {"status": "ok", "reason": None}, seconds, "all serve")

    def lost(self) -> None:
        wait_until(lambda: self.head.get("/ready").json()["reason"] is not None, 10, "the loss is known")

    def generated(self, rank: int = 1) -> float:
        start = f'actorserve_generated_tokens_total{{dp_rank="{rank}"}}'
        lines = [line for line in self.head.get("/metrics").text.splitlines() if line.startswith(start)]
        return float(lines[0].rpartition(" ")[2])


def settings(tmp: Path) -> list[str]:
    (tmp / "key").write_text(KEY)
    return ["--node-key-file", str(tmp / "key"), "--node-timeout", str(TIMEOUT)]


@contextmanager
def machine(cluster: Cluster, *more: str) -> Iterator[Machine]:
    """Start one, and kill what is left of it at the end."""
    log = cluster.tmp / f"machine-{time.monotonic_ns()}.log"
    command = [sys.executable, "-m", "actorserve", "run", *cluster.flags, "--node-rank", "1", *more]
    with log.open("w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, text=True, start_new_session=True)
    try:
        yield Machine(process, log)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGCONT)
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@contextmanager
def head(tmp: Path, *flags: str, dp: int = 2) -> Iterator[Cluster]:
    address = f"127.0.0.1:{free_port()}"
    ours = ["--dp-size", str(dp), "--nnodes", "2", "--dist-init-addr", address, *settings(tmp), *flags]
    with live_server(tmp, *ours) as s:
        yield Cluster(s, ours, address, tmp)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return stub_folder(tmp_path_factory.mktemp("stub") / "model")


@pytest.fixture(scope="module")
def cluster(folder: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with head(tmp_path_factory.mktemp("head"), *STUB, "--model", folder) as c:
        yield c


@pytest.fixture(scope="module")
def wanted(cluster: Cluster) -> list[Any]:
    """What node 0 says alone."""
    assert "node 1 has not joined" in cluster.head.get("/ready").json()["reason"]
    return [one.said(exact=True) for one in LiveLoad(cluster.head.url, BODIES).once()]


@pytest.fixture(scope="module")
def machines() -> Iterator[tuple[ExitStack, list[Machine]]]:
    with ExitStack() as running:
        yield running, []


@pytest.fixture
def other(cluster: Cluster, wanted: list[Any], machines: tuple[ExitStack, list[Machine]]) -> Machine:
    """Node 1; the one of the test before, unless that has lost it."""
    running, known = machines
    if not known or known[-1].process.poll() is not None:
        if known:
            cluster.lost()
        known.append(running.enter_context(machine(cluster)))
        known[-1].joins()
        cluster.ranks()
    return known[-1]


def generate(server: LiveServer, **more: Any) -> dict[str, Any]:
    body = {"text": "hello", "sampling_params": {"max_new_tokens": 4, "ignore_eos": True, "seed": 7}} | more
    reply = httpx.post(server.url + "/generate", json=body, timeout=60, verify=False)
    assert reply.status_code == 200, reply.text
    found: dict[str, Any] = reply.json()
    return found


def test_two_machines_say_what_one_says(cluster: Cluster, other: Machine, wanted: list[Any]) -> None:
    before = cluster.generated()
    assert [one.said(exact=True) for one in LiveLoad(cluster.head.url, BODIES).once()] == wanted
    assert 2 * TOKENS <= cluster.generated() - before <= 6 * TOKENS
    cluster.head.assert_pages_add_up()
    assert set(other.children()) == {"exec.1.0", "sched.1", "link.1"}
    assert {"sched.0", "sched.1", "exec.0.0", "gate", "text", "fsm"} <= cluster.head.children().keys()
    assert "exec.1.0" not in cluster.head.children()


def test_orders_reach_the_other_machine(cluster: Cluster, other: Machine) -> None:
    for rank in (0, 1):
        found = generate(cluster.head, routed_dp_rank=rank, text="some prompt that is longer than a page" * 3)
        assert found["meta_info"]["dp_rank"] == rank
    assert cluster.head.get("/flush_cache").status_code == 200
    loads = cluster.head.get("/v1/loads").json()
    assert [one["dp_rank"] for one in loads["loads"]] == [0, 1]
    # Times of the other machine are told as the head's.
    reply = generate(cluster.head, routed_dp_rank=1, rid="timed")
    found = cluster.head.get(f"/v1/requests/{reply['meta_info']['id']}/timeline").json()
    assert "timed" in json.dumps(found)


def lost_under_load(cluster: Cluster, other: Machine, number: signal.Signals, wanted: list[Any]) -> list[int]:
    """Lose the machine amid streams, which all must end as they would have; returns its processes."""
    with LiveLoad(cluster.head.url, BODIES) as load:
        before = cluster.generated()
        wait_until(lambda: cluster.generated() > before, 20, "the other machine computes")
        pids = other.kill(number)
        lost_at = time.monotonic()
        cluster.lost()
        assert time.monotonic() - lost_at < TIMEOUT + 30
        time.sleep(0.5)
        assert cluster.head.is_ready()
    assert len(load.answers) >= len(BODIES)
    assert all(answer.said(exact=True) == wanted[number] for number, answer in load.answers)
    return pids


def test_a_machine_is_killed_and_comes_back(cluster: Cluster, other: Machine, wanted: list[Any]) -> None:
    pids = lost_under_load(cluster, other, signal.SIGKILL, wanted)
    other.process.wait()
    wait_until(lambda: not any(map(is_alive, pids)), 30, "nothing of it is left")
    # Who names its replica is served all the same, and so are orders.
    assert generate(cluster.head, routed_dp_rank=1)["meta_info"]["dp_rank"] == 0
    assert cluster.head.get("/flush_cache").status_code == 200
    with machine(cluster) as again:
        again.joins()
        cluster.ranks()
        assert generate(cluster.head, routed_dp_rank=1)["meta_info"]["dp_rank"] == 1
        assert [one.said(exact=True) for one in LiveLoad(cluster.head.url, BODIES).once()] == wanted
    cluster.head.assert_pages_add_up()


def test_a_machine_that_says_nothing_is_lost_and_may_go_on(cluster: Cluster, other: Machine, wanted: list[Any]) -> None:
    lost_under_load(cluster, other, signal.SIGSTOP, wanted)
    os.killpg(other.process.pid, signal.SIGCONT)
    cluster.ranks()
    assert [one.said(exact=True) for one in LiveLoad(cluster.head.url, BODIES).once()] == wanted
    assert generate(cluster.head, routed_dp_rank=1)["meta_info"]["dp_rank"] == 1
    cluster.head.assert_pages_add_up()


def die_one_by_one(cluster: Cluster, owner: LiveServer | Machine, victims: list[str], wanted: list[Any]) -> None:
    """Kill these actors of a machine under load, each when all serve again."""
    with LiveLoad(cluster.head.url, BODIES) as load:
        for victim in victims:
            time.sleep(0.3)  # the death before may not have been known yet when all seemed to serve
            cluster.ranks()
            wait_until(lambda: victim in owner.children(), 20, "it is there")  # noqa: B023
            pid = owner.children()[victim]
            os.kill(pid, signal.SIGKILL)
            wait_until(lambda: owner.children().get(victim, pid) != pid, 20, "it is replaced")  # noqa: B023
            cluster.ranks()
    assert len(load.answers) >= len(BODIES)
    assert all(answer.said(exact=True) == wanted[number] for number, answer in load.answers)
    cluster.head.assert_pages_add_up()


def test_deaths_on_node_0(cluster: Cluster, other: Machine, wanted: list[Any]) -> None:
    """Also of the stand-in of the other machine's scheduler; nothing of that machine is restarted but its link."""
    there = other.children()
    die_one_by_one(cluster, cluster.head, ["text", "fsm", "sched.1", "gate"], wanted)
    kept = {name for name, pid in other.children().items() if there[name] == pid}
    assert kept == {"sched.1", "exec.1.0"}


def test_deaths_on_the_other_machine(cluster: Cluster, other: Machine, wanted: list[Any]) -> None:
    die_one_by_one(cluster, other, ["exec.1.0", "sched.1", "link.1"], wanted)


def test_a_machine_that_is_stopped_hands_over(cluster: Cluster, other: Machine, wanted: list[Any]) -> None:
    with LiveLoad(cluster.head.url, BODIES) as load:
        time.sleep(0.4)
        other.process.send_signal(signal.SIGTERM)
        assert other.process.wait(20) == 0
        said = "its machine was stopped"
        wait_until(lambda: said in str(cluster.head.get("/ready").json()["reason"]), 20, "the head knows")
    assert all(answer.said(exact=True) == wanted[number] for number, answer in load.answers)


# ------------------------------------------------------------------ who is not let in


def knock(address: str, data: bytes, seconds: float = 0.0) -> bytes:
    """Say this to the gate; what comes back until it closes or `seconds` are over."""
    host, _, port = address.rpartition(":")
    with socket.create_connection((host, int(port))) as sock:
        sock.sendall(data)
        sock.settimeout(seconds or 10)
        got = b""
        try:
            while more := sock.recv(4096):
                got += more
        except (TimeoutError, ConnectionResetError):
            pass
        return got


def test_strangers_change_nothing(cluster: Cluster, other: Machine, wanted: list[Any], tmp_path: Path) -> None:
    """Garbage, slow ones, and many of them, while streams run; the gate does not die."""
    gate = cluster.head.children()["gate"]
    host, _, port = cluster.address.rpartition(":")
    with LiveLoad(cluster.head.url, BODIES) as load:
        slow = [socket.create_connection((host, int(port))) for _ in range(80)]
        with ThreadPoolExecutor(8) as pool:
            found = list(pool.map(lambda i: knock(cluster.address, os.urandom(72 + 97 * i % 3000)), range(40)))
        assert all(len(one) == 40 for one in found), "a greeting, and nothing else"
        assert len(knock(cluster.address, b"ACTNODE1" + bytes(64))) == 40
        for one in slow:
            one.close()
        time.sleep(0.5)
    assert all(answer.said(exact=True) == wanted[number] for number, answer in load.answers)
    assert cluster.head.children()["gate"] == gate
    assert cluster.head.get("/ready").json() == {"status": "ok", "reason": None}


def test_machines_that_are_refused(cluster: Cluster, other: Machine, folder: str, tmp_path: Path) -> None:
    """Another key: it goes on trying. Other settings: it ends, and says what is different. A second one: it waits."""
    before = other.children()
    (tmp_path / "wrong").write_text("x" * 32)
    with (
        machine(cluster, "--node-key-file", str(tmp_path / "wrong")) as stranger,
        machine(cluster, "--kv-cache-dtype", "fp8") as different,
        machine(cluster) as second,
    ):
        assert different.process.wait(30) == 2
        assert "--kv-cache-dtype (fp8, on node 0 auto)" in different.log.read_text().splitlines()[-1]
        wait_until(lambda: "refuses our --node-key-file" in stranger.log.read_text(), 20, "it is refused")
        wait_until(lambda: "is connected already" in second.log.read_text(), 20, "it is told")
        assert stranger.process.poll() is None and second.process.poll() is None
        assert generate(cluster.head, routed_dp_rank=1)["meta_info"]["dp_rank"] == 1
        assert other.children() == before
        other.kill(signal.SIGKILL)
        second.joins()
        cluster.ranks()


def test_weights_of_a_machine_that_comes_back(folder: str, tmp_path: Path) -> None:
    """It gets those that the others have before it has requests."""
    stub_folder(tmp_path / "weights/a")
    with head(tmp_path, *STUB, "--model", folder, "--weights-root", str(tmp_path / "weights")) as cluster:
        with machine(cluster) as other:
            cluster.ranks(60)
            old = generate(cluster.head, routed_dp_rank=0)["output_ids"]
            body = {"model_path": "a"}
            reply = httpx.post(cluster.head.url + "/update_weights_from_disk", json=body, timeout=60, verify=False)
            assert reply.status_code == 200, reply.text
            assert generate(cluster.head, routed_dp_rank=1)["output_ids"] != old
            other.kill(signal.SIGKILL)
            cluster.lost()
        with machine(cluster):
            new = generate(cluster.head, routed_dp_rank=0)["output_ids"]
            assert new != old

            def is_served_there() -> bool:
                found = generate(cluster.head, routed_dp_rank=1)
                assert found["output_ids"] == new
                return bool(found["meta_info"]["dp_rank"] == 1)

            wait_until(is_served_there, 30, "it has the weights")


def test_two_replicas_on_each_machine(folder: str, tmp_path: Path, wanted: list[Any]) -> None:
    """Each has a connection and a supervisor of its own; they live and die apart, and outlive node 0."""
    with head(tmp_path, *STUB, "--model", folder, dp=4) as c, machine(c) as other:
        c.ranks()
        names = {"sched.2", "sched.3", "link.2", "link.3", "exec.2.0", "exec.3.0"}
        before = other.children()
        assert before.keys() == names
        assert [generate(c.head, routed_dp_rank=rank)["meta_info"]["dp_rank"] for rank in range(4)] == [0, 1, 2, 3]
        die_one_by_one(c, other, ["sched.2"], wanted)
        after = other.children()
        assert {name for name in names if before[name] != after[name]} == {"sched.2", "link.2"}
        # Node 0 ends; the next one finds the other machine with what it has loaded.
        c.head.process.send_signal(signal.SIGTERM)
        c.head.process.wait(20)
        assert other.process.poll() is None
        with live_server(tmp_path, *c.flags) as again:
            replace(c, head=again).ranks()
            assert [one.said(exact=True) for one in LiveLoad(again.url, BODIES).once()] == wanted
        kept = {name for name, pid in other.children().items() if after[name] == pid}
        assert kept == {name for name in names if "link" not in name}


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--node-rank 1", "--node-rank 1 is of no machine: with --nnodes 1 they are 0 to 0"),
        ("--nnodes 2 --dp-size 2 --node-rank 2", "--node-rank 2 is of no machine"),
        ("--nnodes 2 --dp-size 3", "--dp-size 3 does not divide by --nnodes 2"),
        ("--nnodes 2", "--dp-size 1 does not divide by --nnodes 2"),
        ("--nnodes 2 --dp-size 2", "--dist-init-addr is needed with --nnodes"),
        ("--nnodes 2 --dp-size 2 --dist-init-addr here", "--dist-init-addr here is none: HOST:PORT"),
        ("--nnodes 2 --dp-size 2 --dist-init-addr h:99999", "--dist-init-addr h:99999 is none: HOST:PORT"),
        ("--nnodes 2 --dp-size 2 --dist-init-addr h:9", "--node-key-file is needed with --nnodes"),
        ("--nnodes 2 --dp-size 2 --dist-init-addr h:9 --node-key-file /nowhere", "--node-key-file cannot be read"),
        ("--nnodes 2 --dp-size 2 --dist-init-addr h:9 --node-key-file SHORT", "--node-key-file has 5 bytes"),
    ],
)
def test_flags_are_checked(flags: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from actorserve.cli import command

    (tmp_path / "short").write_text("short\n")
    assert command(["run", *flags.replace("SHORT", str(tmp_path / "short")).split()]) == 2
    out, err = capsys.readouterr()
    assert not out and err.startswith(f"actorserve: {said}") and err.count("\n") == 1


# ------------------------------------------------------------------ a model


def test_a_model_on_two_machines_says_the_same(tmp_path: Path) -> None:
    """Token ids, greedy and drawn, of a tiny real one."""
    (tmp_path / "model").mkdir()
    model = tiny.save(tiny.build("llama", max_position_embeddings=512), tmp_path / "model")
    flags = ["--model", model, "--skip-tokenizer-init", "--device", "cpu", "--dtype", "float32", "--cpu-threads", "1"]
    flags += ["--max-total-tokens", "4096", "--load-balance-method", "round_robin"]
    asked = [
        {"input_ids": [5 + i, 17, 3, 99, 42 + i, 8] * 4,
         "sampling_params": {"temperature": i % 2, "max_new_tokens": 24, "ignore_eos": True, "seed": 3}}
        for i in range(6)
    ]  # fmt: skip

    def said(server: LiveServer) -> list[Any]:
        with ThreadPoolExecutor(6) as pool:
            replies = list(pool.map(lambda body: generate(server, text=None, **body), asked))
        return [(one["output_ids"], one["meta_info"].get("dp_rank")) for one in replies]

    with head(tmp_path, *flags) as first:
        alone = [ids for ids, rank in said(first.head) if rank == 0]
        with machine(first):
            first.ranks(60)
            found = said(first.head)
            assert [ids for ids, _ in found] == alone and {rank for _, rank in found} == {0, 1}
