"""Data parallel replicas (--dp-size) as processes, with a stub and with a tiny model: who gets what, and who dies."""

import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import tiny
import torch
from live_load import Answer, LiveLoad
from live_server import LiveServer, live_server, wait_until
from stub_model import stub_folder

from actorserve import Engine, SamplingParams
from actorserve.errors import RequestError
from actorserve.sync_engine import SyncEngine

REPLICAS = 2
FLAGS = ["--load-format", "stub", "--stub-step-ms", "2", "--max-total-tokens", "65536"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return stub_folder(tmp_path_factory.mktemp("stub") / "model")


@pytest.fixture(scope="module")
def server(folder: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    flags = [*FLAGS, "--model", folder, "--dp-size", str(REPLICAS), "--http-workers", "2"]
    with live_server(tmp_path_factory.mktemp("server"), *flags) as s:
        wait_until(lambda: all_serve(s), 60, "all replicas serve")
        yield s


@pytest.fixture(scope="module")
def alone(folder: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """The same without replicas."""
    with live_server(tmp_path_factory.mktemp("alone"), *FLAGS, "--model", folder) as s:
        yield s


def post(server: LiveServer, path: str, body: dict[str, Any]) -> httpx.Response:
    return httpx.post(server.url + path, json=body, timeout=60, verify=False)


def generate(server: LiveServer, text: str, tokens: int = 4, **more: Any) -> dict[str, Any]:
    params = {"max_new_tokens": tokens, "ignore_eos": True, "seed": 7}
    body = {"text": text, "sampling_params": params} | more
    reply = post(server, "/generate", body)
    assert reply.status_code == 200, reply.text
    found: dict[str, Any] = reply.json()
    return found


def rank_of(server: LiveServer, text: str, **more: Any) -> int:
    return int(generate(server, text, **more)["meta_info"]["dp_rank"])


def by_rank(server: LiveServer, name: str) -> list[float]:
    """A metric of each replica."""
    start = f'actorserve_{name}{{dp_rank="'
    lines = [line for line in server.get("/metrics").text.splitlines() if line.startswith(start)]
    found = {int(line[len(start) :].partition('"')[0]): float(line.rpartition(" ")[2]) for line in lines}
    assert sorted(found) == list(range(REPLICAS)), found
    return [found[rank] for rank in range(REPLICAS)]


def all_serve(server: LiveServer) -> bool:
    return server.get("/ready").json() == {"status": "ok", "reason": None}


BODIES: list[dict[str, Any]] = [
    {"prompt": f"{i} " * 30 + "Once upon a time", "max_tokens": 150, "ignore_eos": True, "seed": i, "logprobs": 1}
    | ({"temperature": 0} if i % 2 else {})
    for i in range(12)
]


def test_what_replicas_say_is_what_one_engine_says(server: LiveServer, alone: LiveServer) -> None:
    before = by_rank(server, "generated_tokens_total")
    said, wanted = (LiveLoad(s.url, BODIES).once() for s in (server, alone))
    assert [one.said(exact=True) for one in said] == [one.said(exact=True) for one in wanted]
    server.assert_pages_add_up()
    came = [now - then for now, then in zip(by_rank(server, "generated_tokens_total"), before, strict=True)]
    assert sum(came) == 12 * 150 and min(came) >= 4 * 150, came
    # Without seeds, too: they are made of request ids, which replicas do not change.
    names = [name for name in alone.children() if name.startswith(("sched", "exec"))]
    assert sorted(names) == ["exec.0", "sched"]
    assert {"sched.0", "sched.1", "exec.0.0", "exec.1.0"} <= server.children().keys()


def test_requests_with_a_common_beginning_share_a_replica(server: LiveServer) -> None:
    shared = "The quick brown fox jumps over the lazy dog. " * 40
    one, other = rank_of(server, shared + "one"), rank_of(server, "Something else entirely. " * 40)
    assert {rank_of(server, shared + str(i)) for i in range(6)} == {one}
    assert generate(server, shared + "last")["meta_info"]["cached_tokens"] > 0
    # Of another salt nothing is shared; the tie goes to whose turn is longest ago.
    assert {rank_of(server, shared, cache_salt=str(i)) for i in range(2)} == {0, 1}
    assert other != one


def test_a_crowd_with_a_common_beginning_is_spread(server: LiveServer) -> None:
    shared = "Pack my box with five dozen liquor jugs. " * 40
    generate(server, shared)
    before = by_rank(server, "generated_tokens_total")
    bodies = [{"prompt": shared + str(i), "max_tokens": 100, "ignore_eos": True} for i in range(24)]
    assert all(one.ends == ["length", "[DONE]"] for one in LiveLoad(server.url, bodies).once())
    server.assert_pages_add_up()
    came = [now - then for now, then in zip(by_rank(server, "generated_tokens_total"), before, strict=True)]
    assert min(came) >= 6 * 100, came


def test_a_request_may_name_its_replica(server: LiveServer) -> None:
    for rank in (1, 0, 1):
        assert rank_of(server, "a text", routed_dp_rank=rank) == rank
        assert rank_of(server, "a text", data_parallel_rank=rank) == rank
    several = generate(server, "a text", routed_dp_rank=1, sampling_params={"n": 5, "max_new_tokens": 3})
    assert [one["meta_info"]["dp_rank"] for one in several] == [1] * 5  # type: ignore[index]
    for path, body in (
        ("/generate", {"text": "a"}), ("/v1/completions", {"prompt": "a"}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}]}),
    ):  # fmt: skip
        for name in ("routed_dp_rank", "data_parallel_rank"):
            reply = post(server, path, body | {name: REPLICAS})
            assert (reply.status_code, reply.json()["error"]["param"]) == (400, name), reply.text


