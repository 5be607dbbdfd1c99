"""Malformed requests to every route, and random bytes to every decoder: nothing dies, nothing hangs, nothing stays.

Against one server on the stub executor. CI takes some hundreds of requests, --thorough (`make fuzz`) ten thousand.
"""

import asyncio
import collections
import random
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
from live_server import LiveServer, live_server, shared_memory
from malformed import VALID, Fuzzer, Malformed, send
from msgspec import inspect
from stub_model import stub_folder

from actorserve.actors import control, fsm_worker, lifeline, messages
from actorserve.http.app import ROUTES, described

SECONDS = 30.0
"""No answer in this time is a hang."""
AT_ONCE = 8
MEGABYTES = 20.0
SECRETS = (b"Traceback", b"site-packages", b"/home/", b"/tmp/", b"object at 0x", b'.py"', b"actorserve/")
ORDERS = ("/pause_generation", "/continue_generation")
"""They stop others' requests: tests/http/test_control_routes.py."""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    tmp = tmp_path_factory.mktemp("fuzzed")
    model = stub_folder(tmp / "model", context_length=512)
    template = '{"chat_template": "{% for m in messages %}{{ m.role }}: {{ m.content }}\\\\n{% endfor %}"}'
    Path(model, "chat_template.json").write_text(template)
    flags = ["--load-format", "stub", "--stub-step-ms", "0", "--data-dir", str(tmp / "data"), "--max-restarts", "0"]
    flags += ["--max-total-tokens", "16384", "--grammar-seconds", "0.5", "--client-timeout", "5"]
    with live_server(tmp, "--model", model, *flags) as running:
        yield running


def canaries(server: LiveServer) -> list[Any]:
    """Three answers that must stay what they are. The stub draws by the seed whatever the temperature is."""
    bodies = [{"prompt": f"canary {i}", "max_tokens": 24, "temperature": 0, "seed": i, "logprobs": 2} for i in range(3)]
    replies = [httpx.post(server.url + "/v1/completions", json=body, timeout=60).json() for body in bodies]
    return [reply["choices"] for reply in replies]


def memory(pids: dict[str, int]) -> dict[str, float]:
    """Megabytes of each process that are its own."""
    found = {}
    for name, pid in pids.items():
        lines = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
        found[name] = (int(lines["RssAnon"].split()[0]) + int(lines["VmSwap"].split()[0])) / 1024
    return found


def known_fields() -> list[str]:
    document = msgspec.json.decode(described(""))
    schemas = document["components"]["schemas"].values()
    return sorted({name for schema in schemas for name in schema.get("properties", {})})


async def send_all(server: LiveServer, requests: list[Malformed]) -> collections.Counter[tuple[str, int]]:
    """Send all, some at once; (route, status) of each."""
    address = ("127.0.0.1", int(server.url.rpartition(":")[2]))
    counts: collections.Counter[tuple[str, int]] = collections.Counter()
    waiting = iter(requests)

    async def work() -> None:
        for one in waiting:
            try:
                status, body = await send(address, one, SECONDS)
            except TimeoutError:
                raise AssertionError(f"no answer in {SECONDS} s: {one.data[:3000]!r}") from None
            counts[one.route, status] += 1
            assert status < 500 or status == 503, (status, one.data[:3000], body[:500])
            if status >= 400:
                assert not [word for word in SECRETS if word in body], (one.data[:1000], body[:1000])

    await asyncio.gather(*(work() for _ in range(AT_ONCE)))
    return counts


def test_every_route_is_fuzzed() -> None:
    asked = {path for _, path, _ in VALID}
    for route in ROUTES:
        for path in route.paths:
            if path not in ORDERS and path == route.paths[0]:
                assert any(matches(path, one) for one in asked), f"tests/support/malformed.py lacks {path}"


def matches(route: str, path: str) -> bool:
    """Whether the path is of the route; {id:path} takes the rest."""
    parts, given = route.split("/"), path.split("/")
    if route.endswith("{id:path}"):
        given = [*given[: len(parts) - 1], "/".join(given[len(parts) - 1 :])]
    return len(parts) == len(given) and all(a == b or a.startswith("{") for a, b in zip(parts, given, strict=True))


