"""The whole engine on this CPU, client to client, beside transformers and llama.cpp's server, in one run.

    python -m actorserve.perf.engines [--clients 1 8 32] [--tokens 128] [--model DIR] [--json FILE]

Ours: `actorserve run` in its processes with its defaults (on a CPU the Q4_1 weights as they are), asked over HTTP by
perf.serve's client (streaming, closed loop). transformers:
`generate`, one request after another, in bfloat16. llama.cpp: its server from the `xllamacpp` wheel with one slot a
client, on the same Q4_1 weights, if that package is installed (it is no dependency). Same prompts' length, same
number of new tokens, greedy. Machines are noisy: read the ratios of one run.
"""

import argparse
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec

from actorserve.models.embedded import embedded_gguf, embedded_model


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


@contextlib.contextmanager
def process(command: list[str], url: str, path: str) -> Iterator[None]:
    """Run a server until the block ends; wait until `path` answers 200."""
    import httpx

    p = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(600):
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(url + path).status_code == 200:
                    break
            if p.poll() is not None:
                raise RuntimeError(f"{command[:4]} ended with {p.returncode}")
            time.sleep(0.1)
        else:
            raise RuntimeError(f"{command[:4]} does not answer {path}")
        yield
    finally:
        p.send_signal(signal.SIGTERM)
        p.wait()


def load(url: str, clients: int, tokens: int, prompt: int, json_file: Path, *more: str) -> dict[str, float]:
    """Send two requests a client (four at least) and return perf.serve's result.

    Prompts differ from those of another number of clients, or of tokens: none is in a server's prefix cache.
    """
    command = [
        sys.executable, "-m", "actorserve.perf.serve", "--base-url", url, "--api", "completions",
        "--num-prompts", str(max(4, 2 * clients)), "--max-concurrency", str(clients), "--random-input-len", str(prompt),
        "--random-output-len", str(tokens), "--temperature", "0", "--seed", str(1000 * tokens + clients),
        "--json", str(json_file),
        *more,
    ]  # fmt: skip
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    result: dict[str, float] = json.loads(json_file.read_text())
    return result


@contextlib.contextmanager
def our_server(model: str, *flags: str) -> Iterator[str]:
    """Run `actorserve run` until the block ends; the block gets its URL."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "actorserve", "run", "--model", model, "--port", str(port), *flags]
    with process(command, url, "/ready"):
        yield url


def ours(model: str, a: argparse.Namespace, scratch: Path) -> dict[int, float]:
    with our_server(model) as url:
        load(url, 2, 8, a.prompt, scratch)
        return {n: load(url, n, a.tokens, a.prompt, scratch)["output_throughput"] for n in a.clients}


def llama_cpp(clients: list[int], tokens: int, prompt: int, scratch: Path) -> dict[int, float]:
    """Output tokens/s by number of clients of llama.cpp's own server, with two threads, in a child process; {} if
    xllamacpp is not installed."""
    try:
        import xllamacpp  # noqa: F401
    except ImportError:
        return {}
    rates = {}
    for n in clients:
        port = free_port()
        url = f"http://127.0.0.1:{port}"
        with process([sys.executable, "-c", LLAMA, str(embedded_gguf()), str(port), str(n)], url, "/health"):
            load(url, 2, 8, prompt, scratch)
            rates[n] = load(url, n, tokens, prompt, scratch)["output_throughput"]
    return rates


LLAMA = """
import sys, time, xllamacpp as x
p = x.CommonParams()
p.model.path, p.port, p.n_parallel = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
p.n_ctx, p.hostnames, p.warmup = 1024 * p.n_parallel, ["127.0.0.1"], True
p.cpuparams.n_threads = p.cpuparams_batch.n_threads = 2
server = x.Server(p)
while True:
    time.sleep(1)
"""


def transformers(model: str, a: argparse.Namespace) -> float:
    """Output tokens/s of `generate`, three requests one after another."""
    import torch
    from transformers import AutoModelForCausalLM

    m = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
    prompt = torch.randint(100, 40000, (4, 1, a.prompt))
    started = 0.0
    for i in range(4):
        if i == 1:
            started = time.perf_counter()
        m.generate(prompt[i], max_new_tokens=a.tokens, min_new_tokens=a.tokens, do_sample=False, pad_token_id=0)
    return 3 * a.tokens / (time.perf_counter() - started)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32])
    p.add_argument("--tokens", type=int, default=128)
    p.add_argument("--prompt", type=int, default=64)
    p.add_argument("--model")
    p.add_argument("--json", type=Path)
    a = p.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "2")
    model = a.model or embedded_model()
    scratch = Path(f"/tmp/actorserve-perf-{os.getpid()}.json")
    try:
        mine, llama = ours(model, a, scratch), {} if a.model else llama_cpp(a.clients, a.tokens, a.prompt, scratch)
    finally:
        scratch.unlink(missing_ok=True)
    base = transformers(model, a)
    print(f"output tokens/s; transformers generate, one after another: {base:.1f}")
    print(f"{'clients':>8} {'ours':>8} {'/ transformers':>15} {'llama.cpp':>10} {'ours / llama.cpp':>17}")
    for n in a.clients:
        theirs = llama.get(n)
        beside = f"{theirs:>10.1f} {mine[n] / theirs:>17.2f}" if theirs else f"{'-':>10} {'-':>17}"
        print(f"{n:>8} {mine[n]:>8.1f} {mine[n] / base:>15.2f} {beside}")
    if a.json:
        a.json.write_bytes(msgspec.json.encode({"ours": mine, "llama_cpp": llama, "transformers": base}))


if __name__ == "__main__":
    main()
