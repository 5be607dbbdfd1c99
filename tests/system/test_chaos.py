"""Actors are killed and stopped at random under live streams: none is lost, none changed, each ends once.

With --thorough (`make chaos`) as often as it takes to believe it, or --kills times. What is printed (-s) are times;
they decide nothing.
"""

import os
import random
import signal
import statistics
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from live_load import Answer, LiveLoad
from live_server import LiveServer, live_server, shared_memory, wait_until
from stub_model import stub_folder

NODES = ["exec.0", "sched", "text", "fsm"]
"""All but the front, with which its connections die (test_death.py)."""
SIGNALS = [signal.SIGKILL] * 4 + [signal.SIGSEGV]
"""The last is taken for a fault of the actor's own, for which requests are suspected."""
WORDS = 'root ::= "(" root ")" | word root | word\nword ::= [a-z]+ " "'
KINDS: list[dict[str, Any]] = [
    {},
    {"logprobs": 2},
    {"regex": "([a-z]{1,9}, and then )*the end"},
    {"ebnf": WORDS},
    {"stop": ["e", "the quick"], "n": 1, "min_tokens": 5},
    {"temperature": 0},
    {"logprobs": 0, "stop": ["zz"], "regex": "([a-z]{1,9}, and then )*the end"},
    {"echo": True},
]


