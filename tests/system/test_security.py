"""What a running server never does: it makes no code of data, opens nothing, tells nobody else's secrets.

One server with API keys on the stub executor (with --thorough also on a real one with random weights), in whose
processes a hook of Python's audit events listens from a moment on.
"""

import json
import mmap
import os
import re
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from live_server import LiveServer, live_server, node_name
from stub_model import stub_folder

from actorserve.http.app import ROUTES

KEYS = """
[[keys]]
name = "ann"
key = "sk-ann-77"
[[keys]]
name = "bob"
key = "sk-bob-77"
[[keys]]
name = "root"
key = "sk-root-77"
admin = true
"""
HOOK = """
import mmap, os, sys
folder = os.environ["AUDIT_FOLDER"]
armed = mmap.mmap(os.open(folder + "/armed", os.O_RDONLY), 1, prot=mmap.PROT_READ)
log = os.open(f"{folder}/{os.getpid()}.audit", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
QUIET = {"object.__getattr__", "object.__setattr__", "sys._getframe", "gc.get_objects", "socket.__new__", "os.listdir",
    "sys._current_frames", "time.sleep", "signal.pthread_kill", "cpython._PySys_ClearAuditHooks", "os.scandir"}
def hook(event, arguments):
    if armed[0] and event not in QUIET:
        os.write(log, f"{event} {arguments!r:.200}\\n".encode())
sys.addaudithook(hook)
"""
ALLOWED = re.compile(
    r"open \('/(proc|sys)/"  # figures of this process
    r"|socket\.sendmsg \(<socket\.socket fd=\d+, family=1,"  # an answer to the supervisor's ping
    r"|open \('[^']*/(data|key)[^']*"  # --data-dir
    r"|sqlite3\.|fcntl\.|socket\.(bind|getsockname)"
    r"|builtins\.id|array\.__new__|mmap\.__new__|resource\."
)
"""While requests are served. Not among them: import, exec, compile, subprocess, socket.connect, ctypes, pickle."""
SECRETS = {"ACTORSERVE_TEST_API_KEY": "leak-1", "HF_TOKEN": "leak-2", "DB_PASSWORD": "leak-3", "AWS_SECRET_X": "leak-4"}
CHAT = {"model": "", "messages": [{"role": "user", "content": "Hi there"}], "max_tokens": 8, "temperature": 0}


