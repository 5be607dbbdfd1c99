"""The benchmarks of the whole engine, on a tiny model with dummy weights: they run, and count what they asked for."""

import asyncio
import json
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from actorserve.config import EngineConfig
from actorserve.perf import engines, offline, serve
from actorserve.perf.processes import launched
from actorserve.perf.shapes import main as shapes
from actorserve.perf.shapes import model_folder, shape_folder

TINY = (
    "hidden_size=64", "num_hidden_layers=2", "num_attention_heads=4", "num_key_value_heads=2", "intermediate_size=128",
    "vocab_size=512",
)  # fmt: skip
ENGINE = ["--load-format", "dummy", "--skip-tokenizer-init", "--device", "cpu", "--max-total-tokens", "8000"]
ENGINE += ["--cpu-threads", "1"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(shape_folder("smollm2-135m", tmp_path_factory.mktemp("tiny"), TINY))


def test_shapes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shapes(["qwen2-0.5b", str(tmp_path / "x"), "--set", "num_hidden_layers=3"])
    assert capsys.readouterr().out.strip() == str(tmp_path / "x")
    config = json.loads((tmp_path / "x" / "config.json").read_text())
    assert (config["num_hidden_layers"], config["hidden_size"]) == (3, 896)
    with pytest.raises(SystemExit):
        shapes(["qwen2-0.5b", str(tmp_path / "y"), "--set", "num_hidden_layers"])
    with model_folder("qwen2-7b") as folder:
        assert (Path(folder) / "config.json").exists()
    assert not Path(folder).exists()
    with model_folder(str(tmp_path)) as folder:
        assert folder == str(tmp_path)


@pytest.mark.parametrize("placement", ["process", "inline"])
def test_offline(tiny: str, placement: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "out.json"
    workload = ["--num-prompts", "6", "--input-len", "40", "--output-len", "20", "--random-range-ratio", "0.5"]
    more = ["--max-running-requests", "4", "--placement", placement, "--repeat", "3", "--json", str(file)]
    offline.main(["--model", tiny, *ENGINE, *workload, *more])
    figures = json.loads(file.read_text())
    args, _ = offline.parse(["--model", tiny, *workload])
    lengths = offline.lengths_of(args)
    assert all(20 <= i <= 40 and 10 <= o <= 20 for i, o in lengths)
    assert figures["total_output_tokens"] == sum(o for _, o in lengths)
    assert figures["total_num_tokens"] == sum(i + o for i, o in lengths)
    assert figures["elapsed_time"] == sorted(figures["all_elapsed_times"])[1]
    assert figures["max_running_requests"] == 4
    assert 0 < figures["floor_seconds"] < figures["elapsed_time"]
    assert set(figures["cpu_shares"]) >= (
        {"client", "exec.0", "sched", "text"} if placement == "process" else {"client"}
    )
    assert "share of the floor" in capsys.readouterr().out


def test_runs_begin_when_executors_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    """Offline's pause: as long as an executor computes, and no longer than it may be."""
    seen, slept = [0.9, 0.2, 0.01, 0.0], list[float]()

    class Shares:
        def __init__(self, root: int | None) -> None:
            self.shares = {"exec.0": 0.0, "exec.1": seen[len(slept)], "text": 0.5} if root else {}

        def __enter__(self) -> "Shares":
            return self

        def __exit__(self, *_: object) -> None: ...

    async def sleep(seconds: float) -> None:
        slept.append(seconds)

    monkeypatch.setattr(offline, "CpuShares", Shares)
    monkeypatch.setattr(offline, "asyncio", SimpleNamespace(sleep=sleep))
    monkeypatch.setattr(offline, "time", SimpleNamespace(monotonic=lambda: sum(slept)))
    engine: Any = SimpleNamespace(_root=SimpleNamespace(pid=7))
    asyncio.run(offline.settle(engine, 60))
    assert len(slept) == 3
    slept.clear()
    engine._root = None
    asyncio.run(offline.settle(engine, 2))
    assert sum(slept) == 2
    slept.clear()
    asyncio.run(offline.settle(engine, 60))
    assert sum(slept) == 10


def test_offline_warm_up_has_every_batch_size() -> None:
    args, _ = offline.parse(["--num-prompts", "512", "--input-len", "1024"])
    lengths = offline.warmup_lengths(args, 256)
    assert [i for i, _ in lengths] == [1024] * 256
    ends = [i // 8 + o for i, (_, o) in enumerate(lengths)]  # steps, of which each of the first has eight prompts
    assert min(ends) >= 256 // 8 and max(o for _, o in lengths) == 288
    args.output_len = 7
    assert max(o for _, o in offline.warmup_lengths(args, 256)) == 7
    assert {sum(end > step for end in ends) for step in range(max(ends))} == set(range(1, 257))


def test_offline_without_a_model_has_dummy_weights() -> None:
    args, config = offline.parse([])
    assert offline.settings_of(args, config, "folder")["load_format"] == "dummy"


def test_offline_knows_how_many_run() -> None:
    assert offline.most_running(EngineConfig(device="cpu")) == 64
    assert offline.most_running(EngineConfig(device="cpu", max_running_requests=7)) == 7
    assert offline.most_running(EngineConfig(load_format="stub")) == 256


def test_no_prompt_of_a_load_was_in_another(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Else the server that measures several, warm-up first, has them in its prefix cache, and another has not."""
    sent: list[str] = []
    file = tmp_path / "load.json"

    def run(command: list[str], **_: object) -> None:
        sent.extend(serve.make_prompts(serve.parse(command[3:])))  # type: ignore[arg-type]
        file.write_text("{}")

    monkeypatch.setattr(subprocess, "run", run)
    for clients, tokens in ((2, 8), (1, 128), (2, 128), (8, 128)):
        engines.load("http://localhost", clients, tokens, 64, file)
    assert len(sent) == len(set(sent)) == 28


def test_serve_starts_a_server_and_measures_it(tiny: str) -> None:
    workload = ["--num-prompts", "8", "--random-input-len", "20", "--random-output-len", "30", "--clients", "2"]
    args = serve.parse(["--launch", " ".join(["--model", tiny, *ENGINE]), "--shape", tiny, *workload])
    assert (args.api, args.vocab_size) == ("generate", 512)
    figures = serve.run(args)
    assert (figures["completed"], figures["failed"]) == (8, 0), figures["errors"]
    assert (figures["total_input_tokens"], figures["total_output_tokens"]) == (160, 240)
    assert 0 < figures["startup_seconds"] < figures["first_token_seconds"]
    assert 0 < figures["share_of_floor"] < 1
    assert figures["cpu_shares"]["exec.0"] > 0
    assert "exec.0" in serve.report(figures)


def test_serve_join(tiny: str) -> None:
    workload = ["--join", "--max-concurrency", "3", "--random-input-len", "20", "--random-output-len", "4000"]
    joining = ["--join-count", "2", "--join-every", "0.2", "--join-settle", "0.8", "--join-input-len", "30"]
    args = serve.parse(["--launch", " ".join(["--model", tiny, *ENGINE]), "--shape", tiny, *workload, *joining])
    figures = serve.run(args)
    assert (figures["streams"], figures["joined"], figures["failed"]) == (3, 2, 0), figures["errors"]
    assert figures["p50_join_ttft_ms"] > 0 and figures["p50_joining_itl_ms"] > 0
    assert figures["stream_context"] > 20


def test_a_server_that_does_not_start_is_quoted() -> None:
    with pytest.raises(RuntimeError, match="no such file or folder"), launched("--model /no/where"):
        pass