@pytest.mark.timeout(0)
def test_malformed_requests(server: LiveServer, thorough: bool) -> None:
    count = 10_000 if thorough else 500
    fuzzer = Fuzzer(seed=count, fields=known_fields())
    requests = [fuzzer.request() for _ in range(count)]
    before, files, pids = canaries(server), shared_memory(), server.children()
    warm = count // 5
    counts = asyncio.run(send_all(server, requests[:warm]))
    middle = memory(pids)
    counts += asyncio.run(send_all(server, requests[warm:]))
    assert server.children() == pids and server.is_ready(), "a process died"
    server.assert_pages_add_up()
    assert canaries(server) == before
    assert shared_memory() == files
    grown = {name: megabytes - middle[name] for name, megabytes in memory(pids).items()}
    statuses: collections.Counter[int] = collections.Counter()
    for (_, status), number in counts.items():
        statuses[status] += number
    print(
        f"\n{count} requests; status: times {dict(sorted(statuses.items()))}; MB grown after the first {warm}:", end=" "
    )
    print({name: round(megabytes, 1) for name, megabytes in grown.items()})
    assert max(grown.values()) < MEGABYTES
    assert statuses[200] > count // 20 and statuses[400] > count // 5, "they are neither all right nor all wrong"


# ------------------------------------------------------------------ decoders

INBOXES = {name: getattr(messages, name) for name in dir(messages) if name.endswith("Inbox")}
OTHERS = {
    "control.ToNode": control.ToNode,
    "control.ToSupervisor": control.ToSupervisor,
    "fsm_worker.Answer": fsm_worker.Answer,
    "fsm_worker.Job": fsm_worker.Job,
    "lifeline": lifeline.AnyStatus,
}
EXPECTED = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)
"""What an inbox takes for a broken peer (Inbox.poll)."""


def value_of(kind: inspect.Type, rng: random.Random) -> Any:
    """Something that the type allows."""
    match kind:
        case inspect.Metadata():
            return value_of(kind.type, rng)
        case inspect.UnionType():
            return value_of(rng.choice(kind.types), rng)
        case inspect.StructType():
            return kind.cls(**{field.name: value_of(field.type, rng) for field in kind.fields})
        case inspect.IntType():
            return rng.choice([0, 1, -1, 255, 1 << 31, (1 << 63) - 1, rng.getrandbits(20)])
        case inspect.FloatType():
            return rng.choice([0.0, -1.5, 1e300, float("inf")])
        case inspect.BoolType():
            return rng.random() < 0.5
        case inspect.StrType():
            return rng.choice(["", "front.0", "é" * 5])
        case inspect.BytesType() | inspect.MemoryViewType() | inspect.ByteArrayType():
            return rng.randbytes(4 * rng.randrange(5))
        case inspect.LiteralType():
            return rng.choice(kind.values)
        case inspect.EnumType():
            return rng.choice(list(kind.cls))
        case inspect.ListType() | inspect.VarTupleType():
            made = [value_of(kind.item_type, rng) for _ in range(rng.randrange(3))]
            return made if isinstance(kind, inspect.ListType) else tuple(made)
        case inspect.TupleType():
            return tuple(value_of(one, rng) for one in kind.item_types)
        case inspect.DictType():
            return {value_of(kind.key_type, rng): value_of(kind.value_type, rng) for _ in range(rng.randrange(3))}
        case _:
            return None


def members(union: Any) -> tuple[Any, ...]:
    return typing.get_args(union) if isinstance(union, types.UnionType) or typing.get_origin(union) else (union,)


@pytest.mark.parametrize("name", [*INBOXES, *OTHERS])
def test_random_bytes_to_decoders(name: str, thorough: bool) -> None:
    """Random ones, and messages of each kind with some bytes changed: decoded, or refused by an expected error."""
    union = INBOXES.get(name) or OTHERS[name]
    decode, rng = msgspec.msgpack.Decoder(union).decode, random.Random(name)
    refused = decoded = 0
    for _ in range(3000 if thorough else 60):
        for member in members(union):
            data = bytearray(msgspec.msgpack.encode(value_of(inspect.type_info(member), rng)))
            for _change in range(rng.choice([0, 1, 1, 2, 4])):
                at = rng.randrange(len(data) + 1)
                match rng.randrange(4):
                    case 0 if data:
                        data[at % len(data)] = rng.randrange(256)
                    case 1:
                        del data[at:]
                    case 2:
                        data[at:at] = rng.randbytes(rng.randint(1, 5))
                    case _:
                        data[at:at] = rng.choice(
                            [b"\xdd\xff\xff\xff\xff", b"\xc6\x7f\xff\xff\xff", b"\x91" * 5000, b"\xc1"]
                        )
            for attempt in (bytes(data), rng.randbytes(rng.randrange(64))):
                try:
                    decode(attempt)
                    decoded += 1
                except EXPECTED:
                    refused += 1
    assert refused > 50 and decoded > 10, (refused, decoded)
