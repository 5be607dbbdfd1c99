"""/v1/files and /v1/batches by OpenAI's client, against a fake engine; and what the store promises."""

import asyncio
import json
import sqlite3

import openai
import pytest

from actorserve.actors.messages import Generate, Refused
from actorserve.errors import RequestError, StartupError
from actorserve.http import batch_runner, batch_store, data_store
from actorserve.http.data_store import DataStore
from actorserve.http.protocol import LOWEST_PRIORITY

pytestmark = pytest.mark.anyio
CHAT = "/v1/chat/completions"
TEXT = "Hello wörld and moon"


@pytest.fixture
def setting(tmp_path):
    return {"data_dir": str(tmp_path / "data"), "max_file_bytes": 20_000, "max_body_bytes": 5_000}


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(batch_runner, "LOOK_SECONDS", 0.01)
    monkeypatch.setattr(batch_runner, "RETRY_SECONDS", 0.01)


def line(i, **body):
    asked = {"messages": [{"role": "user", "content": f"Question {i}"}], **body}
    return {"custom_id": f"line-{i}", "method": "POST", "url": CHAT, "body": asked}


def jsonl(lines):
    return "".join(json.dumps(one) + "\n" for one in lines).encode()


async def created(client, lines, **options):
    content = lines if isinstance(lines, bytes) else jsonl(lines)
    file = await client.files.create(file=("in.jsonl", content), purpose="batch")
    return await client.batches.create(input_file_id=file.id, endpoint=CHAT, completion_window="24h", **options)


async def answered(client, batch, count):
    """Wait until that many lines have an answer."""
    while (await client.batches.retrieve(batch.id)).request_counts.completed < count:  # noqa: ASYNC110
        await asyncio.sleep(0.01)


async def ended(client, batch):
    while batch.status in ("validating", "in_progress", "cancelling"):
        await asyncio.sleep(0.01)
        batch = await client.batches.retrieve(batch.id)
    return batch


async def lines_of(client, name):
    return [] if name is None else [json.loads(one) for one in (await client.files.content(name)).text.splitlines()]


async def test_files(rig, client):
    content = bytes(range(256)) * 8
    made = [await client.files.create(file=(f"{i}.jsonl", content), purpose="batch") for i in range(3)]
    assert (made[0].bytes, made[0].filename, made[0].purpose, made[0].object) == (2048, "0.jsonl", "batch", "file")
    assert (await client.files.retrieve(made[1].id)).model_dump() == made[1].model_dump()
    assert (await client.files.content(made[1].id)).content == content
    pages = await client.files.list(limit=2)
    assert [file.id for file in pages.data] == [made[2].id, made[1].id] and pages.has_more
    assert [file.id async for file in await client.files.list(limit=1, order="asc")] == [file.id for file in made]
    assert (await client.files.list(purpose="batch_output")).data == []
    assert (await client.files.delete(made[1].id)).deleted
    for gone in (client.files.retrieve, client.files.content, client.files.delete):
        with pytest.raises(openai.NotFoundError):
            await gone(made[1].id)


def form_in(charset, filename):
    part = b'--x\r\nContent-Disposition: form-data; name="%b"%b\r\n\r\n%b\r\n'
    text = part % (b"purpose", b"", b"batch") + part % (b"file", b'; filename="%b"' % filename, b"{}") + b"--x--\r\n"
    return {"content": text, "headers": {"content-type": f"multipart/form-data; boundary=x; charset={charset}"}}


BAD_UPLOADS = [
    (form_in("unicode_escape", b"\\ud800"), 400, "file"),
    (form_in("undefined", b"a"), 400, "file"),
    ({"data": {"purpose": "batch"}}, 400, "file"),
    ({"data": {"purpose": "assistants"}, "files": {"file": b"x"}}, 400, "purpose"),
    ({"files": {"file": b"x"}}, 400, "purpose"),
    ({"json": {"purpose": "batch"}}, 400, "file"),
    ({"content": b"--x", "headers": {"content-type": "multipart/form-data"}}, 400, "file"),
    ({"data": {"purpose": "batch"}, "files": {"file": b"x" * 20_001}}, 413, None),
    ({"data": {"purpose": "batch"}, "files": {"file": b"x" * 100_000}}, 413, None),
]


