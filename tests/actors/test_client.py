"""The request client alone: a list stands in for the lane to the text actor."""

import struct
from contextlib import nullcontext

import anyio
import msgspec
import pytest
from msgspec.structs import replace

from actorserve.actors import quarantine
from actorserve.actors.admission import Submission
from actorserve.actors.client import Client, token_prompt
from actorserve.actors.messages import (
    Abort,
    Cancel,
    Chunk,
    Chunks,
    Drain,
    Generate,
    PeerDown,
    PeerUp,
    Refused,
    Resumed,
    Stats,
    TextPrompt,
    Tokenized,
    TokenLogprob,
)
from actorserve.actors.ref import Gone
from actorserve.actors.stream import JOIN_EVERY, LoopWakeup
from actorserve.config import EngineConfig, ModelInfo
from actorserve.errors import ActorserveError, EngineDown, Overloaded, RequestError
from actorserve.sampler.params import SamplingParams

pytestmark = pytest.mark.anyio
MODEL = ModelInfo(name="m", path="/m", model_type="llama", vocab_size=100, context_length=64, eos_ids=(2,))
STATS = Stats(0, 1, 10, 4, 5, 1, 100, 60, 40, 33, 0, 5, 6, 1500.0, True)
HI = TextPrompt("Hi")
PARAMS = SamplingParams()


class Lane:
    """What was posted; raises Gone from message `dies_at` on."""

    def __init__(self):
        self.sent = []
        self.dies_at = None

    @property
    def up(self):
        return self.dies_at is None

    def post(self, message):
        if self.dies_at is not None and len(self.sent) >= self.dies_at:
            raise Gone("text")
        self.sent.append(message)


@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request):
    return request.param


@pytest.fixture
def lane():
    return Lane()


@pytest.fixture
def client(lane):
    """After each test what is counted as being in the engine is what the table has."""
    made = Client(lane, EngineConfig(max_queued_requests=5), MODEL, index=3, epoch=2)
    yield made
    assert made.admission.requests == len(made.table)
    assert made.admission.bytes == sum(choice.cost for choice in made.table.values())


def chunk(rid, text="x", finish=None, count=1):
    logprob = TokenLogprob(count, -0.5, text.encode(), [])
    return Chunk(rid, text, [count], [logprob], finish, None, 7, count, 3, prompt_logprobs=[logprob])


def say(client, *chunks):
    client.receive(Chunks(list(chunks)), "text")


async def test_ids_are_in_a_row_and_of_this_life(client, lane):
    first = client.submit_all([Submission(HI, PARAMS, 2), Submission(HI, PARAMS, 1)])
    second = client.submit(HI, PARAMS, cache_salt="s", priority=4)
    assert first.rid == 3 << 40 | 2 << 32
    assert [(g.rid - first.rid, g.n) for g in lane.sent] == [(0, 2), (2, 1), (3, 1)]
    assert (lane.sent[2].cache_salt, lane.sent[2].priority, second.rid) == ("s", 4, first.rid + 3)


async def test_chunks_of_an_absent_reader_are_joined(client):
    stream = client.submit(HI, PARAMS, n=2)
    count = 3 * JOIN_EVERY
    for i in range(1, count + 1):
        say(client, chunk(stream.rid, f"{i},", "stop" if i == count else None, i))
        assert len(stream.choices[0].pending) <= JOIN_EVERY
    say(client, chunk(stream.rid + 1, "other"))
    first, second = await stream.take()
    assert first.text == "".join(f"{i}," for i in range(1, count + 1))
    assert first.ids == [item.token for item in first.logprobs] == list(range(1, count + 1))
    assert first.prompt_logprobs == first.logprobs
    assert (first.finish, first.completion_tokens) == ("stop", count)
    assert (stream.index(second), second.text, second.finish) == (1, "other", None)


async def test_reader_wakes_once_a_burst_and_ends(client):
    stream = client.submit(HI, PARAMS)
    got = []

    async def read():
        while chunks := await stream.take():
            got.append([c.text for c in chunks])

    async with anyio.create_task_group() as group:
        group.start_soon(read)
        for burst in ("ab", "c", "de"):
            await anyio.wait_all_tasks_blocked()
            for letter in burst:
                say(client, chunk(stream.rid, letter, "length" if letter == "e" else None))
    assert got == [["ab"], ["c"], ["de"]]
    assert stream.ended
    assert client.table == {}


