"""`actorserve doctor`: what it says of this machine, and of machines that lack something."""

import json
import socket
from pathlib import Path
from typing import Any

import pytest

from actorserve import cli, doctor
from actorserve.errors import StartupError
from actorserve.models.cpu_kernels import cpu_kernels_or_none
from actorserve.perf.engines import free_port


def look(capsys: Any, *flags: str) -> tuple[int, dict[str, tuple[str, str]]]:
    """(exit code, {subject: (state, text)}), the last of each subject."""
    code = cli.command(["doctor", "--json", "--port", "0", "--device", "cpu", *flags])
    out, err = capsys.readouterr()
    assert err == ""
    return code, {f["subject"]: (f["state"], f["text"]) for f in json.loads(out)}


@pytest.fixture
def model(tmp_path: Path) -> str:
    from actorserve.models.shapes import write_shape

    return str(write_shape("qwen2-7b", tmp_path / "m"))


def test_a_machine_that_will_do(capsys: Any, model: str) -> None:
    code, found = look(capsys, "--model", model, "--load-format", "dummy")
    assert code == 0 and {state for state, _ in found.values()} <= {"ok", "warn"}
    assert list(found) == [
        "system", "packages", "lanes", "files", "cache", "model", "device", "dtype", "attention", "kernels", "port",
    ]  # fmt: skip
    assert "qwen2" in found["model"][1] and found["device"][1].endswith("as asked")
    ours = cpu_kernels_or_none() is not None
    assert found["attention"] == ("ok", "our C kernels" if ours else "torch's operations")
    found = look(capsys, "--model", model, "--load-format", "dummy", "--attention-backend", "torch")[1]
    assert found["attention"] == ("ok", "torch's operations")
    found = look(capsys, "--model", model, "--load-format", "dummy", "--dtype", "bfloat16")[1]
    assert found["dtype"][1].startswith("bfloat16 for weights and inputs of products" if ours else "bfloat16: as asked")


def test_ranks_and_replicas(capsys: Any, model: str) -> None:
    flags = ("--model", model, "--load-format", "dummy", "--tp-size", "2", "--dp-size", "3", "--device", "cpu")
    code, found = look(capsys, *flags)
    assert code == 0 and found["ranks"][1].startswith("2 processes") and found["replicas"][1].startswith("3 that share")
    code, found = look(capsys, *flags, "--placement", "inline")
    assert code == 1 and found["model"][0] == "fail" and "--dp-size needs --placement process" in found["model"][1]


def test_machines(capsys: Any, model: str, tmp_path: Path) -> None:
    (tmp_path / "key").write_text("k" * 32)
    address = f"127.0.0.1:{free_port()}"
    flags = ["--model", model, "--load-format", "dummy", "--device", "cpu", "--dp-size", "4", "--nnodes", "2"]
    code, found = look(capsys, *flags)
    assert code == 1 and found["machines"][0] == "fail" and "--dist-init-addr is needed" in found["machines"][1]
    flags += ["--dist-init-addr", address, "--node-key-file", str(tmp_path / "key")]
    code, found = look(capsys, *flags)
    assert code == 0 and found["machines"][1].startswith(f"node 0 of 2, 2 of 4 replicas; {address} is free")
    assert found["replicas"][1].startswith("2 that share")
    code, found = look(capsys, *flags, "--node-rank", "1")
    assert code == 0 and "port" not in found and f"joins node 0 at {address}" in found["machines"][1]
    with socket.create_server(("127.0.0.1", int(address.rpartition(":")[2]))):
        code, found = look(capsys, *flags)
    assert code == 1 and "cannot wait for other machines at --dist-init-addr" in found["machines"][1]
    assert look(capsys, "--dp-size", "1", "--nnodes", "2", "--model", model, "--load-format", "dummy")[0] == 1


def test_a_model_that_gives_vectors(capsys: Any, tmp_path: Path) -> None:
    facts = {"model_type": "bert", "vocab_size": 100, "hidden_size": 48, "num_hidden_layers": 1}
    facts |= {"num_attention_heads": 6, "intermediate_size": 64, "max_position_embeddings": 64}
    (tmp_path / "config.json").write_text(json.dumps(facts))
    code, found = look(capsys, "--model", str(tmp_path), "--load-format", "dummy")
    assert code == 0 and found["model"][0] == "ok"
    assert "64 tokens of context; gives embeddings of 48 numbers, no text" in found["model"][1]


def test_lines_for_people(capsys: Any, model: str) -> None:
    flags = ["--port", "0", "--device", "cpu", "--model", model, "--load-format", "dummy", "--dtype", "float32"]
    assert cli.command(["doctor", *flags]) == 0
    out = capsys.readouterr().out
    assert "ok    dtype       float32: as asked\n" in out and "\x1b" not in out
    assert out.endswith("actorserve run starts here\n")


def test_it_asks_what_decides(capsys: Any, model: str) -> None:
    """What would keep `run` from starting fails here, with the same words."""
    wrong = ["--model", model, "--load-format", "dummy", "--attention-backend", "triton"]
    code, found = look(capsys, *wrong)
    assert (code, found["attention"]) == (1, ("fail", "--attention-backend triton needs a GPU"))
    code, found = look(capsys, "--model", "/no/such/model")
    assert code == 1 and found["model"][0] == "fail" and "no such file" in found["model"][1]
    assert found["kernels"][0] in ("ok", "warn"), "one failure does not hide the rest"
    code, found = look(capsys, "--host", "no-such-host.invalid")
    assert found["port"][0] == "fail"
    with socket.create_server(("127.0.0.1", 0)) as taken:
        code, found = look(capsys, "--port", str(taken.getsockname()[1]))
    assert (code, found["port"][0]) == (1, "fail") and "--port" in found["port"][1]


def test_machines_that_lack_something(capsys: Any, monkeypatch: Any, model: str) -> None:
    def no_compiler() -> str:
        raise StartupError("there is no C compiler")

    monkeypatch.setattr("actorserve.models.cpu_kernels.kernels", no_compiler)
    monkeypatch.setattr(doctor, "_version", lambda name: None if name == "trio" else "999")
    monkeypatch.setattr(doctor.metadata, "requires", lambda name: ["trio>=0.35", "numpy<2", "rich; extra == 'dev'"])
    monkeypatch.setattr(doctor.resource, "getrlimit", lambda which: (256, 4096))
    monkeypatch.setattr("actorserve.actors.lane.create_lane", lambda: 1 / 0)
    findings = list(doctor.examine(cli.config_from(cli.build_parsers()[0].parse_args(["run"]), cli.build_parsers()[1])))
    said = {(f.state, f.subject, f.text) for f in findings}
    assert ("fail", "packages", "trio is missing: pip install 'trio>=0.35'") in said
    assert any(f.subject == "packages" and "numpy 999, not <2" in f.text for f in findings)
    assert not any("rich" in f.text for f in findings)
    by_name = {f.subject: f for f in findings}
    assert by_name["files"].state == by_name["kernels"].state == "warn"
    assert "slower" in by_name["kernels"].text and "ulimit -n 4096" in by_name["files"].text
    assert by_name["lanes"] == ("fail", "lanes", "ZeroDivisionError: division by zero"), "no traceback, whatever fails"
    code, found = look(capsys, "--quantization", "gguf", "--model", model, "--load-format", "dummy")
    assert (code, found["kernels"][0]) == (1, "fail")