async def test_uploads_that_are_refused(rig):
    for form, status, param in BAD_UPLOADS:
        reply = await rig.http.post("/v1/files", **form)
        assert (reply.status_code, reply.json()["error"]["param"]) == (status, param)
    assert (await rig.http.get("/v1/files")).json()["data"] == []


async def test_a_batch(rig, client):
    asked = [line(i, temperature=i / 10, priority=7) for i in range(5)]
    asked[3] = line(3, temperature=-1)
    batch = await created(client, asked, metadata={"a": "b"})
    assert (batch.status, batch.metadata, batch.expires_at - batch.created_at) == ("validating", {"a": "b"}, 86400)
    batch = await ended(client, batch)
    assert batch.status == "completed"
    counts = batch.request_counts
    assert (counts.total, counts.completed, counts.failed) == (5, 4, 1)
    assert batch.created_at <= batch.in_progress_at <= batch.finalizing_at <= batch.completed_at
    output = await lines_of(client, batch.output_file_id)
    assert [one["custom_id"] for one in output] == ["line-0", "line-1", "line-2", "line-4"]
    assert all(one["error"] is None and one["response"]["status_code"] == 200 for one in output)
    assert output[0]["response"]["body"]["choices"][0]["message"]["content"] == TEXT
    (failed,) = await lines_of(client, batch.error_file_id)
    assert (failed["custom_id"], failed["response"]["status_code"]) == ("line-3", 400)
    assert failed["response"]["body"]["error"]["param"] == "temperature"
    assert {m.priority for m in rig.text.generates} == {LOWEST_PRIORITY}
    assert [one.id async for one in await client.batches.list(limit=1)] == [batch.id]
    assert (await client.files.retrieve(batch.output_file_id)).purpose == "batch_output"
    await client.files.delete(batch.input_file_id)


BAD_INPUTS = [
    (b"", "empty_file", None),
    (b"\n\n", "empty_file", None),
    (b"{\n", "invalid_json", 1),
    (jsonl([line(0), {**line(1), "url": "/v1/completions"}]), "mismatched_endpoint", 2),
    (jsonl([line(0), line(0)]), "duplicate_custom_id", 2),
    (jsonl([{**line(0), "body": [1]}]), "invalid_type", 1),
    (jsonl([line(0), line(1, x=1)]).replace(b'"x"', b'"\xff"'), "invalid_json", 2),
    (jsonl([{**line(0), "method": "GET"}]), "invalid_type", 1),
    (jsonl([{"method": "POST", "url": CHAT, "body": {}}]), "missing_required_parameter", 1),
    (jsonl([line(0), line(1, x="x" * 6000)]), "body_too_large", 2),
]


async def test_input_that_is_refused(rig, client):
    for lines, code, where in BAD_INPUTS:
        batch = await ended(client, await created(client, lines))
        assert (batch.status, batch.output_file_id, batch.error_file_id) == ("failed", None, None)
        assert (batch.errors.data[0].code, batch.errors.data[0].line) == (code, where)
    assert rig.text.got == []


async def test_requests_that_are_refused(rig, client):
    good = await created(client, [line(0)])
    body = {"input_file_id": good.input_file_id, "endpoint": CHAT, "completion_window": "24h"}
    for change, status, param in (
        ({"endpoint": "/v1/models"}, 400, "endpoint"),
        ({"completion_window": "soon"}, 400, "completion_window"),
        ({"input_file_id": "file-x"}, 404, "input_file_id"),
    ):
        reply = await rig.http.post("/v1/batches", json=body | change)
        assert (reply.status_code, reply.json()["error"]["param"]) == (status, param)
    assert (await rig.http.get("/v1/batches?limit=0")).json()["error"]["param"] == "limit"
    assert (await rig.http.get("/v1/batches/batch_x")).status_code == 404
    done = await ended(client, good)
    assert (await rig.http.post(f"/v1/batches/{done.id}/cancel")).status_code == 400
    output = {**body, "input_file_id": done.output_file_id}
    assert (await rig.http.post("/v1/batches", json=output)).json()["error"]["param"] == "input_file_id"


async def test_without_a_folder_there_are_none(fakes):
    async with fakes.open_rig() as rig:
        for path in ("/v1/files", "/v1/batches"):
            reply = await rig.http.get(path)
            assert (reply.status_code, reply.json()["error"]["code"]) == (404, "no_data_dir")