@pytest.mark.parametrize("state", ["up", "text is down", "others are in quarantine"])
async def test_what_cannot_be_sent_takes_no_place(client, lane, monkeypatch, state):
    """A text that is no Unicode, or a message beyond what a lane takes: refused each time, and no place is lost."""
    monkeypatch.setattr("actorserve.actors.lane.MAX_MESSAGE", 1000)
    keep = lane.post

    def post(message):
        if len(msgspec.msgpack.encode(message)) > 1000:
            raise ValueError("message of so many bytes")
        keep(message)

    monkeypatch.setattr(lane, "post", post)
    if state == "text is down":
        client.receive(PeerDown("text", 1, "killed"), "supervisor")
    elif state == "others are in quarantine":
        client._quarantine.add(Generate(1, 1, HI, PARAMS))
    for prompt in (TextPrompt("\ud800"), TextPrompt("long" * 300)):
        for _ in range(20):
            with pytest.raises(RequestError, match="cannot be sent"):
                client.submit(prompt, PARAMS)
    assert client.table == {} and client.admission.requests == 0
    if state == "text is down":
        client.receive(PeerUp("text", 2), "supervisor")
    assert client.submit(TextPrompt("Hello"), PARAMS).cancel() is None


async def test_iteration_gives_every_chunk(client):
    stream = client.submit(HI, PARAMS, n=2)
    say(client, chunk(stream.rid, "a", "stop"), chunk(stream.rid + 1, "b", "stop"))
    assert [c.text async for c in stream] == ["a", "b"]


async def test_collect_sleeps_until_the_end(client):
    wakes = []

    class Counting:
        def __init__(self):
            self.event = anyio.Event()

        def set(self):
            wakes.append(1)
            self.event.set()

        async def wait(self):
            await self.event.wait()

    client.new_wakeup = Counting
    stream = client.submit(HI, PARAMS, n=2)
    results = []

    async def collect():
        results.extend(await stream.collect())

    async with anyio.create_task_group() as group:
        group.start_soon(collect)
        for i in range(5):
            await anyio.wait_all_tasks_blocked()
            finish = "stop" if i == 4 else None
            say(client, chunk(stream.rid, str(i), finish), chunk(stream.rid + 1, "y", finish))
    assert [r.text for r in results] == ["01234", "yyyyy"]
    assert wakes == [1]


@pytest.mark.parametrize("anyio_backend", ["asyncio"], indirect=False)
async def test_loop_wakeup(lane, anyio_backend):
    client = Client(lane, EngineConfig(), MODEL, new_wakeup=LoopWakeup)
    stream = client.submit(HI, PARAMS)
    with anyio.move_on_after(0):
        await stream.take()  # a cancelled reader's wakeup must bear being set
    async with anyio.create_task_group() as group:
        group.start_soon(stream.take)
        await anyio.wait_all_tasks_blocked()
        say(client, chunk(stream.rid), chunk(stream.rid))
    say(client, chunk(stream.rid, "end", "stop"))
    assert [c.text for c in await stream.take()] == ["end"]


def die(client):
    client.receive(PeerDown("text", 1, "killed"), "supervisor")


async def test_output_before_a_failure_is_delivered_first(client):
    stream = client.submit(HI, PARAMS)
    say(client, chunk(stream.rid, "a"))
    client.fail_all(EngineDown("stopped"))
    assert [c.text for c in await stream.take()] == ["a"]
    for _ in range(2):
        with pytest.raises(EngineDown):
            await stream.take()
    assert client.table == {}


async def test_the_next_text_actor_is_asked_for_the_rest(client, lane):
    first = client.submit_all([Submission(HI, PARAMS, 2), Submission(HI, PARAMS, 1)])
    say(client, chunk(first.rid, "ab", count=5), chunk(first.rid + 1, "x", "stop"), chunk(first.rid, "c", count=6))
    fresh = client.submit(HI, PARAMS, cache_salt="s")
    asked = list(lane.sent)
    die(client)
    meanwhile = client.submit(HI, PARAMS)
    first.choices[2].aborted = True
    assert lane.sent == asked and client.reason_down() is not None
    client.receive(PeerUp("text", 2), "supervisor")
    again = lane.sent[len(asked) :]
    known = memoryview(struct.pack("2i", 5, 6))
    assert again[0] == replace(asked[0], resumed=[Resumed(first.rid, known, 3, 2, 3, 0, 0, 2)])
    assert again[1:3] == asked[1:] and again[2].cache_salt == "s"
    assert again[3].rid == meanwhile.rid == fresh.rid + 1
    assert again[4:] == [Abort(first.rid + 2)]
    say(client, chunk(first.rid, "d", "length"), chunk(first.rid + 2, "", "abort"))
    assert [c.text for c in await first.collect()] == ["abcd", "x", ""]


