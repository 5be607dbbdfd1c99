"""API keys, what each may use, and what every request passes: CORS, request ids, the access log, TLS, the root path."""

import asyncio
import hashlib
import json
import ssl
import subprocess
from dataclasses import replace
from pathlib import Path

import httpx
import openai
import pytest

from actorserve.actors.messages import Abort, Generate
from actorserve.config import EngineConfig
from actorserve.errors import StartupError
from actorserve.http.api_keys import read_keys
from actorserve.http.app import ROUTES
from actorserve.http.front import server_config
from actorserve.http.tenants import TokenBucket

pytestmark = pytest.mark.anyio
KEYS = f"""
[[keys]]
name = "ann"
key = "sk-ann"
max_concurrency = 2
weight = 3
[[keys]]
name = "bob"
sha256 = "{hashlib.sha256(b"sk-bob").hexdigest()}"
tokens_per_minute = 10
[[keys]]
name = "root"
key = "sk-root"
admin = true
max_priority = 5
[[keys]]
name = "c1"
key = "sk-c1"
shared_cache = true
"""
OPEN = {"/health", "/health_generate", "/ping", "/ready", "/"}  # the page holds no data: it asks the API, with a key
PROMPT = {"prompt": "Hi", "max_tokens": 4}


def text_of(path):
    return Path(path).read_text()


def bearer(name):
    return {"authorization": f"Bearer sk-{name}"}


@pytest.fixture
def setting(tmp_path):
    (tmp_path / "keys.toml").write_text(KEYS)
    return {
        "api_key_file": str(tmp_path / "keys.toml"),
        "api_key": "sk-single",
        "access_log": str(tmp_path / "access.log"),
        "cors_origins": "https://a.example, https://b.example",
        "data_dir": str(tmp_path / "data"),
        "root_path": "/llm",
    }


async def test_no_route_but_health_answers_without_a_key(rig):
    for served in ROUTES:
        for path in served.paths:
            for method in served.methods:
                where = path.replace("{id:path}", "x").replace("{id}", "x")
                for headers in ({}, bearer("nobody"), {"x-api-key": ""}, {"authorization": "sk-ann"}):
                    reply = await rig.http.request(method, where, headers=headers)
                    if path in OPEN:
                        assert reply.status_code == 200, path
                    else:
                        assert reply.status_code == 401, path
                        assert reply.headers["www-authenticate"] == "Bearer"
    assert rig.text.got == []


async def test_errors_of_keys_have_the_protocols_shape(rig):
    openai_error = (await rig.http.post("/v1/completions", json=PROMPT)).json()["error"]
    assert (openai_error["type"], openai_error["code"]) == ("authentication_error", "invalid_api_key")
    claude = (await rig.http.post("/v1/messages", json={})).json()
    assert (claude["type"], claude["error"]["type"]) == ("error", "authentication_error")


async def test_every_kind_of_key_opens(rig):
    for headers in (bearer("ann"), bearer("bob"), bearer("single"), {"x-api-key": "sk-c1"}):
        assert (await rig.http.get("/v1/models", headers=headers)).status_code == 200
    async with openai.AsyncOpenAI(base_url=f"{rig.base}/v1", api_key="sk-ann") as client:
        assert (await client.completions.create(model="", **PROMPT)).choices[0].text


async def test_the_key_is_not_shown(rig):
    text = (await rig.http.get("/server_info", headers=bearer("ann"))).text
    assert "sk-single" not in text and "(set)" in text


async def test_prefixes_are_cached_under_the_key(rig):
    for name, salt in (("ann", None), ("ann", "own"), ("root", None), ("root", "own"), ("c1", None), ("c1", "own")):
        await rig.http.post("/v1/completions", json=PROMPT | {"cache_salt": salt}, headers=bearer(name))
    salts = [m.cache_salt for m in rig.text.generates]
    assert len(set(salts)) == 6 and salts[4:] == ["", "own"]
    assert not any("sk-" in salt for salt in salts)
    await rig.http.post("/v1/completions", json=PROMPT, headers=bearer("ann"))
    assert rig.text.generates[-1].cache_salt == salts[0]
    assert [(m.tenant, m.weight) for m in rig.text.generates[:3:2]] == [("ann", 3.0), ("root", 1.0)]


