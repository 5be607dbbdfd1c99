"""Profiles whose folder is gone, or full, when they end."""

import errno
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import trio

from actorserve.actors.profiler import ProfileOptions, Profiler
from actorserve.errors import RequestError


class Profile:
    """Torch's, without the second that it takes to begin."""

    def __init__(self, **options: Any) -> None:
        pass

    def start(self) -> None:
        pass

    def stop(self) -> None:
        pass

    def export_chrome_trace(self, file: str) -> None:
        if "full" in file:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        Path(file).write_text("{}")


def test_what_cannot_be_written_is_refused_and_the_next_one_can_begin(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It took the executor with it, and what ran there."""
    monkeypatch.setattr(torch.profiler, "profile", Profile)
    gone = tmp_path / "gone"
    for folder in (gone, tmp_path / "full"):
        profiler = Profiler(str(folder), "exec.0")
        profiler.start(ProfileOptions(activities=("CPU",)))
        if folder == gone:
            gone.rmdir()
        with pytest.raises(RequestError, match="cannot be used: No s") as refused:
            trio.run(profiler.stop)
        assert refused.value.code == "no_profile_dir"
        shutil.rmtree(folder, ignore_errors=True)
        profiler.start(ProfileOptions(activities=("CPU",)))