async def test_what_two_text_actors_die_of_is_given_up(client, lane):
    """And nothing that was only near: not in its queue, nor at work when somebody killed it."""
    near, guilty, alive = (client.submit(HI, PARAMS, n=n) for n in (1, 2, 1))
    for epoch in range(2, 8):
        at_work = (guilty.rid + 1, alive.rid) if epoch in (4, 7) else ()
        fault = epoch != 3
        assert not guilty.ended
        client.receive(PeerDown("text", epoch - 1, "killed", fault, at_work if fault else (near.rid,)), "supervisor")
        client.receive(PeerUp("text", epoch), "supervisor")
        say(client, chunk(near.rid))
        if epoch == 5:
            say(client, chunk(alive.rid, finish="stop"), chunk(guilty.rid))
    with pytest.raises(EngineDown) as caught:
        while not guilty.ended:
            await guilty.take()
    assert caught.value.code == "text_crashed" and list(client.table) == [near.rid]


@pytest.mark.parametrize("code", ["text_crashed", "scheduler_crashed", "fsm_crashed", "executor_crashed", "overloaded"])
async def test_what_an_actor_died_of_is_not_tried_again(client, lane, code):
    """The same prompt with the same parameters, that is; anything else is, and the same in an hour."""
    prompt, params = token_prompt([5, 6], 100), SamplingParams(temperature=0)
    stream = client.submit(prompt, params, n=2, name="first")
    client.receive(Refused(stream.rid + 1, 1, 503, code, "why"), "text")
    with pytest.raises(ActorserveError):
        await stream.take()
    with nullcontext() if code == "overloaded" else pytest.raises(RequestError, match="again and again"):
        client.submit(token_prompt([5, 6], 100), SamplingParams(temperature=0), n=2, name="second")
    client.submit(prompt, params)
    client.submit(prompt, replace(params, seed=1), n=2)