def bodies(count: int, tokens: int, same: int = 4) -> list[dict[str, Any]]:
    """Requests of all kinds; `same` of them in a row begin alike."""
    rng = random.Random(1)
    stems = [" ".join(rng.choices(["Once", "upon", "a", "time", "there", "was"], k=20)) for _ in range(count // same)]
    plain = {"temperature": 1.0, "max_tokens": tokens, "ignore_eos": True}
    return [
        plain | {"prompt": f"{stems[i // same % len(stems)]} {i}", "seed": i} | KINDS[i % len(KINDS)]
        for i in range(count)
    ]


class Times:
    """Seconds of each kill until /ready said so, and until it was well again."""

    def __init__(self) -> None:
        self.reasons: set[str] = set()
        """That /ready gave."""
        self.noticed: list[float] = []
        self.ready: list[float] = []

    def lists(self) -> tuple[list[float], list[float]]:
        return self.noticed, self.ready

    def watch(self, server: LiveServer, node: str, number: int = signal.SIGKILL) -> None:
        """Send a signal to a node and wait until the server is ready again."""
        pid = server.children()[node]
        started = time.monotonic()
        os.kill(pid, number)
        wait_until(lambda: self._down(server) or server.children().get(node, pid) != pid, 120, f"{node} is missed")
        self.noticed.append(time.monotonic() - started)
        wait_until(lambda: server.children().get(node, pid) != pid and server.is_ready(), 600, f"{node} is back")
        self.ready.append(time.monotonic() - started)

    def _down(self, server: LiveServer) -> bool:
        reply = server.get("/ready")
        if reply.status_code != 200:
            self.reasons.add(reply.json()["reason"])
        return reply.status_code != 200


def assert_unharmed(load: LiveLoad, undisturbed: list[Answer], exact: bool) -> None:
    """Every stream ended once and said what it would have said; print what is worth knowing."""
    wrong = [(i, a, undisturbed[i]) for i, a in load.answers if a.said(exact) != undisturbed[i].said(exact)]
    lost = [answer.error for _, answer, _ in wrong if answer.error]
    pauses: dict[str, float] = {"plain": 0.0, "with a grammar": 0.0}
    for i, answer in load.answers:
        kind = "with a grammar" if {"regex", "ebnf"} & load.bodies[i].keys() else "plain"
        pauses[kind] = max(pauses[kind], answer.pause)
    print(
        f"\n{len(load.answers)} streams, {len(lost)} lost, {len(wrong) - len(lost)} changed; the longest pause:", end=""
    )
    print(*(f" {seconds:.2f} s {kind}" for kind, seconds in pauses.items()), sep=",")
    assert not wrong, (len(wrong), wrong[:2])


def kill_at_random(
    server: LiveServer,
    kills: int,
    streams: list[dict[str, Any]],
    undisturbed: list[Answer],
    exact: bool,
    rest: float,
    nodes: Sequence[str] = NODES,
) -> None:
    """`kills` deaths, of each actor in turn, up to `rest` seconds after the last recovery."""
    before = shared_memory()
    assert all(len(a.ends) == 2 and not a.error for a in undisturbed), undisturbed
    rng, times = random.Random(kills), Times()
    with LiveLoad(server.url, streams) as load:
        for number in range(kills):
            time.sleep(rng.uniform(0, rest))
            times.watch(server, nodes[number % len(nodes)], rng.choice(SIGNALS))
            print(".", end="", flush=True)
    assert_unharmed(load, undisturbed, exact)
    noticed, ready = (f"{max(t):.2f} s at most, {statistics.median(t):.2f} s in the middle" for t in times.lists())
    print(f"{kills} kills; /ready says so after {noticed}; all is well after {ready}", *sorted(times.reasons), sep="\n")
    server.assert_pages_add_up()
    assert shared_memory() == before


@pytest.fixture
def kills(request: pytest.FixtureRequest) -> int | None:
    """--kills."""
    number: int | None = request.config.getoption("kills")
    return number


@pytest.fixture(scope="module")
def stub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    tmp = tmp_path_factory.mktemp("stub")
    flags = ["--load-format", "stub", "--stub-step-ms", "20", "--max-restarts", "100000", "--hang-seconds", "3"]
    flags += ["--max-total-tokens", "1600", "--schedule-conservativeness", "0"]
    with live_server(tmp, "--model", stub_folder(tmp / "model"), *flags) as server:
        yield server


@pytest.mark.timeout(0)
def test_deaths_with_the_stub(stub: LiveServer, kills: int | None, thorough: bool) -> None:
    """Its pages are too few for all, so that requests are retracted too."""
    streams = bodies(32, 100)
    undisturbed = LiveLoad(stub.url, streams).once()
    assert stub.metrics()["actorserve_retractions_total"] > 0
    kill_at_random(stub, kills or (500 if thorough else 4), streams, undisturbed, exact=True, rest=0.5)


@pytest.mark.timeout(0)
def test_deaths_among_replicas(tmp_path: Path, kills: int | None, thorough: bool) -> None:
    """Also of both at once, before the first is back."""
    flags = ["--load-format", "stub", "--stub-step-ms", "20", "--max-restarts", "100000", "--dp-size", "2"]
    nodes = ["sched.0", "exec.1.0", "exec.0.0", "text", "sched.1", "fsm"]
    streams = bodies(32, 100)
    with live_server(tmp_path, "--model", stub_folder(tmp_path / "model"), *flags) as server:
        undisturbed = LiveLoad(server.url, streams).once()
        kill_at_random(
            server, kills or (300 if thorough else 3), streams, undisturbed, exact=True, rest=0.3, nodes=nodes
        )


def test_a_stopped_executor_is_replaced(stub: LiveServer) -> None:
    streams = bodies(8, 100)
    undisturbed, times = LiveLoad(stub.url, streams).once(), Times()
    with LiveLoad(stub.url, streams) as load:
        times.watch(stub, "exec.0", signal.SIGSTOP)
    assert_unharmed(load, undisturbed, exact=True)
    assert times.reasons
    print(f"stopped: noticed after {times.noticed[0]:.2f} s of the limit's 3, ready after {times.ready[0]:.2f} s")


@pytest.mark.timeout(0)
def test_no_false_alarms(stub: LiveServer, thorough: bool) -> None:
    """Ten busy minutes with a limit of three seconds: nobody is taken for stuck, every stream says the same."""
    streams, before = bodies(64, 200 if thorough else 50), stub.children()
    undisturbed = LiveLoad(stub.url, streams).once()
    with LiveLoad(stub.url, streams) as load:
        time.sleep(600 if thorough else 5)
        assert stub.children() == before and stub.is_ready()
    assert_unharmed(load, undisturbed, exact=True)


@pytest.mark.timeout(0)
def test_deaths_with_the_real_model(smollm: str, tmp_path: Path, kills: int | None, thorough: bool) -> None:
    if not thorough:
        pytest.skip("takes minutes: --thorough")
    flags = ("--dtype", "float32", "--max-total-tokens", "16384", "--max-restarts", "100000")
    with live_server(tmp_path, "--model", smollm, *flags) as server:
        streams = bodies(32, 48)
        kill_at_random(server, kills or 50, streams, LiveLoad(server.url, streams).once(), exact=False, rest=2.0)
