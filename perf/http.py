"""What HTTP costs: SSE events per core of a front, and what a front adds to the time to first token.

    python -m actorserve.perf.http [--streams 256] [--seconds 5] [--http-workers 1 2] [--json FILE]

The engine runs the stub executor, so that everything but a model is there. Two figures of each number of fronts:
events a core, which is all events over the CPU seconds that the fronts used for them (the other processes and the
client share this machine's cores, so the wall clock would measure those); and the overhead on the time to first token
while --streams others stream one event each --step-ms: what the client waited, less what passed between the request's
arrival in the front and its first token in the scheduler. In the same run, for the same events: a plain Starlette
application under uvicorn that sends constant bytes, which is the reference, and uvicorn alone, which is the limit.
"""

import argparse
import asyncio
import contextlib
import json
import multiprocessing
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

from actorserve.perf.engines import free_port
from actorserve.perf.processes import cpu_seconds, launched
from actorserve.perf.sse_readers import first_event, reading

BAR_EVENTS: Final = 25_000
BAR_TTFT_MS: Final = 3.0
ROUTES: Final = {"completions": "/v1/completions", "chat": "/v1/chat/completions"}
CONTEXT: Final = 1 << 17
PROBE_GAP: Final = (0.5, 1.5)
"""Steps between two requests whose first token is waited for: they come at any moment of a step."""

# ------------------------------------------------------------------ requests


def request_of(url: str, path: str, body: dict[str, Any]) -> bytes:
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nhost: {url}\r\ncontent-type: application/json\r\ncontent-length: {len(data)}\r\n"
    return head.encode() + b"connection: close\r\n\r\n" + data


def body_of(api: str, tokens: int, seed: int, **more: Any) -> dict[str, Any]:
    prompt: dict[str, Any] = {"messages": [{"role": "user", "content": f"Count from {seed}"}]}
    if api == "completions":
        prompt = {"prompt": f"Count from {seed}"}
    return {**prompt, "max_tokens": tokens, "stream": True, "ignore_eos": True, "seed": seed, **more}


def rate(url: str, requests: Sequence[bytes], seconds: float, cpu: Callable[[], float]) -> dict[str, float]:
    """Events while all requests stream, and the CPU seconds of who sends them."""
    with reading(url, requests) as readers:
        readers.wait_until_begun()
        before, used, began = readers.seen(), cpu(), time.monotonic()
        time.sleep(seconds)
        after, spent, wall = readers.seen(), cpu() - used, time.monotonic() - began
        if after.ended:
            raise SystemExit("streams ended during the measurement: take fewer --seconds")
    events = after.events - before.events
    return {
        "events": events,
        "events_per_second": events / wall,
        "events_per_core": events / spent,
        "cpu_seconds": spent,
    }


# ------------------------------------------------------------------ our server


def front_seconds(pid: int) -> float:
    """CPU seconds of all fronts so far."""
    return sum(spent for name, spent in cpu_seconds(pid).items() if name.startswith("front."))


def first_tokens(url: str, requests: Sequence[bytes], probes: int, step: float) -> dict[str, float]:
    """While the requests stream, what some more wait for their first token, one at a time, in ms.

    `ttft_overhead` is that wait without the engine's part of it; `request_ms` of it passed before the front had given
    the request to the engine, `reply_ms` after the scheduler had the first token.
    """
    waits, before, after, draw = [], [], [], random.Random(0)
    with reading(url, requests) as readers:
        readers.wait_until_begun()
        for i in range(probes):
            body = body_of("completions", 2, 10_000 + i, timeline=True)
            found = first_event(url, request_of(url, ROUTES["completions"], body))
            line = found.body[found.body.rindex(b'data: {"id"') :]
            (timeline,) = json.loads(line[6 : line.index(b"\n")])["timeline"]
            waits.append(1e3 * (found.first - found.sent))
            before.append(1e3 * (timeline["arrival"] - found.sent))
            after.append(waits[-1] - before[-1] - 1e3 * timeline["first_token"])
            time.sleep(draw.uniform(*PROBE_GAP) * step)
    cuts = statistics.quantiles(map(sum, zip(before, after, strict=True)), n=100)
    return {
        "ttft_ms": statistics.median(waits),
        "ttft_overhead_ms": cuts[49],
        "ttft_overhead_p90_ms": cuts[89],
        "request_ms": statistics.median(before),
        "reply_ms": statistics.median(after),
    }