def test_orders_and_reports_are_of_all_replicas(server: LiveServer, tmp_path: Path) -> None:
    server.assert_pages_add_up()
    for rank in range(REPLICAS):
        generate(server, "some prompt that is longer than a page, or two" * 3, routed_dp_rank=rank)
    wait_until(lambda: min(by_rank(server, "kv_pages_tree")) > 0, 10, "both have something cached")
    assert server.get("/flush_cache").status_code == 200
    wait_until(lambda: max(by_rank(server, "kv_pages_tree")) == 0, 10, "both caches are empty")
    loads = server.get("/v1/loads").json()
    assert loads["dp_rank_count"] == REPLICAS and [one["dp_rank"] for one in loads["loads"]] == [0, 1]
    assert loads["aggregate"]["total_reqs"] == 0
    assert [one["dp_rank"] for one in server.get("/v1/loads?dp_rank=1").json()["loads"]] == [1]
    assert server.get(f"/v1/loads?dp_rank={REPLICAS}").status_code == 400
    assert [one["dp_rank"] for one in server.get("/get_load").json()] == [0, 1]
    info = server.get("/server_info").json()
    assert info["dp_size"] == REPLICAS and [one["dp_rank"] for one in info["internal_states"]] == [0, 1]
    view = server.get("/v1/engine/stats").json()
    assert {"sched.0", "sched.1", "exec.0.0", "exec.1.0", "text", "fsm"} <= {one["name"] for one in view["actors"]}
    # Paused, none of them makes plans; what was asked meanwhile is answered afterwards.
    post(server, "/pause_generation", {"mode": "in_place"})
    with ThreadPoolExecutor() as pool:
        waiting = pool.submit(post, server, "/generate", {"text": ["a"] * 4, "sampling_params": {"max_new_tokens": 2}})
        wait_until(lambda: by_rank(server, "waiting_requests") == [2, 2], 20, "all wait")
        post(server, "/continue_generation", {})
        assert [len(one["output_ids"]) for one in waiting.result().json()] == [2] * 4


def test_all_replicas_get_new_weights(folder: str, tmp_path: Path) -> None:
    stub_folder(tmp_path / "weights/a")
    flags = [*FLAGS, "--model", folder, "--dp-size", str(REPLICAS), "--weights-root", str(tmp_path / "weights")]
    with live_server(tmp_path, *flags) as server:
        wait_until(lambda: all_serve(server), 60, "all replicas serve")
        said = [generate(server, "a", routed_dp_rank=rank)["output_ids"] for rank in range(REPLICAS)]
        assert post(server, "/update_weights_from_disk", {"model_path": "a"}).status_code == 200
        new = [generate(server, "a", routed_dp_rank=rank)["output_ids"] for rank in range(REPLICAS)]
    assert said[0] == said[1] != new[0] == new[1]