async def test_quarantine_ends_and_is_bounded(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(quarantine.time, "monotonic", lambda: clock[0])
    kept = quarantine.Quarantine()
    asked = [Generate(i, 1, TextPrompt(str(i)), PARAMS) for i in range(quarantine.MOST + 1)]
    for one in asked:
        kept.add(one)
    kept.check(Submission(asked[0].prompt, PARAMS))
    for clock[0] in (0.0, quarantine.SECONDS - 1):
        for one in (asked[1], asked[-1]):
            with pytest.raises(RequestError) as caught:
                kept.check(Submission(one.prompt, PARAMS))
            assert (caught.value.status, caught.value.code) == (400, "quarantined")
    clock[0] = quarantine.SECONDS
    kept.check(Submission(asked[1].prompt, PARAMS))


async def test_a_question_that_text_actors_die_of_is_given_up(client, lane):
    async def ask():
        with pytest.raises(EngineDown) as caught:
            await client.questions.tokenize(HI)
        assert caught.value.code == "text_crashed"

    async with anyio.create_task_group() as group:
        group.start_soon(ask)
        await anyio.wait_all_tasks_blocked()
        for epoch in range(1, 3):
            client.receive(PeerDown("text", epoch, "killed", at_work=(lane.sent[0].rid,)), "supervisor")
            client.receive(PeerUp("text", epoch + 1), "supervisor")
    assert len(lane.sent) == 2


async def test_questions_outlive_the_text_actor(client, lane):
    answers = []

    async def ask():
        answers.append(await client.questions.tokenize(HI))

    async with anyio.create_task_group() as group:
        group.start_soon(ask)
        await anyio.wait_all_tasks_blocked()
        die(client)
        client.receive(PeerUp("text", 2), "supervisor")
        assert lane.sent[0] == lane.sent[1]
        client.receive(Tokenized(lane.sent[1].rid, memoryview(struct.pack("i", 7))), "text")
    assert answers == [[7]]


async def test_peer_down_after_the_end_changes_nothing(client):
    stream = client.submit(HI, PARAMS)
    say(client, chunk(stream.rid, "a", "stop"))
    die(client)
    stream.cancel(EngineDown("late"))
    assert [c.text for c in await stream.collect()] == ["a"]


@pytest.mark.parametrize(
    ("status", "code", "kind"),
    [
        (400, "too_long", RequestError),
        (413, "too_large", RequestError),
        (429, "overloaded", Overloaded),
        (503, "overloaded", Overloaded),
        (503, "executor_crashed", EngineDown),
        (500, "poison", Exception),
    ],
)
async def test_refused(client, lane, status, code, kind):
    stream = client.submit(HI, PARAMS, n=2)
    client.receive(Refused(stream.rid, 2, status, code, "why", "prompt"), "text")
    with pytest.raises(kind) as caught:
        await stream.take()
    assert (caught.value.status, caught.value.code, caught.value.message) == (status, code, "why")
    assert (client.table, len(lane.sent)) == ({}, 1)  # no Cancel for what is over


async def test_cancel_tells_the_engine_once_a_prompt(client, lane):
    stream = client.submit_all([Submission(HI, PARAMS, 2), Submission(HI, PARAMS, 1), Submission(HI, PARAMS, 1)])
    say(client, chunk(stream.rid + 2, "done", "stop"))
    stream.cancel()
    stream.cancel()
    assert lane.sent[3:] == [Cancel(stream.rid, 2), Cancel(stream.rid + 3, 1)]
    say(client, chunk(stream.rid, "late"))
    assert [c.text for c in await stream.take()] == ["done"]
    assert await stream.take() == []


async def test_orphans_are_cancelled_at_the_next_output(client, lane):
    stream, other = client.submit(HI, PARAMS), client.submit(HI, PARAMS)
    client.orphans.append(stream)
    say(client, chunk(other.rid))
    assert lane.sent[2:] == [Cancel(stream.rid, 1)]


async def test_limits(client):
    client.submit(HI, PARAMS, n=4)
    with pytest.raises(Overloaded) as caught:
        client.submit(HI, PARAMS, n=2)
    assert (caught.value.status, caught.value.retry_after) == (429, 1)
    with pytest.raises(RequestError):
        client.submit(HI, PARAMS, n=6)
    client.submit(HI, PARAMS)
    client.receive(Drain(0), "supervisor")
    with pytest.raises(Overloaded, match="shutting down"):
        client.submit(HI, PARAMS)
    assert len(client.table) == 5


async def test_gone_while_submitting_leaves_nothing(client, lane):
    lane.dies_at = 1
    with pytest.raises(EngineDown):
        client.submit_all([Submission(HI, PARAMS), Submission(HI, PARAMS)])
    assert client.table == {}
    assert client.reason_down() == "the text actor is starting"


async def test_a_request_just_after_the_text_actor_died_waits_for_the_next(client, lane):
    """The lane knows before its reader has read so."""
    client.receive(PeerUp("text", 1), "supervisor")
    lane.dies_at = 1
    stream = client.submit_all([Submission(HI, PARAMS), Submission(HI, PARAMS)])
    assert len(client.table) == 2
    die(client)
    lane.dies_at = None
    lane.sent.clear()
    client.receive(PeerUp("text", 2), "supervisor")
    assert [asked.rid for asked in lane.sent] == [stream.rid, stream.rid + 1]
    say(client, chunk(stream.rid, "a", "stop"))
    assert [c.text for c in await stream.take()] == ["a"]


async def test_bad_parameters_send_nothing(client, lane):
    with pytest.raises(RequestError):
        client.submit_all([Submission(HI, PARAMS), Submission(HI, SamplingParams(top_p=2))])
    assert (lane.sent, client.table) == ([], {})


async def test_health(client):
    assert client.reason_down() == "the scheduler has not reported yet"
    client.receive(STATS, "text")
    assert client.reason_down() is None
    assert client.stats == STATS


async def test_token_prompt():
    prompt = token_prompt([0, 99, 5], 100)
    assert bytes(prompt.ids) == struct.pack("<3i", 0, 99, 5)
    for ids in ([], [100], [-1], [1 << 40]):
        with pytest.raises(RequestError) as caught:
            token_prompt(ids, 100, "prompt")
        assert caught.value.param == "prompt"


async def test_latencies_are_reported_once(lane):
    ended = []
    client = Client(lane, EngineConfig(), MODEL, on_end=ended.append)
    stream = client.submit(HI, PARAMS, n=2)
    say(client, chunk(stream.rid), chunk(stream.rid + 1))
    say(client, chunk(stream.rid, "z", "stop", 2))
    (choice,) = ended
    assert choice.arrival_ns <= choice.first_ns <= choice.last_ns
    assert choice.last.completion_tokens == 2
    assert isinstance(lane.sent[0], Generate)
    assert lane.sent[0].arrival_ns == choice.arrival_ns
