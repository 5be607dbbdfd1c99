"""`actorserve plan`: its table, its JSON, its exit codes; no GPU, no torch."""

import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from actorserve import cli
from actorserve.models.shapes import KNOWN


def run(line: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    """(exit code, stdout, stderr)"""
    try:
        code = cli.command(["plan", *shlex.split(line)])
    except SystemExit as ended:
        code = int(str(ended.code))
    out, err = capsys.readouterr()
    return code, out, err


def as_json(line: str, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    code, out, err = run(f"{line} --json", capsys)
    assert (code, err) == (0, "")
    result: dict[str, Any] = json.loads(out)
    return result


def test_table(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run("--model qwen2-7b --gpu h200", capsys)
    assert (code, err) == (0, "")
    assert "weights                     14.19 GiB  static     7,615,616,512 of 2 bytes" in out
    assert "KV: 2,02" in out and "at 56.0 KiB each" in out
    row = next(line.split() for line in out.splitlines() if line.split()[:1] == ["1,024"])
    assert row[2:] == ["256", "59,595", "303", "31,690"]
    assert max(map(len, out.splitlines())) <= 110


def test_replicas_are_counted(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run("--model qwen2-7b --max-total-tokens 160000 --tp-size 2 --dp-size 3", capsys)
    assert (code, err) == (0, "")
    assert "GiB, each of 6" in out.splitlines()[0]
    assert "a replica; 3 of them have 480,000 tokens, and run up to 768 requests at once" in out


def test_machines_are_counted(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run("--model qwen2-7b --max-total-tokens 160000 --dp-size 4 --nnodes 2", capsys)
    assert (code, err) == (0, "") and out.splitlines()[0].endswith("GiB, each of 4 on 2 machines")
    code, out, err = run("--model qwen2-7b --dp-size 3 --nnodes 2", capsys)
    assert (code, out) == (2, "") and "--dp-size 3 does not divide by --nnodes 2" in err


def test_json_adds_up(capsys: pytest.CaptureFixture[str]) -> None:
    plan = as_json("--model qwen2-7b --length 100 2000", capsys)
    assert sum(row["bytes"] for row in plan["memory"]) == plan["total"]
    assert plan["tokens"] == plan["pages"] * plan["page_size"] == plan["pages"] * 16
    assert [row["length"] for row in plan["lengths"]] == [100, 2000]
    assert plan["lengths"][0]["fit"] == plan["pages"] // 7
    assert plan["lengths"][0]["run"] == 256


def test_settings_of_run_count(capsys: pytest.CaptureFixture[str]) -> None:
    base = as_json("--model llama-3.1-8b --gpu a100-80g", capsys)
    fp8 = as_json("--model llama-3.1-8b --gpu a100-80g --kv-cache-dtype fp8_e4m3", capsys)
    assert fp8["pages"] / base["pages"] == pytest.approx(2, rel=1e-3)
    exact = as_json("--model llama-3.1-8b --gpu a100-80g --dtype float32 --kv-cache-dtype float16", capsys)
    assert exact["page_bytes"] == base["page_bytes"], "weights in bfloat16 stay so, too"
    assert [row["bytes"] for row in exact["memory"][:2]] == [row["bytes"] for row in base["memory"][:2]]
    less = as_json("--model llama-3.1-8b --gpu a100-80g --mem-fraction-static 0.5", capsys)
    assert less["pages"] < base["pages"] / 2
    short = as_json("--model llama-3.1-8b --context-length 1000 --max-running-requests 8", capsys)
    assert short["pages"] == 8 * 63 and short["context_length"] == 1000
    ranks = as_json("--model qwen2-72b --tp-size 4", capsys)
    assert ranks["tp_size"] == 4 and ranks["fits"]
    replicas = as_json("--model qwen2-72b --tp-size 4 --dp-size 2", capsys)
    assert replicas == ranks | {"dp_size": 2}, "each replica is as one without others"


def test_without_a_model_it_is_the_embedded_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert as_json("", capsys)["model"] == "smollm2-135m"


def test_any_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Weights and tokenizer need not be there; --dtype auto is the checkpoint's."""
    config = KNOWN["qwen2-0.5b"] | {"torch_dtype": "float32"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    plan = as_json(f"--model {tmp_path} --gpu l4", capsys)
    assert plan["dtype"] == "float32"
    assert "decode_floor_1" not in plan["lengths"][0], "the known peak is that of 16 bits"
    assert as_json(f"--model {tmp_path} --dtype float16", capsys)["dtype"] == "float16"


def test_a_gpu_by_its_memory(capsys: pytest.CaptureFixture[str]) -> None:
    plan = as_json("--model qwen2-7b --gpu-memory 48", capsys)
    assert plan["total"] == 48 << 30
    assert "prefill_floor" not in plan["lengths"][0]
    plan = as_json("--model qwen2-7b --gpu h100 --gpu-memory 94", capsys)
    assert plan["total"] == 94 << 30 and "prefill_floor" in plan["lengths"][0]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("--model qwen2-72b", "lacking for a single KV page; what helps: --tp-size 2"),
        ("--model qwen2-72b --gpu h200 --gpu-memory 150", "what helps: --mem-fraction-static 0.92, or --tp-size 2"),
        ("--model llama-3.1-8b --gpu-memory 17.6", "--mem-fraction-static 0.9"),
        ("--model qwen2-7b --gpu-memory 3", "no single setting helps: it needs a larger GPU"),
        ("--model qwen2-7b --gpu a10g --max-total-tokens 90000", "90,000 tokens of KV; what helps: "),
    ],
)
def test_what_does_not_fit(line: str, says: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(line, capsys)
    assert code == 1
    assert "does not fit" in err and says in err and err.count("\n") == 1
    assert "weights" in out
    code, out, _ = run(f"{line} --json", capsys)
    assert code == 1 and not json.loads(out)["fits"] and json.loads(out)["missing"] > 0


def test_what_helps_does_help(capsys: pytest.CaptureFixture[str]) -> None:
    line = "--model qwen2-7b --gpu a10g --max-total-tokens 150000"
    _, _, err = run(line, capsys)
    remedies = [part for part in err.split("what helps: ")[1].strip().split(", or ") if "--tp" not in part]
    assert len(remedies) >= 2
    for remedy in remedies:
        assert run(f"{line} {remedy}", capsys)[0] == 0, remedy


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--gpu h20", "argument --gpu: invalid choice: 'h20'"),
        ("--gpu-memory 0", "argument --gpu-memory: a size in GiB is needed"),
        ("--gpu-memory nan", "argument --gpu-memory: a size in GiB is needed"),
        ("--length 0", "argument --length: must be at least 1"),
        ("--length 9000", "9000 is more than the context of 8192 tokens"),
        ("--model qwen2-7b --tp-size 3", "--tp-size 3 does not divide 28 attention heads"),
        ("--model qwen2-9b", "--model qwen2-9b: no such file or folder"),
        ("--model qwen2-7b --context-length 99999", "--context-length 99999 is more than the model's 32768"),
        ("--mem-fraction-static 2", "argument --mem-fraction-static: expected `float` < 1.0"),
        ("--nonsense", "unrecognized arguments: --nonsense"),
    ],
)
def test_mistakes_are_one_line(line: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(line, capsys)
    assert (code, out) == (2, "")
    assert err.startswith("actorserve: ") and message in err and err.count("\n") == 1


def test_a_family_that_is_not_served(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text(json.dumps(KNOWN["qwen2-7b"] | {"model_type": "mamba"}))
    code, _, err = run(f"--model {tmp_path}", capsys)
    assert code == 2 and "model_type 'mamba' is not served yet" in err


def test_no_torch() -> None:
    code = "from actorserve import cli; import sys; cli.command(['plan']); assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