def streams_through(server: LiveServer, victim: str, seconds: float = 1.5) -> tuple[list[list[Answer]], float]:
    """(the answers of each replica's streams, how long the engine was short of one), while one actor is killed."""
    bodies = [
        {"prompt": f"{i} hello", "max_tokens": 400, "ignore_eos": True, "seed": i, "logprobs": 1,
         "routed_dp_rank": i % REPLICAS}
        for i in range(8)
    ]  # fmt: skip
    undisturbed = [answer.said(exact=True) for answer in LiveLoad(server.url, bodies).once()]
    before = server.children()
    with LiveLoad(server.url, bodies) as load:
        time.sleep(0.3)
        os.kill(before[victim], signal.SIGKILL)
        killed = time.monotonic()
        wait_until(
            lambda: server.children().get(victim, before[victim]) != before[victim], 30, "another one is spawned"
        )
        assert server.is_ready(), "the other replica serves"
        wait_until(lambda: all_serve(server), 60, "all replicas serve")
        short = time.monotonic() - killed
        time.sleep(seconds)
    assert all(answer.said(exact=True) == undisturbed[number] for number, answer in load.answers)
    after = server.children()
    assert {name for name in before if before[name] != after[name]} == {victim}
    found = [[a for number, a in load.answers if number % REPLICAS == rank] for rank in range(REPLICAS)]
    assert all(len(answers) >= 4 for answers in found)
    return found, short


@pytest.mark.parametrize("victim", ["exec.1.0", "sched.1"])
def test_a_death_is_felt_by_its_replica_alone(server: LiveServer, victim: str) -> None:
    """Streams of the other one do not pause, and nobody's are lost or changed."""
    (spared, hit), short = streams_through(server, victim)
    assert max(answer.pause for answer in hit) > max(answer.pause for answer in spared)
    assert max(answer.pause for answer in spared) < max(0.25, short / 2), (short, victim)
    server.assert_pages_add_up()


def test_new_requests_go_where_they_are_served(server: LiveServer) -> None:
    """While a replica is down; one that insists on it waits for it."""
    pid = server.children()["exec.0.0"]
    os.kill(pid, signal.SIGSTOP)  # so that what it has stands when it dies
    with ThreadPoolExecutor() as pool:
        its_own = pool.submit(generate, server, "a", 3, routed_dp_rank=0)
        wait_until(lambda: by_rank(server, "running_requests")[0] == 1, 20, "it runs")
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: by_rank(server, "executor_up")[0] == 0, 20, "the death is known")
        ready = server.get("/ready").json()
        ranks = [rank_of(server, f"{i} something") for i in range(4)]
        down = by_rank(server, "executor_up")[0] == 0
        reply = its_own.result()
    assert reply["meta_info"]["dp_rank"] == 0 and len(reply["output_ids"]) == 3
    assert ready["status"] == "ok" and ready["reason"].startswith("replica 0: exec.0.0 is down: killed by SIGKILL")
    assert not down or set(ranks) == {1}
    wait_until(lambda: all_serve(server), 60, "all replicas serve")


# ------------------------------------------------------------------ with a model


def test_a_model_in_two_replicas_says_what_it_says_in_one(tmp_path: Path) -> None:
    """Token ids, greedy and drawn, of the embedded engine; each replica computes some of them, and each all of them."""
    model = tiny.save(tiny.build("llama", max_position_embeddings=512), tmp_path)
    settings: dict[str, Any] = {
        "skip_tokenizer_init": True, "device": "cpu", "dtype": "float32", "cpu_threads": 1, "max_total_tokens": 8192,
    }  # fmt: skip
    prompts = [[5 + i, 17, 3, 99, 42 + i, 8] * 4 for i in range(6)]
    asked = [SamplingParams(temperature=t, max_new_tokens=24, ignore_eos=True, seed=3) for t in (0.0, 1.0)]

    def said(engine: SyncEngine, **more: Any) -> list[list[int]]:
        return [output.ids for params in asked for output in engine.generate(prompts, params, **more)]

    torch.set_num_threads(1)
    with Engine.sync(model, placement="inline", **settings) as engine:
        wanted = said(engine)
    with Engine.sync(model, dp_size=2, load_balance_method="round_robin", **settings) as engine:
        assert said(engine) == wanted
        assert engine.stats().pages_total == 2 * 512
        for rank in range(2):
            assert said(engine, dp_rank=rank) == wanted
        with pytest.raises(RequestError, match="no replica 2"):
            said(engine, dp_rank=2)