def silent(rig):
    """The engine takes requests and does not answer."""
    rig.text.script = lambda generate: []


async def test_cancel(rig, client, fakes):
    silent(rig)
    batch = await created(client, [line(i) for i in range(3)])
    await rig.text.wait_for(Generate)
    with pytest.raises(openai.ConflictError):
        await client.files.delete(batch.input_file_id)
    cancelling = await client.batches.cancel(batch.id)
    assert cancelling.status == "cancelling"
    batch = await ended(client, cancelling)
    assert (batch.status, batch.request_counts.failed, batch.output_file_id) == ("cancelled", 3, None)
    errors = await lines_of(client, batch.error_file_id)
    assert [one["error"]["code"] for one in errors] == ["batch_cancelled"] * 3
    await fakes.until(lambda: not rig.front.client.table)


async def test_a_batch_that_expires_keeps_what_it_has(rig, client, monkeypatch):
    calls = []

    def first_only(generate):
        calls.append(generate)
        return rig_words(generate) if len(calls) == 1 else []

    rig_words = rig.text.script
    rig.text.script = first_only
    batch = await created(client, [line(i) for i in range(2)])
    await rig.text.wait_for(Generate, 2)
    await answered(client, batch, 1)
    now = batch_runner.time.time()
    monkeypatch.setattr(batch_runner.time, "time", lambda: now + 25 * 3600)
    batch = await ended(client, batch)
    assert (batch.status, batch.request_counts.completed, batch.request_counts.failed) == ("expired", 1, 1)
    assert len(await lines_of(client, batch.output_file_id)) == 1
    (late,) = await lines_of(client, batch.error_file_id)
    assert (late["error"]["code"], late["response"]) == ("batch_expired", None)


async def test_live_requests_go_first(rig, client, fakes):
    """While one is in the engine, a batch has one line there; without one, many."""
    silent(rig)
    live = asyncio.create_task(client.completions.create(model="", prompt="live"))
    await rig.text.wait_for(Generate)
    await created(client, [line(i) for i in range(9)])
    await rig.text.wait_for(Generate, 2)
    await asyncio.sleep(0.1)
    assert len(rig.text.generates) == 2
    live.cancel()
    await rig.text.wait_for(Generate, 10)


async def test_a_line_that_the_engine_drops_is_asked_again(rig, client):
    answers = rig.text.script
    for status, code in ((503, "engine_unavailable"), (429, "overloaded")):
        left = [2]

        def script(generate, left=left, status=status, code=code):
            left[0] -= 1
            return [Refused(generate.rid, 1, status, code, "again")] if left[0] >= 0 else answers(generate)

        rig.text.script = script
        batch = await ended(client, await created(client, [line(0)]))
        assert batch.request_counts.completed == 1


async def test_a_line_that_kills_the_engine_each_time_is_given_up(rig, client, monkeypatch):
    monkeypatch.setattr(batch_runner, "MOST_TRIES", 2)
    rig.text.script = lambda generate: [Refused(generate.rid, 1, 503, "engine_unavailable", "died")]
    batch = await ended(client, await created(client, [line(0)]))
    (error,) = await lines_of(client, batch.error_file_id)
    assert error["response"]["status_code"] == 503
    assert len(rig.text.generates) == 3


async def test_a_new_front_goes_on_where_the_old_one_was(fakes, setting):
    """Of 9 lines, 4 are answered when the front ends; the next one asks for the others only."""
    asked = []
    async with fakes.open_rig(**setting) as rig, openai.AsyncOpenAI(base_url=f"{rig.base}/v1", api_key="-") as client:
        words = rig.text.script

        def four(generate):
            asked.append(json.loads(generate.prompt.payload)["messages"][0]["content"])
            return words(generate) if len(asked) <= 4 else []

        rig.text.script = four
        batch = await created(client, [line(i) for i in range(9)])
        await answered(client, batch, 4)
    before = set(asked[:4])
    async with fakes.open_rig(**setting) as rig, openai.AsyncOpenAI(base_url=f"{rig.base}/v1", api_key="-") as client:
        batch = await ended(client, batch)
        again = {json.loads(m.prompt.payload)["messages"][0]["content"] for m in rig.text.generates}
        assert (batch.status, batch.request_counts.completed) == ("completed", 9)
        names = [one["custom_id"] for one in await lines_of(client, batch.output_file_id)]
    assert names == [f"line-{i}" for i in range(9)]
    assert not again & before and len(again | before) == 9