def model_folder(folder: Path) -> str:
    """A folder for the stub: the embedded model's tokenizer and template, and a long context."""
    from actorserve.models.embedded import embedded_model

    real = Path(embedded_model())
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        if (real / name).exists():
            (folder / name).symlink_to(real / name)
    facts = json.loads((real / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(facts | {"max_position_embeddings": CONTEXT}))
    return str(folder)


def ours(args: argparse.Namespace, folder: str, workers: int) -> dict[str, Any]:
    """All figures of our server with so many fronts."""
    flags = f"--model {folder} --load-format stub --max-total-tokens {args.streams * CONTEXT} --http-workers {workers}"
    flags += f" --max-running-requests {args.streams + 8}"
    figures: dict[str, Any] = {}
    with launched(f"{flags} --stub-step-ms 0") as (url, pid, _):
        for api, path in ROUTES.items():
            requests = [request_of(url, path, body_of(api, CONTEXT - 64, i)) for i in range(args.streams)]
            figures[api] = rate(url, requests, args.seconds, lambda pid=pid: front_seconds(pid))
            print(f"{workers} front(s), {api}: {figures[api]}", file=sys.stderr, flush=True)
    steps = f"--stub-step-ms {args.step_ms} --num-continuous-decode-steps 1"
    with launched(f"{flags} {steps}") as (url, _, _):
        requests = [request_of(url, path, body_of("chat", CONTEXT - 64, i)) for i in range(args.streams)]
        figures |= first_tokens(url, requests, args.probes, args.step_ms / 1e3)
    return figures


# ------------------------------------------------------------------ reference and limit

EVENT: Final = (
    b'data: {"id":"cmpl-0123456789abcdef0123456789abcdef","object":"text_completion","created":1700000000,"model":'
    b'"SmolLM2-135M-Instruct","system_fingerprint":null,"choices":[{"text":" word","index":0,"logprobs":null,'
    b'"finish_reason":null}]}\n\n'
)


async def starlette_app(scope: Any, receive: Any, send: Any) -> None:
    """The reference: a StreamingResponse over a generator that yields one event at a time."""
    from starlette.responses import StreamingResponse

    async def events() -> AsyncIterator[bytes]:
        while True:
            yield EVENT
            await asyncio.sleep(0)

    await StreamingResponse(events(), media_type="text/event-stream")(scope, receive, send)


async def bare_app(scope: Any, receive: Any, send: Callable[[Any], Awaitable[None]]) -> None:
    """The limit: what uvicorn takes for an event."""
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]})
    part = {"type": "http.response.body", "body": EVENT, "more_body": True}
    while True:
        await send(part)
        await asyncio.sleep(0)


def serve_plain(app: Any, port: int) -> None:
    """In a process of its own, with the settings of our fronts."""
    import uvicorn

    uvicorn.run(app, port=port, loop="uvloop", http="httptools", ws="none", lifespan="off", log_config=None)


@contextlib.contextmanager
def plain(app: Any) -> Iterator[tuple[str, int]]:
    """One of the two for the block; its address and process."""
    import socket

    port = free_port()
    process = multiprocessing.get_context("spawn").Process(target=serve_plain, args=(app, port), daemon=True)
    process.start()
    try:
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                break
            time.sleep(0.02)
        assert process.pid is not None
        yield f"http://127.0.0.1:{port}", process.pid
    finally:
        process.kill()
        process.join()


def beside(app: Any, args: argparse.Namespace) -> dict[str, float]:
    with plain(app) as (url, pid):
        requests = [request_of(url, "/", {}) for _ in range(args.streams)]
        return rate(url, requests, args.seconds, lambda: cpu_seconds(pid)["root"])


# ------------------------------------------------------------------ the command


def report(figures: dict[str, Any]) -> str:
    """Return the figures as text for people."""
    limit = figures["limit"]["events_per_core"]
    lines = [f"{'':<34}{'events / core':>14}{'us / event':>12}{'of the limit':>14}{'events / s':>12}"]

    def row(name: str, found: dict[str, float]) -> str:
        core = found["events_per_core"]
        return f"{name:<34}{core:>14,.0f}{1e6 / core:>12.1f}{core / limit:>14.2f}{found['events_per_second']:>12,.0f}"

    lines.append(row("uvicorn alone (limit)", figures["limit"]))
    lines.append(row("Starlette, constant (reference)", figures["reference"]))
    for workers, found in figures["ours"].items():
        lines += [row(f"ours, {workers} front(s), {api}", found[api]) for api in ROUTES]
    for workers, found in figures["ours"].items():
        lines.append(
            f"ours, {workers} front(s): TTFT {found['ttft_ms']:.2f} ms, overhead {found['ttft_overhead_ms']:.2f} ms "
            f"(p90 {found['ttft_overhead_p90_ms']:.2f}); to the engine {found['request_ms']:.2f}, "
            f"from it {found['reply_ms']:.2f}"
        )
    lines.append(f"bars: {BAR_EVENTS:,} events a core, {BAR_TTFT_MS:g} ms")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--streams", type=int, default=256)
    p.add_argument("--seconds", type=float, default=5.0, help="of each measurement of events")
    p.add_argument("--step-ms", type=float, default=50.0, help="between two events of a stream, for the TTFT")
    p.add_argument("--probes", type=int, default=60, help="requests whose TTFT is taken")
    p.add_argument("--http-workers", type=int, nargs="+", default=[1, 2])
    p.add_argument("--json", type=Path)
    args = p.parse_args(arguments)
    figures: dict[str, Any] = {"limit": beside(bare_app, args), "reference": beside(starlette_app, args)}
    print("limit and reference are measured", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory() as folder:
        model = model_folder(Path(folder))
        figures["ours"] = {workers: ours(args, model, workers) for workers in args.http_workers}
    print(report(figures))
    if args.json:
        facts = {"arguments": {**vars(args), "json": None}, "cores": os.cpu_count(), "python": sys.version.split()[0]}
        args.json.write_text(json.dumps(facts | figures, indent=1))


if __name__ == "__main__":
    main()
