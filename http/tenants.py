"""Tenants: what each API key uses of the engine, and the engine as a request of a tenant sees it.

Made by app.py, one Tenant a key for the life of the front and one TenantClient a request. Invariant: what a request was
counted for is settled when it ends, however it ends; a tenant's prefixes, and its requests, are its own.
"""

import time
from collections.abc import Callable, Iterable, Sequence
from typing import Final

from ..actors.admission import Submission
from ..actors.client import Client
from ..actors.messages import GrammarSpec, Prompt, Stats, TimelineView
from ..actors.questions import Questions
from ..actors.stream import Stream
from ..errors import Overloaded, RequestError
from ..sampler.params import SamplingParams
from .api_keys import Key

MINUTE: Final = 60.0


class TokenBucket:
    """Tokens that may be used: refilled evenly, a minute's worth at most. It may be overdrawn, for what a request will
    need is known at its end; until the debt is paid, `wait` is above 0.
    """

    def __init__(self, per_minute: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._rate = per_minute / MINUTE
        self._most = float(per_minute)
        self._left = float(per_minute)
        self._clock = clock
        self._at = clock()

    def wait(self) -> float:
        """Return the seconds until a request may begin."""
        now = self._clock()
        self._left = min(self._most, self._left + (now - self._at) * self._rate)
        self._at = now
        return 0.0 if self._left > 0 else (1 - self._left) / self._rate

    def take(self, tokens: int) -> None:
        self._left -= tokens


class Tenant:
    """What a key uses. `key` is None for the nameless client of a server without keys, who has no limits."""

    def __init__(self, key: Key | None = None) -> None:
        self.key = key
        self.name = "" if key is None else key.name
        self.salt = "" if key is None else key.salt
        self.weight = 1.0 if key is None else key.weight
        self.admin = key is None or key.admin
        self.live = 0
        """Its requests in the engine; those of batches are not counted."""
        self.streams: set[Stream] = set()
        per_minute = None if key is None else key.tokens_per_minute
        self.bucket = None if per_minute is None else TokenBucket(per_minute)

    def check(self, priority: int) -> None:
        """Raise Overloaded above a limit, RequestError for a priority that the key does not have."""
        if self.key is None:
            return
        if priority > self.key.max_priority:
            what = f"priority may be {self.key.max_priority} at most with this API key"
            raise RequestError(what, param="priority")
        most = self.key.max_concurrency
        if most is not None and self.live >= most:
            raise _limited(f"{self.live} requests of this API key are in the engine, the most is {most}; try again")
        if self.bucket is not None and (seconds := self.bucket.wait()):
            per_minute = self.key.tokens_per_minute
            raise _limited(f"this API key has {per_minute} tokens a minute, and they are used; try again", seconds)


class TenantClient:
    """The engine as one request sees it: Client's methods, for a tenant. `close` when the request has ended.

    `limited` is False for what comes from inside (batches): it has no limits, and is not counted.
    """

    __slots__ = ("_client", "_limited", "_streams", "_tenant", "_used", "names")

    def __init__(self, client: Client, tenant: Tenant, limited: bool = True) -> None:
        self._client = client
        self._tenant = tenant
        self._limited = limited
        self._streams: list[Stream] = []
        self._used = (0, 0)
        self.names: dict[str, None] = {}
        """Of what was submitted."""

    def submit(
        self,
        prompt: Prompt,
        params: SamplingParams,
        n: int = 1,
        cache_salt: str = "",
        priority: int = 0,
        grammar: GrammarSpec | None = None,
        name: str = "",
        dp_rank: int | None = None,
    ) -> Stream:
        """As Client.submit; raises for the tenant's limits, too."""
        submission = Submission(prompt, params, n, grammar, name=name, dp_rank=dp_rank)
        return self.submit_all([submission], cache_salt, priority)

    def submit_all(self, submissions: Sequence[Submission], cache_salt: str = "", priority: int = 0) -> Stream:
        """As Client.submit_all; raises for the tenant's limits, too."""
        tenant = self._tenant
        if self._limited:
            self._settle([stream for stream in self._streams if not stream.open])
            tenant.check(priority)
        salt = f"{tenant.salt}/{cache_salt}" if tenant.salt else cache_salt
        stream = self._client.submit_all(submissions, salt, priority, tenant.name, tenant.weight)
        if self._limited:
            tenant.live += 1
        tenant.streams.add(stream)
        self._streams.append(stream)
        self.names.update((s.name, None) for s in submissions if s.name)
        return stream

    def check_room(self) -> None:
        """As Client.check_room."""
        self._client.check_room()

    def abort(self, name: str | None) -> None:
        """As Client.abort, but for others' requests, which only an admin's key can abort."""
        if self._tenant.admin:
            self._client.abort(name)
        else:
            self._client.abort(name, self._tenant.streams, self._tenant.name)

    async def timelines(self, name: str) -> list[TimelineView]:
        """As Questions.timelines; others' only for an admin's key."""
        return await self.questions.timelines(name, None if self._tenant.admin else self._tenant.name)

    def new_pin(self) -> int:
        """As Client.new_pin."""
        return self._client.new_pin()

    def unpin(self, pins: Sequence[int]) -> None:
        """As Client.unpin."""
        self._client.unpin(pins)

    def close(self) -> tuple[int, int]:
        """The request has ended: settle what it used. Returns (prompt tokens, generated tokens)."""
        self._settle(self._streams)
        return self._used

    def _settle(self, streams: list[Stream]) -> None:
        """Count what streams that are over have used; a program has many one after another."""
        prompt, generated = 0, 0
        for stream in streams:
            self._tenant.streams.discard(stream)
            prompts, outputs = used_tokens(stream)
            prompt, generated = prompt + prompts, generated + outputs
        if self._limited:
            self._tenant.live -= len(streams)
            if self._tenant.bucket is not None:
                self._tenant.bucket.take(prompt + generated)
        self._used = (self._used[0] + prompt, self._used[1] + generated)
        over = set(streams)
        self._streams = [stream for stream in self._streams if stream not in over]

    # ------------------------------------------------------------------ as they are

    @property
    def questions(self) -> Questions:
        return self._client.questions

    @property
    def stats(self) -> Stats | None:
        return self._client.stats

    def reports(self) -> list[Stats]:
        return self._client.reports()

    @property
    def draining(self) -> bool:
        return self._client.draining

    def reason_down(self) -> str | None:
        return self._client.reason_down()

    def reason_degraded(self) -> str | None:
        return self._client.reason_degraded()

    def busy(self, priority: int) -> bool:
        return self._client.busy(priority)


def tenants_of(keys: Iterable[Key]) -> dict[str, Tenant]:
    """Return the tenants by name; the nameless one is always there."""
    return {"": Tenant()} | {key.name: Tenant(key) for key in keys}


def used_tokens(stream: Stream) -> tuple[int, int]:
    """(prompt tokens, generated tokens) of what has been reported of a stream; continuations share a prompt."""
    prompts, generated = 0, 0
    for first, n in stream.groups:
        start = first - stream.rid
        lasts = [choice.last for choice in stream.choices[start : start + n] if choice.last is not None]
        prompts += max((last.prompt_tokens for last in lasts), default=0)
        generated += sum(last.completion_tokens for last in lasts)
    return prompts, generated


def _limited(message: str, seconds: float = 1.0) -> Overloaded:
    error = Overloaded(message, retry_after=max(1, round(seconds + 0.5)))
    error.code = "rate_limit_exceeded"
    return error