async def test_lines_with_the_same_beginning_run_together(rig, client):
    asked = [line(i) for i in range(8)]
    for i, one in enumerate(asked):
        one["body"]["messages"].insert(0, {"role": "system", "content": f"You are number {i % 2}"})
    batch = await ended(client, await created(client, asked))
    systems = [json.loads(m.prompt.payload)["messages"][0]["content"][-1] for m in rig.text.generates]
    assert "".join(systems) == "00001111"
    assert [one["custom_id"] for one in await lines_of(client, batch.output_file_id)] == [f"line-{i}" for i in range(8)]


async def test_an_answer_that_cannot_be_kept_is_asked_for_again(rig, client, monkeypatch):
    """The disk fails once, at the last line: the batch does not end without that line."""
    keep, failures = batch_store.answer, [OSError("disk full")]

    def answer(db, row, place, good, line):
        if line.custom_id == "line-1" and failures:
            raise failures.pop()
        keep(db, row, place, good, line)

    monkeypatch.setattr(batch_store, "answer", answer)
    batch = await ended(client, await created(client, [line(0), line(1)]))
    assert (batch.status, batch.request_counts.completed) == ("completed", 2)
    assert len(rig.text.generates) == 3


async def test_streamed_fields_of_a_line_are_overridden(rig, client):
    batch = await ended(client, await created(client, [line(0, stream=True)]))
    assert batch.request_counts.completed == 1


# ------------------------------------------------------------------ the store


def test_one_server_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(data_store, "_LOCK_SECONDS", 0.05)
    first = DataStore(str(tmp_path))
    with pytest.raises(StartupError, match="another server uses it"):
        DataStore(str(tmp_path))
    first.close()
    DataStore(str(tmp_path)).close()


def test_a_folder_that_cannot_be(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(StartupError, match="--data-dir"):
        DataStore(str(tmp_path / "file"))


async def test_a_line_has_one_answer(tmp_path):
    store = DataStore(str(tmp_path))

    def twice(db: sqlite3.Connection) -> None:
        db.execute("INSERT INTO batches(id, owner, status, input, body) VALUES('b', '', 'in_progress', 'f', '{}')")
        db.execute("INSERT INTO lines(batch, place, number, custom_id, start, size) VALUES(1, 0, 0, 'a', 0, 1)")
        for text in ("first", "second"):
            error = batch_store.LineError(text, text)
            batch_store.answer(db, 1, 0, False, batch_store.OutputLine(text, "a", None, error))

    def look(db: sqlite3.Connection) -> tuple:
        (answer,) = db.execute("SELECT answer FROM lines").fetchone()
        return json.loads(answer)["id"], *db.execute("SELECT completed, failed FROM batches").fetchone()

    await store.do(twice)
    assert await store.do(look) == ("first", 0, 1)
    store.close()


async def test_a_transaction_that_raises_leaves_nothing(tmp_path):
    store = DataStore(str(tmp_path))

    def half(db: sqlite3.Connection) -> None:
        db.execute("INSERT INTO lines(batch, place, number, custom_id, start, size) VALUES(1, 0, 0, 'a', 0, 1)")
        raise RequestError("no")

    with pytest.raises(RequestError):
        await store.do(half)
    assert await store.do(lambda db: db.execute("SELECT count(*) FROM lines").fetchone()) == (0,)
    store.close()


@pytest.mark.parametrize("size", [1, 3, 4, 100])
def test_lines_are_the_same_however_they_are_read(size):
    text = b"ab\n\ncde\nf"
    parts = [text[i : i + size] for i in range(0, len(text), size)]
    lines = list(batch_store.split_lines(lambda n: parts.pop(0) if parts else b"", 100))
    assert lines == [(0, b"ab"), (3, b""), (4, b"cde"), (8, b"f")]
    assert all(text[start : start + len(one)] == one for start, one in lines)


def test_a_line_without_an_end_is_not_collected():
    parts = [b"x" * 10] * 5
    lines = list(batch_store.split_lines(lambda n: parts.pop(0) if parts else b"", 15))
    assert [len(one) for _, one in lines] == [20, 20, 10]