async def test_concurrency(rig, fakes):
    words, rig.text.script = rig.text.script, lambda generate: []
    live = [asyncio.create_task(rig.http.post("/v1/completions", json=PROMPT, headers=bearer("ann"))) for _ in "ab"]
    await rig.text.wait_for(Generate, 2)
    reply = await rig.http.post("/v1/completions", json=PROMPT, headers=bearer("ann"))
    assert (reply.status_code, reply.json()["error"]["code"]) == (429, "rate_limit_exceeded")
    assert int(reply.headers["retry-after"]) >= 1
    rig.text.script = words
    assert (await rig.http.post("/v1/completions", json=PROMPT, headers=bearer("bob"))).status_code == 200
    for task in live:
        task.cancel()
    await fakes.until(lambda: not rig.front.client.table)
    assert (await rig.http.post("/v1/completions", json=PROMPT, headers=bearer("ann"))).status_code == 200


async def test_tokens_a_minute(rig):
    """The first request is let in and overdraws (7 + 4 of 10); the next one waits for what is owed."""
    assert (await rig.http.post("/v1/completions", json=PROMPT, headers=bearer("bob"))).status_code == 200
    reply = await rig.http.post("/v1/completions", json=PROMPT, headers=bearer("bob"))
    assert reply.status_code == 429
    assert 1 <= int(reply.headers["retry-after"]) <= 13


def test_the_bucket():
    now = [0.0]
    bucket = TokenBucket(60, clock=lambda: now[0])
    assert bucket.wait() == 0
    bucket.take(70)
    assert bucket.wait() == pytest.approx(11)
    now[0] = 10.5
    assert bucket.wait() == 0
    now[0] = 1e6
    bucket.wait()
    bucket.take(60)
    assert bucket.wait() > 0, "no more than a minute's worth is saved"


async def test_priority_above_the_keys(rig):
    for name, priority, status in (("ann", 1, 400), ("ann", -3, 200), ("root", 5, 200), ("root", 6, 400)):
        reply = await rig.http.post("/v1/completions", json=PROMPT | {"priority": priority}, headers=bearer(name))
        assert reply.status_code == status, (name, priority)
        assert status == 200 or reply.json()["error"]["param"] == "priority"


async def test_orders_take_an_admins_key(rig):
    for path in ("/flush_cache", "/pause_generation", "/continue_generation"):
        refused = await rig.http.post(path, headers=bearer("ann"))
        assert (refused.status_code, refused.json()["error"]["type"]) == (403, "permission_error")
        assert (await rig.http.post(path, headers=bearer("root"))).status_code == 200


async def test_a_key_aborts_its_own_requests_only(rig):
    rig.text.script = lambda generate: []
    body = {"text": "Hi", "rid": "mine"}
    live = [asyncio.create_task(rig.http.post("/generate", json=body, headers=bearer(name))) for name in ("ann", "c1")]
    first, second = await rig.text.wait_for(Generate, 2)
    ann = first if first.tenant == "ann" else second
    for order in ({"abort_all": True}, {"rid": "mine"}):
        await rig.http.post("/abort_request", json=order, headers=bearer("ann"))
    assert [m.rid for m in await rig.text.wait_for(Abort, 2)] == [ann.rid, ann.rid]
    await rig.http.post("/abort_request", json={"abort_all": True}, headers=bearer("root"))
    assert len(await rig.text.wait_for(Abort, 4)) == 4
    for task in live:
        task.cancel()


async def test_files_batches_and_responses_are_the_keys_own(rig):
    file = {"files": {"file": b'{"x": 1}\n'}, "data": {"purpose": "batch"}}
    name = (await rig.http.post("/v1/files", **file, headers=bearer("ann"))).json()["id"]
    body = {"input_file_id": name, "endpoint": "/v1/completions", "completion_window": "24h"}
    batch = (await rig.http.post("/v1/batches", json=body, headers=bearer("ann"))).json()["id"]
    made = (await rig.http.post("/v1/responses", json={"input": "Hi"}, headers=bearer("ann"))).json()["id"]
    for path in (f"/v1/files/{name}", f"/v1/files/{name}/content", f"/v1/batches/{batch}", f"/v1/responses/{made}"):
        assert (await rig.http.get(path, headers=bearer("ann"))).status_code == 200
        assert (await rig.http.get(path, headers=bearer("root"))).status_code == 404
    assert (await rig.http.post("/v1/batches", json=body, headers=bearer("root"))).status_code == 404
    assert (await rig.http.get("/v1/files", headers=bearer("root"))).json()["data"] == []


# ------------------------------------------------------------------ what every request passes


