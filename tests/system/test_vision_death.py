"""A vision-language model in processes of its own: kill -9 of each while it answers over HTTP, and two ranks."""

import os
import signal
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
from live_server import LiveServer, live_server, wait_until
from tiny_vlm import data_url, picture, png, tiny_vlm

import actorserve

KINDS = ["llava_next", "qwen2_vl"]
STEPS = 300
IMAGES = [picture(i, 40 + 10 * i, 60) for i in range(4)]


def ask(server: LiveServer, i: int) -> dict[str, Any]:
    """About one image, or two."""
    shown = [{"type": "image_url", "image_url": {"url": data_url(image)}} for image in IMAGES[i : i + 1 + i % 2]]
    messages = [{"role": "user", "content": [*shown, {"type": "text", "text": f"What is it? {i}"}]}]
    body = {"messages": messages, "max_tokens": STEPS, "temperature": 0, "ignore_eos": True}
    reply = httpx.post(server.url + "/v1/chat/completions", json=body, timeout=120)
    assert reply.status_code == 200, reply.text
    answer: dict[str, Any] = reply.json()
    return answer


def begun(server: LiveServer, answer: "Future[dict[str, Any]]") -> bool:
    return answer.done() or server.metrics()["actorserve_running_requests"] > 0


def text(answer: dict[str, Any]) -> str:
    return str(answer["choices"][0]["message"]["content"])


@pytest.mark.parametrize("kind", KINDS)
def test_answers_survive_every_death(kind: str, tmp_path: Path, thorough: bool) -> None:
    if not thorough:
        pytest.skip("two starts' worth of processes: --thorough")
    vlm = tiny_vlm(kind, tmp_path / "model")
    flags = ("--model", vlm.folder, "--dtype", "float32", "--max-total-tokens", "8192", "--device", "cpu")
    with live_server(tmp_path, *flags) as server, ThreadPoolExecutor(8) as pool:
        undisturbed = [text(ask(server, i)) for i in range(3)]
        again = ask(server, 0)
        usage = again["usage"]
        assert usage["prompt_tokens_details"]["cached_tokens"] == usage["prompt_tokens"] - 1
        assert text(again) == undisturbed[0]
        for node in ("exec.0", "sched", "text"):
            answers = [pool.submit(ask, server, i % 3) for i in range(6)]
            wait_until(partial(begun, server, answers[-1]), 30, "they run")
            pid = server.children()[node]
            os.kill(pid, signal.SIGKILL)
            assert [text(answer.result()) for answer in answers] == undisturbed * 2, node
            wait_until(lambda node=node, pid=pid: server.children().get(node, pid) != pid, 30, f"{node} is back")
            wait_until(server.is_ready, 60, "the server is ready again")


@pytest.mark.parametrize("kind", KINDS)
def test_every_rank_gets_the_images(kind: str, tmp_path: Path, thorough: bool) -> None:
    if not thorough:
        pytest.skip("processes for two ranks: --thorough")
    vlm = tiny_vlm(kind, tmp_path / "model")
    settings = {"tp_size": 2, "cpu_threads": 1, "device": "cpu", "dtype": "float32", "max_total_tokens": 2048}
    greedy = {"temperature": 0.0, "max_new_tokens": 6, "ignore_eos": True}
    with actorserve.Engine.sync(vlm.folder, chunked_prefill_size=24, **settings) as engine:
        files, text = [png(image) for image in IMAGES[:2]], "A <image> and <image>."
        outputs = [engine.generate(text, image_data=files, **greedy) for _ in range(2)]
    expected = vlm.greedy(text, IMAGES[:2], 6)
    assert [output.ids for output in outputs] == [expected, expected]
    assert outputs[1].cached_tokens == outputs[1].prompt_tokens - 1