def as_key(name: str) -> dict[str, str]:
    return {"authorization": f"Bearer sk-{name}-77"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("audited")


@pytest.fixture(scope="module")
def server(folder: Path, thorough: bool) -> Iterator[LiveServer]:
    (folder / "sitecustomize.py").write_text(HOOK)
    (folder / "armed").write_bytes(b"\0")
    (folder / "keys.toml").write_text(KEYS)
    model = stub_folder(folder / "model")
    chat = '{"chat_template": "{% for m in messages %}{{ m.content }} {% endfor %}"}'
    Path(model, "chat_template.json").write_text(chat)
    flags = ["--model", model, "--api-key-file", str(folder / "keys.toml"), "--data-dir", str(folder / "data")]
    more = {"AUDIT_FOLDER": str(folder), "PYTHONPATH": f"{folder}:{os.environ.get('PYTHONPATH', '')}"} | SECRETS
    with pytest.MonkeyPatch.context() as patch:
        for name, value in more.items():
            patch.setenv(name, value)
        kind = real_executor(model) if thorough else ["--load-format", "stub", "--stub-step-ms", "1"]
        with live_server(folder, *flags, *kind) as running:
            yield running


def real_executor(model: str) -> list[str]:
    """Flags for one with random weights."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = json.loads(Path(model, "config.json").read_text()) | sizes | {"num_key_value_heads": 2}
    Path(model, "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-5, "rope_theta": 10000.0}))
    return ["--load-format", "dummy", "--max-total-tokens", "8192", "--device", "cpu"]


def requests() -> list[tuple[str, str, Any]]:
    """One of each kind that generates or reads."""
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    answer_format = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    tool = {"type": "function", "function": {"name": "f", "parameters": schema}}
    text = {"prompt": "Once", "max_tokens": 8}
    return [
        ("POST", "/v1/chat/completions", CHAT),
        ("POST", "/v1/chat/completions", CHAT | {"stream": True, "stop": ["zz"], "logprobs": True, "top_logprobs": 2}),
        ("POST", "/v1/chat/completions", CHAT | {"response_format": answer_format, "max_tokens": 30}),
        ("POST", "/v1/chat/completions", CHAT | {"tools": [tool], "tool_choice": "required", "max_tokens": 60}),
        ("POST", "/v1/completions", text | {"n": 2, "echo": True, "logprobs": 1, "seed": 5}),
        ("POST", "/v1/completions", text | {"regex": "[a-z]{1,5}"}),
        ("POST", "/v1/completions", text | {"ebnf": 'root ::= "a" root | "b"'}),
        ("POST", "/generate", {"text": ["a", "b"], "sampling_params": {"max_new_tokens": 4}, "stream": True}),
        ("POST", "/v1/responses", {"input": "Hi", "max_output_tokens": 8}),
        ("POST", "/v1/messages", {"model": "", "max_tokens": 8, "messages": CHAT["messages"]}),
        ("POST", "/v1/score", {"query": "a", "items": ["b"], "label_token_ids": [5]}),
        ("POST", "/tokenize", {"prompt": "a b c"}),
        ("POST", "/detokenize", {"tokens": [5, 6]}),
        ("POST", "/v1/chat/completions", {"messages": 3}),
        ("POST", "/v1/completions", text | {"json_schema": {"type": "nonsense"}}),
        ("GET", "/v1/models", None),
        ("GET", "/metrics", None),
        ("GET", "/server_info", None),
        ("GET", "/v1/engine/stats", None),
        ("GET", "/v1/files", None),
        ("GET", "/openapi.json", None),
        ("GET", "/", None),
        ("GET", "/nowhere", None),
    ]


def ask_all(server: LiveServer) -> list[int]:
    with httpx.Client(base_url=server.url, headers=as_key("ann"), timeout=60) as client:
        return [client.request(method, path, json=body).status_code for method, path, body in requests()]


def test_nothing_but_serving_happens(server: LiveServer, folder: Path) -> None:
    """Every kind of request once to get warm, then once more under the hook."""
    first = ask_all(server)
    assert set(first) == {200, 400, 404} and first.count(404) == 1 and first.count(400) == 2, first
    with (folder / "armed").open("r+b") as file, mmap.mmap(file.fileno(), 1) as armed:
        armed[0] = 1
        assert ask_all(server) == first
        armed[0] = 0
    logs = {int(path.stem): path.read_text().splitlines() for path in folder.glob("*.audit")}
    seen = {node_name(pid): [line for line in lines if not ALLOWED.match(line)] for pid, lines in logs.items()}
    assert set(server.children()) <= set(seen), "a process without the hook"
    assert not any(seen.values()), "\n".join(f"{name}: {line}" for name in seen for line in sorted(set(seen[name])))


def test_the_hook_hears(folder: Path) -> None:
    """What the test above would have found."""
    for event in (
        "import ('x', None",
        "exec (<code",
        "subprocess.Popen ('sh'",
        "open ('/etc/passwd'",
        "socket.connect (",
    ):
        assert not ALLOWED.match(event)


def test_prefixes_of_one_key_are_no_news_to_another(server: LiveServer) -> None:
    """By cached_tokens, which is what an attacker would read off the time to the first token."""
    body = {"prompt": "7 secrets that are long enough to fill some pages " * 4, "max_tokens": 1}

    def cached(name: str, **more: str) -> int:
        reply = httpx.post(f"{server.url}/v1/completions", json=body | more, headers=as_key(name), timeout=60).json()
        details: dict[str, int] = reply["usage"]["prompt_tokens_details"]
        return details["cached_tokens"]

    assert cached("ann") == 0
    again = cached("ann")
    assert again > 16, "the same key's own prefix is found"
    assert cached("bob") == 0 and cached("root") == 0
    assert cached("bob") == again
    assert cached("ann", cache_salt="own") == 0 and cached("bob", cache_salt="own") == 0
    assert cached("ann", cache_salt="own") == again
    guessed = json.dumps({"salts": re.findall(r"[0-9a-f]{32}", httpx.get(server.url + "/health").text)})
    assert guessed == '{"salts": []}'


def test_children_have_what_they_need_and_no_more(server: LiveServer) -> None:
    """No secret in environment or command line; no descriptor of a listening socket but the front's."""
    children = server.children()
    assert {"front.0", "text", "sched", "exec.0", "fsm"} <= set(children)
    listening = {
        line.split()[9] for line in Path("/proc/net/tcp").read_text().splitlines()[1:] if line.split()[3] == "0A"
    }
    everybody = dict(children)
    for name, pid in children.items():
        for task in Path(f"/proc/{pid}/task").iterdir():
            everybody |= {f"{name} {child}": int(child) for child in (task / "children").read_text().split()}
    assert len(everybody) > len(children), "the compilers of grammars"
    for name, pid in everybody.items():
        environment = Path(f"/proc/{pid}/environ").read_bytes()
        assert not [value for value in SECRETS.values() if value.encode() in environment], name
        assert b"AUDIT_FOLDER" in environment
        assert b"sk-" not in Path(f"/proc/{pid}/cmdline").read_bytes()
        links = [os.readlink(link) for link in Path(f"/proc/{pid}/fd").iterdir()]
        sockets = {link[8:-1] for link in links if link.startswith("socket:[")}
        assert (len(sockets & listening) == 1) == (name == "front.0"), (name, links)


def test_keys_reach_the_front_only(server: LiveServer) -> None:
    """A process that is taken over must not know how to ask the others."""
    for name, pid in server.children().items():
        if name != "front.0":
            assert not in_memory(pid, b"sk-root-77"), name


def in_memory(pid: int, text: bytes) -> bool:
    """Whether a process has this in its writable memory."""
    with Path(f"/proc/{pid}/mem").open("rb", buffering=0) as memory:
        for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
            span, rights, *_ = line.split()
            begin, end = (int(x, 16) for x in span.split("-"))
            if rights.startswith("rw") and end - begin < 1 << 28:
                memory.seek(begin)
                try:
                    if text in memory.read(end - begin):
                        return True
                except OSError:
                    continue
    return False


# ------------------------------------------------------------------ no route without a key

OPEN = {"/health", "/health_generate", "/ping", "/ready", "/"}
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE")


def tricks(path: str) -> list[str]:
    """Other ways to write a path, which a proxy or a framework may take for it."""
    return [
        path, "/" + path, path + "/", path + "//", path.replace("/", "//"), path.replace("/", "/./"), path.upper(),
        "/health/.." + path, path + "?a=/health", path + ";/health", path + "%2f", "/health%2f.." + path,
        path.replace("/", "%2f"), path + "#/health", "/%68ealth/../" + path, path + "%00", path + "%20",
        "/health\\.." + path, "http://127.0.0.1/health/.." + path, "http://evil" + path,
    ]  # fmt: skip


def prompt_tokens(server: LiveServer) -> float:
    text = httpx.get(server.url + "/metrics", headers=as_key("ann"), timeout=30).text
    (line,) = [line for line in text.splitlines() if line.startswith("actorserve_prompt_tokens_total ")]
    return float(line.split()[1])


def raw_status(connection: socket.socket, method: str, target: str, head: str = "") -> int:
    """Of a request with exactly this target."""
    connection.sendall(f"{method} {target} HTTP/1.1\r\nhost: /health\r\ncontent-length: 0\r\n{head}\r\n".encode())
    reply = b""
    while b"\r\n\r\n" not in reply:
        reply += connection.recv(1 << 16) or b"HTTP/1.1 000\r\n\r\n"
    head_bytes, _, body = reply.partition(b"\r\n\r\n")
    length = re.search(rb"content-length: (\d+)", head_bytes)
    while method != "HEAD" and length is not None and len(body) < int(length[1]):
        body += connection.recv(1 << 16)
    return int(reply.split(b" ")[1][:3])


def test_no_route_answers_without_a_key(server: LiveServer) -> None:
    """Every route, every method, every spelling: 401, or it is not HTTP. Nor can one tell which routes there are."""
    address = ("127.0.0.1", int(server.url.rpartition(":")[2]))
    before = prompt_tokens(server)
    paths = sorted({path.replace("{id:path}", "x").replace("{id}", "x") for r in ROUTES for path in r.paths} - OPEN)
    wrong = ["", "authorization: Bearer sk-ann-7\r\n", "authorization: Basic c2stYW5uLTc3\r\n", "x-api-key:\r\n"]
    asked = 0
    for path in [*paths, "/nowhere"]:
        for i, target in enumerate(tricks(path)):
            with socket.create_connection(address, timeout=30) as connection:
                for method in METHODS if i < 4 else ("GET", "POST"):
                    head = wrong[asked % len(wrong)]
                    status = raw_status(connection, method, target, head)
                    asked += 1
                    if status == 400:  # not HTTP: the connection ends
                        break
                    assert status == 401, (method, target, head, status)
    print(f"\n{asked} requests without a key: 401, each of them")
    assert prompt_tokens(server) == before
    for path in OPEN:
        assert server.get(path).status_code == 200