async def test_request_ids_and_the_log(rig, setting):
    reply = await rig.http.post("/v1/completions?a=secret", json=PROMPT, headers=bearer("ann") | {"x-request-id": "r1"})
    assert reply.headers["x-request-id"] == "r1"
    for sent in ("with space", "x" * 129):
        got = (await rig.http.get("/nowhere", headers={"x-request-id": sent})).headers["x-request-id"]
        assert got.startswith("req_")
    log = text_of(setting["access_log"])
    lines = [json.loads(line) for line in log.splitlines()]
    first = lines[0]
    assert (first["request_id"], first["key"], first["method"], first["path"], first["status"]) == (
        "r1",
        "ann",
        "POST",
        "/v1/completions",
        200,
    )
    assert (first["prompt_tokens"], first["generated_tokens"]) == (7, 4)
    assert [line["status"] for line in lines] == [200, 401, 401], "who brings no key is not told which routes there are"
    assert "secret" not in log


async def test_cors(rig):
    asked = {"origin": "https://b.example", "access-control-request-method": "POST"}
    reply = await rig.http.options("/v1/completions", headers=asked)
    assert (reply.status_code, reply.headers["access-control-allow-origin"]) == (200, "https://b.example")
    assert (await rig.http.options("/v1/completions", headers=asked | {"origin": "https://c"})).status_code == 400
    reply = await rig.http.get("/v1/models", headers={"origin": "https://a.example"})
    assert (reply.status_code, reply.headers["access-control-allow-origin"]) == (401, "https://a.example")


async def test_the_root_path(rig):
    for path in ("/v1/models", "/llm/v1/models"):
        assert (await rig.http.get(path, headers=bearer("ann"))).status_code == 200
    assert (await rig.http.get("/llmx/v1/models", headers=bearer("ann"))).status_code == 404
    described = (await rig.http.get("/openapi.json", headers=bearer("ann"))).json()
    assert described["servers"] == [{"url": "/llm"}]
    assert f"{rig.base}/llm/v1/chat" in (await rig.http.get("/", headers=bearer("ann"))).text


@pytest.fixture
def certificate(tmp_path):
    """(certificate, key), made now."""
    key, made = tmp_path / "key.pem", tmp_path / "cert.pem"
    command = "openssl req -x509 -newkey rsa:2048 -nodes -days 1 -subj /CN=localhost"
    command += " -addext subjectAltName=IP:127.0.0.1"
    subprocess.run([*command.split(), "-keyout", key, "-out", made], check=True, capture_output=True)
    return made, key


async def test_tls(fakes, certificate):
    certificate, key = certificate
    async with fakes.open_rig(ssl_certfile=str(certificate), ssl_keyfile=str(key)) as rig:
        trusted = ssl.create_default_context(cafile=str(certificate))
        async with httpx.AsyncClient(verify=trusted) as client:
            base = rig.base.replace("http:", "https:")
            assert (await client.get(f"{base}/health")).status_code == 200
            assert f"curl {base}/" in (await client.get(base)).text


async def test_a_certificate_that_is_not_there(rig):
    for flags in ({"ssl_certfile": "/no/where"}, {"ssl_keyfile": "/no/where"}):
        with pytest.raises(StartupError, match="--ssl-certfile"):
            server_config(replace(rig.front.service, config=EngineConfig(**flags)))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("keys = []", "no keys"),
        ("[[keys]]\nname = 'a'", "either key or sha256"),
        ("[[keys]]\nname = 'a'\nkey = ''", "length >= 1"),
        (f"[[keys]]\nname = 'a'\nsha256 = '{hashlib.sha256(b'').hexdigest()}'", "the API key a is empty"),
        ("[[keys]]\nname = 'a b'\nkey = 'x'", "name"),
        ("[[keys]]\nname = 'a'\nkey = 'x'\nlimit = 3", "limit"),
        ("[[keys]]\nname = 'a'\nkey = 'x'\n[[keys]]\nname = 'a'\nkey = 'y'", "same name"),
        ("[[keys]]\nname = 'a'\nkey = 'x'\n[[keys]]\nname = 'b'\nkey = 'x'", "same key"),
        ("keys = [", "api-key-file"),
    ],
)
def test_key_files_that_are_refused(tmp_path, text, message):
    path = tmp_path / "keys.toml"
    path.write_text(text)
    with pytest.raises(StartupError, match=message) as error:
        read_keys(EngineConfig(api_key_file=str(path)))
    assert "'x'" not in str(error.value)


def test_an_empty_key_opens_nothing():
    """`--api-key "$KEY"` without the variable: requests that bring no key would be an admin's."""
    with pytest.raises(StartupError, match="is empty"):
        read_keys(EngineConfig(api_key=""))
