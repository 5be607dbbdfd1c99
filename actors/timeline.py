"""Timelines: when what happened to each request, in the scheduler's eyes, kept for who asks while it runs or later.

Used by the scheduler, whatever clients want: a request costs one object, a window one more and a reference from each
of its rows. Invariant: nothing of this decides anything, and memory is bounded by MOST requests of MOST_WINDOWS.
"""

from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Final

from .messages import AskTimelines, Submit, Timelines, TimelineView, WindowView
from .request import Request
from .window import PrefillChunk, Window

MOST: Final = 2048
"""Requests whose timelines are kept; the oldest go first."""
MOST_WINDOWS: Final = 256
"""Of one request, the newest."""
MOST_ANSWERED: Final = 128
"""Timelines in one answer."""


@dataclass(slots=True, eq=False)
class WindowTimes:
    """A window; times CLOCK_MONOTONIC ns. `done_ns`: when its last step was reported, 0 before."""

    number: int
    k: int
    rows: int
    """Requests that decode in it."""
    prompt_tokens: int
    """Tokens of prompts that it computes."""
    planned_ns: int
    done_ns: int = 0


@dataclass(slots=True, eq=False)
class Timeline:
    """One request; times CLOCK_MONOTONIC ns, 0 for what has not happened."""

    rid: int
    name: str
    tenant: str
    arrival_ns: int
    tokenized_ns: int
    queued_ns: int
    prompt_tokens: int
    cached_tokens: int = 0
    admitted_ns: int = 0
    prefill_start_ns: int = 0
    prefill_end_ns: int = 0
    first_token_ns: int = 0
    ended_ns: int = 0
    retractions: int = 0
    windows: deque[WindowTimes] = field(default_factory=lambda: deque(maxlen=MOST_WINDOWS))
    count: int = 0
    """Its windows, also those that are not kept."""


class TimelineStore:
    """The timelines of one scheduler's life."""

    def __init__(self) -> None:
        self._all: OrderedDict[int, Timeline] = OrderedDict()
        self._named: dict[str, list[Timeline]] = {}
        self._windows: dict[int, WindowTimes] = {}
        """Those in flight."""
        self._ending: dict[int, list[tuple[Timeline, bool]]] = {}
        """Of those, whose prompts are computed to their ends in them, and who gets its first token with that."""

    def queued(self, m: Submit, now: int) -> None:
        """A request came."""
        made = Timeline(m.rid, m.name, m.tenant, m.arrival_ns, m.tokenized_ns, now, len(m.ids) // 4)
        self._forget(self._all.pop(m.rid, None))
        self._all[m.rid] = made
        if m.name:
            self._named.setdefault(m.name, []).append(made)
        if len(self._all) > MOST:
            self._forget(self._all.popitem(last=False)[1])

    def planned(self, window: Window, rows: Iterable[Request], now: int) -> None:
        """A window is sent; `rows`: the requests that decode in it."""
        chunks = window.chunks
        times = WindowTimes(window.number, window.k, 0, sum(c.end - c.start for c in chunks), now)
        self._windows[window.number] = times
        for seat in window.admits:
            if (timeline := self._all.get(seat.request.rid)) is not None:
                timeline.retractions = seat.request.admissions - 1
                if not timeline.admitted_ns:
                    timeline.admitted_ns = now
                    timeline.cached_tokens = min(seat.cached, seat.request.prompt_length)
        for chunk in chunks:
            if (timeline := self._all.get(chunk.request.rid)) is not None:
                self._computes(timeline, times, chunk)
        for request in rows:
            times.rows += 1
            timeline = self._all.get(request.rid)
            if timeline is not None and (not timeline.windows or timeline.windows[-1] is not times):
                timeline.windows.append(times)
                timeline.count += 1

    def _computes(self, timeline: Timeline, times: WindowTimes, chunk: PrefillChunk) -> None:
        timeline.prefill_start_ns = timeline.prefill_start_ns or times.planned_ns
        timeline.windows.append(times)
        timeline.count += 1
        if chunk.end >= chunk.request.target and not timeline.prefill_end_ns:
            self._ending.setdefault(times.number, []).append((timeline, chunk.draws))

    def stepped(self, number: int, step: int, rids: list[int], ended: Iterable[int], now: int) -> None:
        """A step of a window was reported, with tokens of these requests; `ended`: rows that are their last."""
        if not step:
            for timeline, draws in self._ending.pop(number, ()):
                timeline.prefill_end_ns = now
                timeline.first_token_ns = now if draws else 0
        times = self._windows.get(number)
        if times is not None and step == times.k - 1:
            times.done_ns = now
            del self._windows[number]
        for row in ended:
            self.ended(rids[row], now)

    def ended(self, rid: int, now: int) -> None:
        """A request got its last token, or was given up."""
        if (timeline := self._all.get(rid)) is not None and not timeline.ended_ns:
            timeline.ended_ns = now

    def executor_lost(self) -> None:
        """The windows in flight never end."""
        self._windows.clear()
        self._ending.clear()

    def answer(self, m: AskTimelines) -> Timelines:
        """Return the timelines of a name: those of its last use, oldest first; empty if there is none."""
        found = [one for one in self._named.get(m.name, ()) if m.tenant is None or one.tenant == m.tenant]
        newest = max((one.arrival_ns for one in found), default=0)
        last = (one for one in found if one.arrival_ns == newest)
        return Timelines(m.rid, [_view(one) for one in islice(last, MOST_ANSWERED)])

    def __iter__(self) -> Iterator[Timeline]:
        return iter(self._all.values())

    def _forget(self, timeline: Timeline | None) -> None:
        if timeline is None or not timeline.name:
            return
        same = self._named[timeline.name]
        same.remove(timeline)
        if not same:
            del self._named[timeline.name]


def _view(one: Timeline) -> TimelineView:
    return TimelineView(
        one.rid,
        one.arrival_ns,
        one.tokenized_ns,
        one.queued_ns,
        one.admitted_ns,
        one.prefill_start_ns,
        one.prefill_end_ns,
        one.first_token_ns,
        one.ended_ns,
        one.prompt_tokens,
        one.cached_tokens,
        one.retractions,
        one.count - len(one.windows),
        [WindowView(w.number, w.k, w.rows, w.prompt_tokens, w.planned_ns, w.done_ns) for w in one.windows],
    )
