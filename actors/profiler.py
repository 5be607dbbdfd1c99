"""Profiler: torch's, around an executor's steps, for /start_profile and /stop_profile.

Owned by the executor, called from its loop's thread, in which torch wants a profile begun and ended. Invariant: files
are written to --profile-dir and nowhere else, under names that are made here; at most one profile runs.
"""

import time
from pathlib import Path
from typing import Any, Final, Literal

import msgspec
import trio

from ..errors import RequestError

MOST_STEPS: Final = 10_000
"""Of one profile: its events are in memory until its end."""


class ProfileOptions(msgspec.Struct, frozen=True):
    """`num_steps`: end by itself after so many; `activities`: default all that the device has."""

    num_steps: int | None = None
    activities: tuple[Literal["CPU", "GPU"], ...] | None = None
    with_stack: bool = False
    record_shapes: bool = False


class Profiler:
    """See the module's text."""

    def __init__(self, folder: str | None, name: str) -> None:
        self._folder = folder
        self._name = name
        self._profile: Any = None
        self._left = 0

    def start(self, options: ProfileOptions) -> None:
        """Begin. Raises RequestError: no folder was given, one runs already, or the folder cannot be made."""
        import torch
        from torch.profiler import ProfilerActivity, profile

        if self._folder is None:
            raise RequestError("start the server with --profile-dir FOLDER to profile it", code="no_profile_dir")
        if self._profile is not None:
            raise RequestError("a profile is running already", code="already_profiling", status=409)
        try:
            Path(self._folder).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RequestError(f"--profile-dir cannot be used: {error.strerror}", code="no_profile_dir") from None
        wanted = options.activities or ("CPU", "GPU")
        activities = [ProfilerActivity.CPU] if "CPU" in wanted else []
        if "GPU" in wanted and torch.cuda.is_available():
            activities.append(ProfilerActivity.CUDA)
        if not activities:
            raise RequestError("there is no GPU here", param="activities", code="unsupported_value")
        self._left = min(options.num_steps or MOST_STEPS, MOST_STEPS)
        self._profile = profile(
            activities=activities, record_shapes=options.record_shapes, with_stack=options.with_stack
        )
        self._profile.start()

    def ran(self, steps: int) -> bool:
        """So many steps were launched; True when that was the last that a running profile wanted."""
        if self._profile is None:
            return False
        self._left -= steps
        return self._left <= 0

    async def stop(self) -> str:
        """End it; return the name of its file once that is written.

        Raises RequestError: none runs, or its file cannot be written. Nothing of it is left then.
        """
        ended, self._profile = self._profile, None
        if ended is None:
            raise RequestError("no profile is running", code="not_profiling")
        ended.stop()
        moment = time.strftime("%Y%m%d-%H%M%S", time.gmtime())
        file = f"{moment}-{time.monotonic_ns() % 1_000_000:06d}-{self._name}.trace.json.gz"
        assert self._folder is not None
        try:
            await trio.to_thread.run_sync(ended.export_chrome_trace, str(Path(self._folder) / file))
        except OSError as error:
            raise RequestError(f"--profile-dir cannot be used: {error.strerror}", code="no_profile_dir") from None
        return file
