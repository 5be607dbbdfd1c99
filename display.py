"""What `actorserve run` shows of its start: bars on a terminal, a few plain lines in a log. Used by serve.py,
talk.py, and for its colours by chat.py and doctor.py.

Progress goes to stderr; the address and the line to paste, once the engine is up, to stdout. Invariant: nothing is
drawn after that, so that log lines are never mixed with bars. A reader that is gone, or a full disk, stops no engine.
"""

import os
import sys
import time
from contextlib import suppress
from typing import Any, Self, TextIO

TRANSFERS = {
    "download": "downloading the embedded model",
    "fetch": "downloading the model",
    "convert": "converting the model (once)",
    "wait": "waiting for another process that prepares this model",
}


def has_colours(out: TextIO) -> bool:
    """Whether escape sequences are understood there, and wanted."""
    return out.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


class Display:
    """One bar at a time for files; one for each actor that reports how far its start is."""

    def __init__(self) -> None:
        self._terminal = sys.stderr.isatty()
        self._began = time.monotonic()
        self._bars: dict[str, Any] = {}
        self._said: set[str] = set()
        self._over = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._clear()

    def line(self, text: str) -> None:
        """A line on stderr, in the place of the bars."""
        self._clear()
        with suppress(OSError):
            print(text, file=sys.stderr, flush=True)

    def transfer(self, stage: str, done: int, total: int) -> None:
        """A models.cache.Progress: bytes of a download or a conversion."""
        label = TRANSFERS.get(stage, stage)
        if not self._terminal or not total:
            self._say_once(f"{label} ({total / 1e6:.0f} MB)" if total else label)
            return
        if stage not in self._bars:
            self._clear()
        self._draw(stage, label, done, total, unit="B", unit_scale=True)

    def event(self, kind: str, node: str, detail: str, fraction: float) -> None:
        """An actors.supervisor.OnEvent: how far the actors' start is."""
        if self._over:
            return
        if kind == "progress" and self._terminal:
            self._draw(node, f"starting {detail or node}", round(100 * fraction), 100, bar_format="{l_bar}{bar:30}|")
        elif kind == "progress":
            self._say_once(f"starting {detail or node}")
        elif kind == "spawn":
            self._say_once("starting the actors")
        elif kind == "ready" and node in self._bars:
            self._bars.pop(node).close()
        elif kind == "down":
            self.line(f"actorserve: {node} failed to start: {detail}")
        elif kind == "stopping":  # whoever leaves from now on has not failed
            self._clear()
            self._over = True

    def greet(self, text: str) -> None:
        """The engine is up: no more bars. `text` goes to stdout."""
        self._clear()
        if self._over:
            return
        self._over = True
        with suppress(OSError):
            print(text, flush=True)
            if sys.stdout.isatty():
                print(f"up after {time.monotonic() - self._began:.1f} s; Ctrl-C stops it", flush=True)

    def _say_once(self, text: str) -> None:
        if text not in self._said:
            self._said.add(text)
            self.line(text)

    def _draw(self, key: str, label: str, done: int, total: int, **style: Any) -> None:
        from tqdm import tqdm

        tqdm.monitor_interval = 0  # its watchdog thread has no business in the process that forks the actors
        bar = self._bars.get(key)
        if bar is None:
            style |= {"leave": False, "dynamic_ncols": True, "mininterval": 0.05, "file": sys.stderr}
            bar = self._bars[key] = tqdm(total=total, desc=label, **style)
        bar.set_description(label, refresh=False)
        bar.update(done - bar.n)

    def _clear(self) -> None:
        for bar in self._bars.values():
            bar.close()
        self._bars.clear()
