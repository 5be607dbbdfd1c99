"""The text actor between a fake front and a fake scheduler, on local lanes, without processes."""

import json
import math
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import tiny_tokenizers
import trio
import trio.lowlevel

from actorserve.actors import fetch, prompts
from actorserve.actors.actor import Context, connect, disconnect
from actorserve.actors.messages import (
    NO_STATS,
    Abort,
    AbortNamed,
    Cancel,
    ChatPrompt,
    Chunk,
    Chunks,
    Detokenize,
    Detokenized,
    Done,
    Ended,
    Finish,
    FrontInbox,
    Generate,
    GrammarSpec,
    ImageFile,
    ImagePixels,
    ImageSpan,
    Look,
    Order,
    PeerDown,
    PeerUp,
    PromptLogprobs,
    Refused,
    Resumed,
    SchedulerInbox,
    Seen,
    Started,
    Stats,
    Submit,
    TextInbox,
    TextPrompt,
    Tokenize,
    Tokenized,
    TokenPrompt,
    Tokens,
    Unpin,
)
from actorserve.actors.output import MOST_ENTRIES
from actorserve.actors.prompts import INLINE_CHARS, Prompts, derived_seed
from actorserve.actors.text import Text
from actorserve.config import EngineConfig, ModelInfo, Thoughts
from actorserve.errors import StartupError
from actorserve.models.images import Image
from actorserve.models.tokenizer import Tokenizer, load_tokenizer
from actorserve.sampler.params import MAX_SEED, MIN_SEED, SamplingParams

CONTEXT_LENGTH = 200
VOCAB = 512


class World:
    """A text actor, two fronts and a scheduler; every message goes through the codec."""

    def __init__(self, folder: str, **config: Any) -> None:
        settings = EngineConfig(**config)
        model = ModelInfo(
            name="tiny", path=folder, model_type="llama", vocab_size=VOCAB, context_length=CONTEXT_LENGTH, eos_ids=(2,)
        )
        self.fronts = {
            name: Context(name, settings, model, FrontInbox, sends_to=["text"]) for name in ("front.0", "front.1")
        }
        self.sched = Context("sched", settings, model, SchedulerInbox, sends_to=["text"])
        self.context = Context("text", settings, model, TextInbox, sends_to=[*self.fronts, "sched"])
        self.text = Text(self.context)
        for peer in (*self.fronts.values(), self.sched):
            connect(peer, self.context, codec=True)
            connect(self.context, peer, codec=True)

    async def start(self) -> None:
        await self.text.start()

    def settle(self) -> None:
        self.text.drain()

    def front(self, name: str = "front.0") -> list[Any]:
        """What the front got since the last call."""
        return received(self.fronts[name])

    def scheduler(self) -> list[Any]:
        return received(self.sched)

    def ask(
        self, rid: int = 1, prompt: str | bytes | list[int] = "Hello", n: int = 1, front: str = "front.0", **params: Any
    ) -> None:
        """Send a Generate and let the text actor work."""
        kinds: dict[type, Any] = {str: TextPrompt, bytes: ChatPrompt}
        made = TokenPrompt(view("i", prompt)) if isinstance(prompt, list) else kinds[type(prompt)](prompt)
        self.fronts[front].ref("text").post(Generate(rid, n, made, SamplingParams(**params), "salt", 3, 77))
        self.settle()

    def row(self, *rows: tuple[int, int] | tuple[int, int, Finish], settle: bool = True, **logprobs: Any) -> None:
        """Send one step's tokens: (rid, token) or (rid, token, finish)."""
        columns = [(r[0], r[1], r[2] if len(r) > 2 else Finish.NONE) for r in rows]
        rids, ids, finish = zip(*columns, strict=True)
        self.sched.ref("text").post(
            Tokens(
                view("q", rids),
                view("i", ids),
                memoryview(bytes(finish)),
                view("f", logprobs.get("logprobs", [])),
                logprobs.get("top_n", 0),
                view("i", logprobs.get("top_ids", [])),
                view("f", logprobs.get("top_logprobs", [])),
                listed=view("f", logprobs.get("listed", [])),
            )
        )
        if settle:
            self.settle()

    def say(self, rid: int, ids: list[int], last: Finish = Finish.NONE) -> list[Chunk]:
        """Send tokens one by one, then return all chunks the front got."""
        for i, token in enumerate(ids):
            self.row((rid, token, last if i == len(ids) - 1 else Finish.NONE))
        return self.chunks()

    def chunks(self, front: str = "front.0") -> list[Chunk]:
        got = self.front(front)
        assert all(isinstance(message, Chunks) for message in got), got
        return [chunk for message in got for chunk in message.chunks]

    def close(self) -> None:
        for context in (self.context, self.sched, *self.fronts.values()):
            context.close()


def view(code: str, values: Any) -> memoryview:
    return memoryview(array(code, values).tobytes())


def received(context: Context) -> list[Any]:
    """Messages in the inbox, without PeerUp. Arrays stay valid: local lanes copy."""
    got = []
    while (item := context.inbox.poll()) is not None:
        if not isinstance(item[0], PeerUp):
            got.append(item[0])
    return got


def whole(chunks: list[Chunk]) -> str:
    return "".join(chunk.text for chunk in chunks)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_tokenizers.byte_level(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def tokenizer(folder: str) -> Tokenizer:
    return load_tokenizer(folder)


@pytest.fixture
def world(folder: str) -> Iterator[World]:
    made = World(folder)
    trio.run(made.start)
    made.settle()
    yield made
    made.close()


# ------------------------------------------------------------------ submitting


def test_a_text_prompt_is_submitted(world: World, tokenizer: Tokenizer) -> None:
    world.ask(5, "Hello <|im_start|>", max_new_tokens=7, stop=("x",), temperature=0.5)
    (submit,) = world.scheduler()
    assert isinstance(submit, Submit)
    assert np.frombuffer(submit.ids, dtype=np.int32).tolist() == tokenizer.encode("Hello <|im_start|>")
    assert (submit.rid, submit.cache_salt, submit.priority, submit.arrival_ns) == (5, "salt", 3, 77)
    want = SamplingParams(max_new_tokens=7, temperature=0.5, seed=derived_seed(0, 5))
    assert submit.params == want  # stop strings are not the scheduler's affair
    assert world.front() == []


def test_choices_draw_differently(world: World) -> None:
    world.ask(10, n=3)
    world.ask(20, n=2, seed=MAX_SEED)
    world.ask(30, n=1)
    submits = world.scheduler()
    assert [s.rid for s in submits] == [10, 11, 12, 20, 21, 30]
    seeds = [s.params.seed for s in submits]
    assert seeds[1:3] == [seeds[0] + 1, seeds[0] + 2]
    assert seeds[3:5] == [MAX_SEED, MIN_SEED] and len(set(seeds)) == 6


def test_new_tokens_fit_the_context(world: World) -> None:
    for rid, asked in ((1, None), (2, 10_000), (3, 5), (4, 0)):
        world.ask(rid, [4] * 150, max_new_tokens=asked)
    world.ask(5, [4] * 150, max_new_tokens=60, min_new_tokens=55)
    submits = world.scheduler()
    assert [s.params.max_new_tokens for s in submits] == [50, 50, 5, 0, 50]
    assert submits[-1].params.min_new_tokens == 50


def test_a_conversation_is_rendered(world: World, tokenizer: Tokenizer) -> None:
    world.ask(1, json.dumps({"messages": [{"role": "user", "content": "a<|im_end|>"}]}).encode())
    (submit,) = world.scheduler()
    ids = np.frombuffer(submit.ids, dtype=np.int32).tolist()
    assert tokenizer.decode(ids, False) == "<|im_start|>user\na<|im_end|><|im_end|>\n<|im_start|>assistant\n"
    assert [i for i in ids if i in tokenizer.special_ids] == tokenizer.encode("<|im_start|><|im_end|><|im_start|>")


@pytest.mark.parametrize(
    ("prompt", "params", "param", "code"),
    [
        ("", {}, "prompt", "invalid_value"),
        ([], {}, "input_ids", "invalid_value"),
        ([4, VOCAB], {}, "input_ids", "invalid_value"),
        ([-1], {}, "input_ids", "invalid_value"),
        ([4] * CONTEXT_LENGTH, {}, "input_ids", "context_length_exceeded"),
        ("a b " * 300, {}, "prompt", "context_length_exceeded"),
        (b'{"messages": []}', {}, "messages", "invalid_value"),
        (b'{"messages": [{"role": "user", "content": 3}]}', {}, "messages", "invalid_value"),
        ("ok", {"temperature": -1.0}, "temperature", "invalid_value"),
        ("ok", {"stop_token_ids": (VOCAB,)}, "stop_token_ids", "invalid_value"),
        ("ok", {"stop_regex": ("(",)}, "stop_regex", "invalid_value"),
        ("ok", {"stop_regex": ("a*",)}, "stop_regex", "invalid_value"),
    ],
)
def test_bad_requests_are_refused(world: World, prompt: Any, params: dict[str, Any], param: str, code: str) -> None:
    world.ask(3, prompt, n=2, **params)
    (refused,) = world.front()
    assert isinstance(refused, Refused)
    assert (refused.rid, refused.n, refused.status, refused.code, refused.param) == (3, 2, 400, code, param)
    assert world.scheduler() == [] and not world.text.outputs


def test_broken_token_arrays_are_refused(world: World) -> None:
    prompt = TokenPrompt(memoryview(b"abc"))
    world.fronts["front.0"].ref("text").post(Generate(1, 1, prompt, SamplingParams()))
    world.settle()
    (refused,) = world.front()
    assert refused.status == 400 and refused.param == "input_ids"


def test_prompt_tokens_in_the_engine_are_bounded(folder: str) -> None:
    """--max-queued-tokens counts each continuation's; what ends, however it ends, makes room again."""
    world = World(folder, max_queued_tokens=20)
    trio.run(world.start)
    world.settle()
    world.ask(1, [5] * 6, n=3)
    assert len(world.scheduler()) == 3
    world.ask(10, [5] * 3)
    (refused,) = world.front()
    assert (refused.rid, refused.status, refused.code) == (10, 429, "overloaded")
    world.ask(11, [5] * 2)
    world.ask(12, [5])
    assert [m.rid for m in world.front()] == [12] and world.text.prompt_tokens == 20
    world.row((1, 9, Finish.STOP))
    world.row((2, 9, Finish.POISON))
    world.fronts["front.0"].ref("text").post(Cancel(3, 1))
    world.sched.ref("text").post(Ended(11, 503, "executor_crashed", "x"))
    world.settle()
    assert world.text.prompt_tokens == 0
    world.ask(13, [5] * 7, n=3)
    assert [(m.status, m.code) for m in world.front() if isinstance(m, Refused) and m.rid == 13] == [(400, "too_large")]
    world.close()


def test_a_tokenizer_that_raises_breaks_one_request(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*prompt: Any) -> None:
        raise ValueError("/secret/path")

    with monkeypatch.context() as patch:
        patch.setattr(world.text.prompts, "encode", broken)
        patch.setattr(world.text.prompts, "tokenize", broken)
        world.ask(1)
        refusals = [*world.front(), *question(world, Tokenize(7, TextPrompt("Hello")))]
    assert [m.rid for m in refusals] == [1, 7]
    assert all(m.status == 500 and "secret" not in m.message for m in refusals)
    world.ask(2)
    assert len(world.scheduler()) == 1


def test_long_prompts_are_tokenized_in_a_thread(world: World, tokenizer: Tokenizer) -> None:
    long = "x" * (INLINE_CHARS + 1)

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            world.context.host({}, nursery)
            world.ask(1, long)
            world.ask(2, "short")
            assert [s.rid for s in world.scheduler()] == [2]
            world.ask(3, long)
            world.ask(4, long, front="front.1")
            world.fronts["front.0"].ref("text").post(Cancel(3, 1))
            world.context.inbox.put_system(PeerDown("front.1", 1, "died"))
            world.settle()
        # leaving the nursery waits for the threads

    trio.run(main)
    (refused,) = world.front()  # far over the tiny context; the cancelled ones are not heard of
    assert (refused.rid, refused.code, refused.param) == (1, "context_length_exceeded", "prompt")
    assert world.front("front.1") == [] and world.scheduler() == [] and not world.text.tokenizing


def test_a_request_that_comes_twice(world: World, tokenizer: Tokenizer, monkeypatch: Any) -> None:
    """A front that hears of a death late has asked the next text actor before it knows that it is another one."""
    world.ask(1, n=2)
    world.row((1, tokenizer.encode("a")[0]))
    world.ask(1, n=2)
    assert [type(m) for m in world.scheduler()] == [Submit, Submit]
    world.row((1, tokenizer.encode("b")[0], Finish.LENGTH), (2, tokenizer.encode("c")[0], Finish.LENGTH))
    chunks = world.chunks()
    assert [whole([c for c in chunks if c.rid == rid]) for rid in (1, 2)] == ["ab", "c"]
    assert not world.text.prompt_tokens and not world.text.replicas[0].requests

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            world.context.host({}, nursery)
            world.ask(5)
            world.ask(5)

    monkeypatch.setattr(prompts, "INLINE_CHARS", 1)
    trio.run(main)
    assert [m.rid for m in world.scheduler()] == [5]


def test_an_abort_while_the_prompt_is_tokenized(world: World, tokenizer: Tokenizer, monkeypatch: Any) -> None:
    """Or its images are fetched: it ends then, with nothing. By its id, or by its name from another front."""
    monkeypatch.setattr(prompts, "INLINE_CHARS", 1)

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            world.context.host({}, nursery)
            for rid, name in ((1, "a"), (4, "b"), (5, "c")):
                asked = Generate(rid, 3 if rid == 1 else 1, TextPrompt("Hello"), SamplingParams(), name=name)
                world.fronts["front.0"].ref("text").post(asked)
            for message in (Abort(2), Abort(4), Abort(9)):
                world.fronts["front.0"].ref("text").post(message)
            world.fronts["front.1"].ref("text").post(AbortNamed("c", None))
            world.settle()
            assert world.scheduler() == [] and list(world.text.tokenizing) == [1, 4, 5]

    trio.run(main)
    told = world.scheduler()
    assert {m.rid for m in told if isinstance(m, Submit)} == {1, 2, 3, 4, 5}
    assert sorted(m.rid for m in told if isinstance(m, Abort)) == [2, 4, 5]
    assert not world.text.tokenizing


# ------------------------------------------------------------------ output


def test_text_comes_back(world: World, tokenizer: Tokenizer) -> None:
    world.ask(1, "Hello there")
    world.sched.ref("text").post(Started(1, 2, 1000))
    ids = [*tokenizer.encode(" how are you?"), 2]
    chunks = world.say(1, ids, Finish.STOP)
    assert whole(chunks) == " how are you?"
    assert [c.finish for c in chunks] == [None] * (len(chunks) - 1) + ["stop"]
    last = chunks[-1]
    assert last.matched == 2 and last.completion_tokens == len(ids) and last.cached_tokens == 2
    assert last.prompt_tokens == len(tokenizer.encode("Hello there"))
    assert [i for c in chunks for i in c.ids] == ids
    assert world.scheduler()[1:] == [] and not world.text.outputs


def test_steps_in_one_burst_make_one_chunk(world: World, tokenizer: Tokenizer) -> None:
    world.ask(1)
    world.ask(2)
    world.ask(3, front="front.1")
    ids = tokenizer.encode("a b c")
    for token in ids:
        world.row((1, token), (2, token), (3, token), settle=False)
    world.settle()
    (message,) = world.front()
    assert [(c.rid, c.text, c.ids, c.completion_tokens) for c in message.chunks] == [
        (rid, "a b c", ids, len(ids)) for rid in (1, 2)
    ]
    assert [c.rid for c in world.chunks("front.1")] == [3]


def test_length_and_no_tokens_at_all(world: World, tokenizer: Tokenizer) -> None:
    world.ask(1)
    (chunk,) = world.say(1, tokenizer.encode("b")[:1], Finish.LENGTH)
    assert (chunk.text, chunk.finish, chunk.matched, chunk.completion_tokens) == ("b", "length", None, 1)
    world.ask(2, max_new_tokens=0)
    (chunk,) = world.say(2, [-1], Finish.LENGTH)
    assert (chunk.text, chunk.ids, chunk.finish, chunk.completion_tokens) == ("", [], "length", 0)


def test_characters_are_whole(world: World, tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("🦊é")
    assert len(ids) > 2
    world.ask(1)
    chunks = world.say(1, ids)
    assert "".join(c.text for c in chunks) == "🦊é" and not any("\ufffd" in c.text for c in chunks)
    assert [i for c in chunks for i in c.ids] == ids
    world.ask(2)
    chunks = world.say(2, ids[:2], Finish.LENGTH)
    assert whole(chunks) == "\ufffd" and chunks[-1].finish == "length"


@pytest.mark.parametrize("keep", [False, True])
def test_stop_strings_over_tokens(world: World, tokenizer: Tokenizer, keep: bool) -> None:
    world.ask(1, stop=("END", "nothing"), no_stop_trim=keep)
    world.scheduler()
    ids = tokenizer.encode("one EN two END three")
    chunks = world.say(1, ids)
    assert whole(chunks) == "one EN two " + "END" * keep
    last = chunks[-1]
    assert (last.finish, last.matched) == ("stop", "END")
    seen = [i for c in chunks for i in c.ids]
    assert ids[: len(seen)] == seen and last.completion_tokens == len(seen)
    assert tokenizer.decode(seen).endswith("END")
    assert not any("E" in c.text and c.finish is None and c.text.endswith(("E", "EN")) for c in chunks)
    assert world.scheduler() == [Abort(1)]
    world.sched.ref("text").post(Ended(1, 0, "aborted", "aborted"))
    world.settle()
    assert world.front() == []  # exactly one final message


@pytest.mark.parametrize("keep", [False, True])
def test_a_pattern_ends_an_output(world: World, tokenizer: Tokenizer, keep: bool) -> None:
    world.ask(1, stop=("nothing",), stop_regex=("[A-Z]{2}[0-9]+;", "b+"), no_stop_trim=keep)
    (submit,) = world.scheduler()
    assert submit.params.stop_regex == (), "not the scheduler's affair"
    chunks = world.say(1, tokenizer.encode("a XY12; c"))
    assert whole(chunks) == ("a XY12;" if keep else "a ")
    assert (chunks[-1].finish, chunks[-1].matched) == ("stop", "[A-Z]{2}[0-9]+;")
    assert world.scheduler() == [Abort(1)] and not world.text.outputs


@pytest.mark.parametrize("stops", [{"stop": ("b",)}, {"stop_regex": ("b",)}])
@pytest.mark.parametrize(("least", "expected"), [(0, "a"), (1, "a"), (2, "abc"), (4, "abcbd")])
def test_a_stop_string_within_the_fewest_tokens_is_text(
    world: World, tokenizer: Tokenizer, stops: dict[str, Any], least: int, expected: str
) -> None:
    world.ask(1, min_new_tokens=least, **stops)
    ids = [token for text in "abcbd" for token in tokenizer.encode(text)]
    assert len(ids) == 5
    world.scheduler()
    chunks = world.say(1, ids, Finish.LENGTH)
    assert whole(chunks) == expected
    assert chunks[-1].finish == ("length" if least == 4 else "stop")


def test_a_stop_string_and_the_end_in_one_row(world: World, tokenizer: Tokenizer) -> None:
    world.ask(1, stop=("d",))
    world.scheduler()
    chunks = world.say(1, tokenizer.encode("d"), Finish.LENGTH)
    assert (chunks[-1].finish, chunks[-1].matched, whole(chunks)) == ("stop", "d", "")
    assert world.scheduler() == []  # the scheduler knows already


def test_held_back_text_comes_at_the_end(world: World, tokenizer: Tokenizer) -> None:
    world.ask(1, stop=("END",))
    chunks = world.say(1, [*tokenizer.encode("x EN"), 2], Finish.STOP)
    assert whole(chunks) == "x EN" and chunks[-1].matched == 2


def test_the_stop_token_is_shown_if_asked(world: World, tokenizer: Tokenizer) -> None:
    (token,) = tokenizer.encode("b")
    for rid, options, text in (
        (1, {}, "a"),
        (2, {"no_stop_trim": True}, "ab"),
        (3, {"no_stop_trim": True, "stop": ("z",)}, "ab"),
    ):
        world.ask(rid, stop_token_ids=(token,), **options)
        assert whole(world.say(rid, [*tokenizer.encode("a"), token], Finish.STOP)) == text
    world.ask(4, skip_special_tokens=False)
    assert whole(world.say(4, tokenizer.encode("a<|im_start|>"), Finish.LENGTH)) == "a<|im_start|>"


def test_logprobs(world: World, tokenizer: Tokenizer) -> None:
    world.ask(1, logprobs=1)
    world.ask(2)
    world.ask(3, logprobs=0)
    a, b = tokenizer.encode("a")[0], tokenizer.encode("b")[0]
    rows = [(rid, a) for rid in (1, 2, 3)]
    world.row(*rows, logprobs=[-0.5, float("nan"), -0.25], top_n=2, top_ids=[a, b] * 3, top_logprobs=[-0.5, -1.0] * 3)
    first, second, third = world.chunks()
    assert [(p.token, p.logprob, p.text, p.top) for p in first.logprobs] == [(a, -0.5, b"a", [(a, -0.5, b"a")])]
    assert second.logprobs == []
    assert [(p.logprob, p.top) for p in third.logprobs] == [(-0.25, [])]
    world.row((1, 2, Finish.STOP), logprobs=[-0.125], top_n=1, top_ids=[2], top_logprobs=[-0.125])
    (last,) = world.chunks()
    assert last.logprobs == []  # the end token is not part of the text
    assert [(p.token, p.logprob) for p in last.end_logprobs] == [(2, -0.125)]


def test_logprobs_of_named_tokens(world: World, tokenizer: Tokenizer) -> None:
    """In the order in which the request names them; a row may be wider than what it wants."""
    a, b = tokenizer.encode("a")[0], tokenizer.encode("b")[0]
    world.ask(1, logprobs=0, token_ids_logprob=(b, a))
    world.ask(2, logprobs=0, token_ids_logprob=(a,))
    world.row((1, a), (2, a), logprobs=[-0.5, -0.5], listed=[-1.0, -0.5, -0.5, float("nan")])
    first, second = world.chunks()
    assert first.logprobs[0].listed == [(b, -1.0, b"b"), (a, -0.5, b"a")]
    assert second.logprobs[0].listed == [(a, -0.5, b"a")]


def prompt_rows(rid: int, ids: list[int], **more: Any) -> PromptLogprobs:
    """Tokens of a prompt, with -1, -2, ... as logprobs."""
    logprobs = view("f", [-1.0 - i for i in range(len(ids))])
    tops = (more.get("top_n", 0), view("i", more.get("top_ids", [])), view("f", more.get("top_logprobs", [])))
    return PromptLogprobs(rid, view("i", ids), logprobs, *tops, view("f", more.get("listed", [])))


def test_logprobs_of_a_prompt(world: World, tokenizer: Tokenizer) -> None:
    """They come before the output; the first token that was asked for has none."""
    ids = tokenizer.encode("abcd")
    assert len(ids) == 4
    world.ask(1, ids, logprobs=1, logprob_start_len=1, token_ids_logprob=(7,))
    (submit,) = world.scheduler()
    assert (submit.params.logprob_start_len, submit.params.token_ids_logprob) == (1, (7,))
    more = {"top_n": 2, "top_ids": [5, 6, 8, 9], "top_logprobs": [-0.5, -0.75] * 2, "listed": [-3.0, -4.0]}
    world.sched.ref("text").post(prompt_rows(1, ids[2:], **more))
    world.row((1, ids[0], Finish.LENGTH), logprobs=[-0.125], listed=[-5.0], settle=False)
    world.settle()
    (chunk,) = world.chunks()
    first, *rest = chunk.prompt_logprobs
    assert (first.token, first.text, first.top, first.listed) == (ids[1], b"b", [], []) and math.isnan(first.logprob)
    assert [(p.token, p.logprob, p.text) for p in rest] == [(ids[2], -1.0, b"c"), (ids[3], -2.0, b"d")]
    assert [[t[:2] for t in p.top] for p in rest] == [[(5, -0.5)], [(8, -0.5)]]
    assert [[t[:2] for t in p.listed] for p in rest] == [[(7, -3.0)], [(7, -4.0)]]
    assert chunk.logprobs[0].listed[0][:2] == (7, -5.0) and chunk.finish == "length"
    world.sched.ref("text").post(prompt_rows(1, ids))
    world.settle()
    assert world.front() == [], "it has ended"


def test_many_logprobs_of_a_prompt_come_in_several_messages(world: World) -> None:
    """The output comes with the last of them, and no message is too large."""
    world.ask(1, [5, 6], logprobs=3, logprob_start_len=0, token_ids_logprob=(7, 8))
    ids = [9] * 2000
    world.sched.ref("text").post(prompt_rows(1, ids, listed=[-1.0] * 4000))
    world.row((1, 5, Finish.LENGTH), logprobs=[-0.125], settle=False)
    world.settle()
    messages = world.front()
    chunks = [chunk for message in messages for chunk in message.chunks]
    assert len(messages) == len(chunks) == -(-2001 * 6 // MOST_ENTRIES)
    assert [p.token for chunk in chunks for p in chunk.prompt_logprobs] == [5, *ids]
    assert [bool(chunk.ids) for chunk in chunks] == [chunk.finish == "length" for chunk in chunks]
    assert [chunk.finish for chunk in chunks] == [None] * (len(chunks) - 1) + ["length"]


@pytest.mark.parametrize("start, params", [(3, {}), (0, {"logprobs": 20, "token_ids_logprob": tuple(range(128))})])
def test_logprobs_that_a_prompt_cannot_have(
    world: World, start: int, params: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of tokens behind its end, or more of them than a front can hold."""
    monkeypatch.setattr(prompts, "MOST_LOGPROBS", 3 * 149 - 1)
    world.ask(1, [4, 5, 6], **{"logprobs": 0, "logprob_start_len": start, **params})
    (refused,) = world.front()
    assert (refused.status, refused.param) == (400, "logprob_start_len") and world.scheduler() == []


def test_logprobs_cover_the_visible_text(world: World, tokenizer: Tokenizer) -> None:
    world.ask(1, logprobs=0, stop=("XY",))
    ids = tokenizer.encode("aX🦊bXY")
    for token in ids:
        world.row((1, token), logprobs=[-1.0])
    chunks = world.chunks()
    assert whole(chunks) == "aX🦊b"
    shown = b"".join(p.text for c in chunks for p in c.logprobs)
    assert shown == "aX🦊b".encode()
    for chunk in chunks[:-1]:
        assert chunk.logprobs  # each comes with its text
    rest = chunks[-1].end_logprobs
    assert b"".join(p.text for p in rest) == b"XY"
    assert [p.token for c in chunks for p in c.logprobs] + [p.token for p in rest] == [i for c in chunks for i in c.ids]


def test_poison_fails_the_request(world: World, tokenizer: Tokenizer) -> None:
    world.ask(1, n=2)
    world.row((1, 5, Finish.POISON), (2, tokenizer.encode("a")[0]))
    refused, chunks = world.front()
    assert (refused.rid, refused.n, refused.status) == (1, 1, 500)
    assert [c.rid for c in chunks.chunks] == [2]
    world.row((1, 5))
    assert world.front() == []


def test_a_grammar_without_a_next_token_is_the_requests_fault(world: World) -> None:
    world.ask(1)
    world.scheduler()
    world.row((1, 5, Finish.GRAMMAR))
    (refused,) = world.front()
    assert (refused.status, refused.code) == (400, "grammar_dead_end")


def test_ended(world: World, tokenizer: Tokenizer) -> None:
    world.ask(1, n=2)
    world.row((1, tokenizer.encode("a")[0]), settle=False)
    world.sched.ref("text").post(Ended(1, 400, "too_large", "never fits", "prompt"))
    world.sched.ref("text").post(Ended(2, 0, "aborted", "aborted"))
    world.settle()
    refused, chunks = world.front()
    assert refused == Refused(1, 1, 400, "too_large", "never fits", "prompt")
    assert [(c.rid, c.finish) for c in chunks.chunks] == [(2, "abort")]


# ------------------------------------------------------------------ cancel, and peers that come and go


def test_cancel(world: World, tokenizer: Tokenizer) -> None:
    world.ask(1, n=2)
    world.ask(3)
    world.scheduler()
    token = tokenizer.encode("a")[0]
    world.row((1, token), (2, token), (3, token), settle=False)
    world.text.receive(Cancel(1, 2), "front.0")
    world.settle()
    world.text.receive(Cancel(1, 2), "front.0")  # again, or after the end: nothing
    assert world.scheduler() == [Abort(1), Abort(2)]
    world.row((1, token), (3, token))
    assert {c.rid for c in world.chunks()} == {3}
    assert list(world.text.outputs) == [3]


def restart_scheduler(world: World, fault: bool = True, at_work: tuple[int, ...] = ()) -> None:
    disconnect(world.context, world.sched)
    world.context.inbox.put_system(PeerDown("sched", 1, "killed", fault, at_work))
    world.settle()
    connect(world.context, world.sched, codec=True)
    world.context.inbox.put_system(PeerUp("sched", 2))
    world.settle()


def test_the_next_scheduler_is_asked_for_the_rest(world: World, tokenizer: Tokenizer) -> None:
    world.ask(1, n=2, stop=("END",))
    world.ask(3, front="front.1")
    first = {s.rid: s for s in world.scheduler()}
    ids = tokenizer.encode("a EN")
    assert [c.text for c in world.say(1, ids)] == ["a", " "], "the rest may become a stop string"
    disconnect(world.context, world.sched)
    world.context.inbox.put_system(PeerDown("sched", 1, "killed"))
    world.settle()
    world.ask(5)  # meanwhile
    world.text.receive(Cancel(2, 1), "front.0")
    connect(world.context, world.sched, codec=True)
    world.context.inbox.put_system(PeerUp("sched", 2))
    world.settle()
    assert [type(m) for m in world.front()] == [Stats]
    asked = {s.rid: s for s in world.scheduler()}
    assert list(asked) == [1, 3, 5]
    assert asked[1] == msgspec.structs.replace(first[1], generated=view("i", ids)) and asked[3] == first[3]
    world.row((1, tokenizer.encode("D")[0]), (3, ids[0], Finish.LENGTH))
    (chunk,) = world.chunks()
    assert (chunk.rid, chunk.text, chunk.finish, chunk.completion_tokens) == (1, "", "stop", len(ids) + 1)
    assert list(world.text.outputs) == [5]


class OneImage:
    """In place of an ImageReader: every file is the same image."""

    def read(self, file: bytes, alone: bool) -> Image:
        return Image(b"digest", 20, (2, 2), alone, np.full((1, 3, 2, 2), 0.5, dtype=np.float32))


def test_images_go_before_their_requests_and_again_to_the_next_scheduler(world: World, tokenizer: Tokenizer) -> None:
    (token,) = tokenizer.encode("<think>")
    model = msgspec.structs.replace(world.context.model, image_token_id=token)
    reader: Any = OneImage()
    world.text.prompts = Prompts(world.context.config, model, tokenizer, None, reader)
    files = (ImageFile(b"a", "image_data"), ImageFile(b"b", "image_data"))
    prompt = TextPrompt("A<think>B<think>", images=files)
    world.text._submit(Generate(1, 2, prompt, SamplingParams(max_new_tokens=5)), "front.0")  # in a thread, else
    sent = world.scheduler()
    assert [type(message) for message in sent] == [ImagePixels, Submit, Submit]
    assert (sent[0].image, sent[0].tokens, sent[0].shape, len(sent[0].pixels)) == (b"digest", 20, (1, 3, 2, 2), 48)
    assert sent[1].images == (ImageSpan(b"digest", 1, 20, token), ImageSpan(b"digest", 22, 20, token))
    ids = np.frombuffer(sent[1].ids, dtype=np.int32)
    assert len(ids) == 42 and ids[0] == tokenizer.encode("A")[0] and ids[21] == tokenizer.encode("B")[0]
    assert (ids[1:21] == ids[22:]).all() and ids[1:21].min() >= VOCAB
    restart_scheduler(world)
    assert world.scheduler() == [sent[0], sent[1], sent[0], sent[2]]
    world.row((1, tokenizer.encode("C")[0], Finish.LENGTH))
    (chunk,) = [chunk for m in world.front() if isinstance(m, Chunks) for chunk in m.chunks]
    assert (chunk.text, chunk.prompt_tokens) == ("C", 42)


@pytest.mark.parametrize(
    ("text", "count", "params", "field", "message"),
    [
        ("A", 1, {}, "prompt", "0 image tokens"),
        ("<think>" * 20, 20, {}, "image_data", "the most is 16"),
        ("<think>" * 10, 10, {}, "prompt", "context_length"),
        ("<think>", 1, {"logprobs": 0, "logprob_start_len": 0}, "logprob_start_len", "not served"),
    ],
)
def test_images_that_do_not_fit_their_prompt(
    world: World, tokenizer: Tokenizer, text: str, count: int, params: dict[str, int], field: str, message: str
) -> None:
    model = msgspec.structs.replace(world.context.model, image_token_id=tokenizer.encode("<think>")[0])
    reader: Any = OneImage()
    world.text.prompts = Prompts(world.context.config, model, tokenizer, None, reader)
    prompt = TextPrompt(text, images=(ImageFile(b"a", "image_data"),) * count)
    world.text._submit(Generate(1, 1, prompt, SamplingParams(**params)), "front.0")
    (refused,) = world.front()
    assert (refused.status, refused.param) == (400, field) and message in refused.message + refused.code
    assert world.scheduler() == []


def named_images(world: World, *urls: str, rid: int = 1) -> None:
    """A prompt whose images are at these addresses, and a short one behind it."""

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            world.context.host({}, nursery)
            files = tuple(ImageFile(b"", f"image{i}", url) for i, url in enumerate(urls))
            prompt = TextPrompt("<think>" * len(files), images=files)
            world.fronts["front.0"].ref("text").post(Generate(rid, 1, prompt, SamplingParams(max_new_tokens=5)))
            world.fronts["front.0"].ref("text").post(Tokenize(9, prompt, True))
            world.settle()
            world.ask(rid + 1, "short")
            assert [s.rid for s in world.scheduler()] == [rid + 1]

    trio.run(main)


def seeing(world: World, tokenizer: Tokenizer) -> None:
    model = msgspec.structs.replace(world.context.model, image_token_id=tokenizer.encode("<think>")[0])
    reader: Any = OneImage()
    world.text.prompts = Prompts(world.context.config, model, tokenizer, None, reader)


def test_addresses_are_not_fetched_unless_that_is_allowed(world: World, tokenizer: Tokenizer) -> None:
    seeing(world, tokenizer)
    named_images(world, "https://a.example/a.png")
    for refused in world.front():
        assert isinstance(refused, Refused) and refused.rid in (1, 9)
        assert (refused.status, refused.code, refused.param) == (400, "unsupported_value", "image0")
        assert "--allow-image-urls" in refused.message
    assert world.scheduler() == []


def test_images_are_fetched_while_others_go_on(world: World, tokenizer: Tokenizer) -> None:
    """They come in their places; one that does not come ends its request alone."""
    asked = []

    class Fetcher(fetch.Fetcher):
        async def fetch(self, url: str, budget: fetch.Budget) -> bytes:
            asked.append(url)
            await trio.lowlevel.checkpoint()
            if "wrong" in url:
                raise fetch.refused("no")
            return url.encode()

    seeing(world, tokenizer)
    world.text.fetcher = Fetcher((), 5)
    named_images(world, "https://a.example/1", "https://a.example/2")
    (tokenized,) = world.front()
    assert len(tokenized.ids) // 4 == 40
    assert [type(message) for message in world.scheduler()] == [ImagePixels, Submit]
    assert sorted(asked) == [f"https://a.example/{i}" for i in (1, 1, 2, 2)]
    named_images(world, "https://a.example/1", "https://a.example/wrong", rid=3)
    refusals = world.front()
    assert {(m.rid, m.code, m.param) for m in refusals} == {(n, "image_not_fetched", "image1") for n in (3, 9)}
    assert not world.text.tokenizing


@pytest.mark.parametrize("kind", [TextPrompt, ChatPrompt])
def test_a_model_without_vision_takes_no_images(world: World, kind: Any) -> None:
    content = json.dumps({"messages": [{"role": "user", "content": [{"type": "image"}]}]})
    images = (ImageFile(b"a", "messages[0].content[1].image_url"),)
    prompt = kind(content if kind is TextPrompt else content.encode(), images=images)
    world.text._submit(Generate(1, 1, prompt, SamplingParams()), "front.0")
    (refused,) = world.front()
    assert (refused.status, refused.param) == (400, "messages[0].content[1].image_url")
    assert "no images" in refused.message


def test_what_two_schedulers_die_of_is_refused(world: World) -> None:
    """A request and an order; not what was in the queue, nor at work when somebody killed it."""
    world.ask(1)
    world.ask(2)
    world.text.receive(Order(9, "flush_cache"), "front.1")
    for at_work, fault in ((1, 9), True), ((2,), False), ((2,), True), ((), True), ((1, 9), True):
        assert list(world.text.outputs) == [1, 2] and [q.rid for q in world.text.orders.unanswered(0)] == [9]
        restart_scheduler(world, fault, at_work)
    refused = [m for m in (*world.front(), *world.front("front.1")) if isinstance(m, Refused)]
    assert [(m.rid, m.n, m.status, m.code) for m in refused] == [(rid, 1, 503, "scheduler_crashed") for rid in (1, 9)]
    assert list(world.text.outputs) == [2] and not world.text.orders.unanswered(0)


def test_an_abort_is_not_lost_with_the_scheduler(world: World, tokenizer: Tokenizer) -> None:
    world.ask(1)
    world.ask(2)
    world.row((1, tokenizer.encode("a")[0]), (2, tokenizer.encode("b")[0]))
    world.chunks()
    world.text.receive(Abort(1), "front.0")
    disconnect(world.context, world.sched)
    world.context.inbox.put_system(PeerDown("sched", 1, "killed"))
    world.settle()
    world.text.receive(Abort(2), "front.0")
    world.settle()
    ends = [(c.rid, c.finish, c.completion_tokens) for m in world.front() if isinstance(m, Chunks) for c in m.chunks]
    assert ends == [(1, "abort", 1), (2, "abort", 1)]


TEXTS = ["Hello there, how are you?", "a EN END b", "\N{HAMMER}\ufe0f caf\u00e9 \u65e5\u672c \N{PARTY POPPER}!"]


@pytest.mark.parametrize("logprobs", [None, 1])
@pytest.mark.parametrize("text", TEXTS)
def test_an_output_goes_on_in_the_next_text_actor(
    folder: str, tokenizer: Tokenizer, text: str, logprobs: int | None
) -> None:
    """It dies after any token: chunks before and after are those of one that lived, joined."""
    ids = tokenizer.encode(text)
    params: dict[str, Any] = {"logprobs": logprobs, "stop": ("END ",), "max_new_tokens": 100, "seed": 1}
    extra = {"top_n": 1} if logprobs else {}

    def play(world: World, tokens: list[int], at: int) -> list[Chunk]:
        for i, token in enumerate(tokens, at):
            values = {"logprobs": [-float(i)], "top_ids": [token], "top_logprobs": [-float(i)]} if logprobs else {}
            world.row((1, token, Finish.LENGTH if i == len(ids) - 1 else Finish.NONE), **values, **extra)
        return world.chunks()

    for cut in range(len(ids)):
        worlds = World(folder), World(folder)
        for world in worlds:
            trio.run(world.start)
            world.settle()
        worlds[0].ask(1, **params)
        before = play(worlds[0], ids[:cut], 0)
        if not worlds[0].text.outputs:
            continue
        had = [token for c in before for token in c.ids]
        seen = sum(len(c.logprobs) for c in before)
        state = Resumed(1, view("i", had), len(whole(before)), seen, 7, 2, 1, 0)
        made = Generate(1, 1, TextPrompt("Hello"), SamplingParams(**params), resumed=[state])
        worlds[1].fronts["front.0"].ref("text").post(made)
        worlds[1].settle()
        (submit,) = worlds[1].scheduler()
        known = len(submit.generated) // 4
        assert known == (seen if logprobs else len(had))
        after = play(worlds[1], ids[known:], known)
        alone = World(folder)
        trio.run(alone.start)
        alone.settle()
        alone.ask(1, **params)
        undisturbed = play(alone, ids, 0)
        both = before + after
        assert whole(both) == whole(undisturbed)
        for field in ("ids", "logprobs"):
            joined = [[one for c in chunks for one in getattr(c, field)] for chunks in (both, undisturbed)]
            assert joined[0] == joined[1], field
        last, want = after[-1], undisturbed[-1]
        assert (last.finish, last.matched, last.completion_tokens) == (
            want.finish,
            want.matched,
            want.completion_tokens,
        )
        assert (last.cached_tokens, last.forced_tokens, last.jumps) == (7, 2, 1)
        for world in (*worlds, alone):
            world.close()


def test_a_front_dies(world: World, tokenizer: Tokenizer) -> None:
    world.ask(1, n=2)
    world.ask(3, front="front.1")
    world.scheduler()
    world.row((1, tokenizer.encode("a")[0]), settle=False)
    disconnect(world.context, world.fronts["front.0"])
    world.context.inbox.put_system(PeerDown("front.0", 1, "killed"))
    world.settle()
    assert world.scheduler() == [Abort(1), Abort(2)]
    assert list(world.text.outputs) == [3]
    world.row((1, 5), (3, tokenizer.encode("a")[0]))
    assert [c.rid for c in world.chunks("front.1")] == [3]


def test_pins_are_passed_on_and_go_with_their_front(world: World) -> None:
    for rid, front in ((1, "front.0"), (3, "front.1")):
        asked = Generate(rid, 2, TextPrompt("Hello"), SamplingParams(), pin=rid + 10)
        world.fronts[front].ref("text").post(asked)
    world.settle()
    assert [(m.rid, m.pin) for m in world.scheduler()] == [(1, 11), (2, 0), (3, 13), (4, 0)], "the first choice's"
    world.fronts["front.1"].ref("text").post(Unpin(view("q", [13, 99])))
    world.settle()
    assert [bytes(m.pins) for m in world.scheduler()] == [bytes(view("q", [13, 99]))]
    for front in ("front.0", "front.1"):
        disconnect(world.context, world.fronts[front])
        world.context.inbox.put_system(PeerDown(front, 1, "killed"))
    world.settle()
    unpinned = [m for m in world.scheduler() if isinstance(m, Unpin)]
    assert [bytes(m.pins) for m in unpinned] == [bytes(view("q", [11]))]


def test_a_front_that_lags_gets_joined_chunks(
    world: World, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.ask(1)
    ref = world.context.ref("front.0")
    with monkeypatch.context() as patch:
        patch.setattr(type(ref), "backlog", 1)
        for token in tokenizer.encode("abc xyz"):
            world.row((1, token))
        assert world.front() == []
    world.settle()  # credit came: drain and flush without a message
    (chunk,) = world.chunks()
    assert chunk.text == "abc xyz"


def test_what_waits_for_a_front_goes_with_it(
    world: World, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A request that has ended while its front lagged, and then is cancelled, or loses its front."""
    ref = world.context.ref("front.0")
    token = tokenizer.encode("a")[0]
    with monkeypatch.context() as patch:
        patch.setattr(type(ref), "backlog", 1)
        for rid in (1, 2):
            world.ask(rid)
            world.row((rid, token, Finish.LENGTH))
        world.text.receive(Cancel(1, 1), "front.0")
    world.settle()
    assert [c.rid for c in world.chunks()] == [2]
    with monkeypatch.context() as patch:
        patch.setattr(type(ref), "backlog", 1)
        world.ask(3)
        world.row((3, token, Finish.LENGTH))
        disconnect(world.context, world.fronts["front.0"])
        world.context.inbox.put_system(PeerDown("front.0", 1, "killed"))
        world.settle()
        connect(world.context, world.fronts["front.0"], codec=True)
    world.settle()
    assert world.front() == []


def test_an_unasked_abort_shows_what_was_held_back(world: World, tokenizer: Tokenizer) -> None:
    world.ask(1, stop=("END",))
    world.say(1, tokenizer.encode("x EN"))
    world.sched.ref("text").post(Ended(1, 0, "aborted", "aborted"))
    world.settle()
    (chunk,) = world.chunks()
    assert (chunk.text, chunk.finish) == ("EN", "abort")


def test_stats_reach_all_fronts(world: World) -> None:
    stats = Stats(*range(13), 1.5, True)
    world.sched.ref("text").post(stats)
    world.settle()
    assert world.front() == [stats] and world.front("front.1") == [stats]
    world.context.inbox.put_system(PeerUp("front.1", 2))
    world.settle()
    assert world.front() == [] and world.front("front.1") == [stats]  # a new front need not wait for news
    world.context.inbox.put_system(PeerDown("sched", 1, "killed"))
    world.settle()
    down = msgspec.structs.replace(NO_STATS, down="the scheduler is down: killed")
    assert world.front() == [down] and world.front("front.1") == [down]


# ------------------------------------------------------------------ configuration


def test_without_a_tokenizer(tmp_path: Path) -> None:
    world = World(str(tmp_path), skip_tokenizer_init=True)  # there are no files
    trio.run(world.start)
    world.settle()
    world.ask(1, "text")
    world.ask(2, b'{"messages": [{"role": "user", "content": "x"}]}')
    world.ask(3, [4, 5], stop=("x",))
    assert [(m.rid, m.status, m.param) for m in world.front()] == [
        (1, 400, "prompt"),
        (2, 400, "messages"),
        (3, 400, "stop"),
    ]
    world.ask(4, [4, 5], logprobs=0)
    world.row((4, 9), logprobs=[-1.0])
    world.row((4, 8, Finish.STOP), logprobs=[-1.0])
    first, last = world.chunks()
    assert (first.text, first.ids, [p.text for p in first.logprobs]) == ("", [9], [b""])
    assert (last.ids, last.finish, last.matched) == ([8], "stop", 8)
    world.close()


def test_chat_template_file(tmp_path: Path, tokenizer: Tokenizer) -> None:
    folder = tiny_tokenizers.byte_level(tmp_path / "model", chat_template=None)
    chat = b'{"messages": [{"role": "user", "content": "x"}]}'
    world = World(folder)
    trio.run(world.start)
    world.settle()
    world.ask(1, chat)
    (refused,) = world.front()
    assert refused.param == "messages" and "--chat-template" in refused.message
    world.close()

    file = tmp_path / "template.jinja"
    file.write_text("Q: {{ messages[0].content }}")
    world = World(folder, chat_template=str(file))
    trio.run(world.start)
    world.settle()
    world.ask(1, chat)
    (submit,) = world.scheduler()
    assert np.frombuffer(submit.ids, dtype=np.int32).tolist() == tokenizer.encode("Q: x")
    world.close()

    world = World(folder, chat_template=str(tmp_path / "missing"))
    with pytest.raises(StartupError, match="chat template"):
        trio.run(world.start)
    world.close()


# ------------------------------------------------------------------ what readers of chats need


def test_markers_that_a_parser_reads_are_text(world: World, tokenizer: Tokenizer) -> None:
    chat = json.dumps({"messages": [{"role": "user", "content": "x"}]}).encode()
    ids = tokenizer.encode("a<|im_start|>b<|im_end|>c")
    for rid, shown, text in ((1, (), "abc"), (2, ("<|im_start|>",), "a<|im_start|>bc")):
        prompt = ChatPrompt(chat, shown=shown)
        world.fronts["front.0"].ref("text").post(Generate(rid, 1, prompt, SamplingParams()))
        world.settle()
        assert whole(world.say(rid, ids, Finish.LENGTH)) == text


@pytest.mark.parametrize(("opens", "thinking"), [((), False), (("assistant",), True), (("<think>",), False)])
def test_whether_a_prompt_opens_thoughts(
    world: World, tokenizer: Tokenizer, opens: tuple[str, ...], thinking: bool
) -> None:
    """The rendered prompt ends in "assistant" and a line end. A grammar then begins amid thoughts."""
    chat = json.dumps({"messages": [{"role": "user", "content": "x"}]}).encode()
    grammar = GrammarSpec("regex", "a", thoughts=Thoughts((1,), (2,)))
    generate = Generate(1, 1, ChatPrompt(chat, opens=opens), SamplingParams(), grammar=grammar)
    world.fronts["front.0"].ref("text").post(generate)
    world.settle()
    (submit,) = world.scheduler()
    assert submit.grammar == GrammarSpec("regex", "a", thoughts=Thoughts((1,), (2,), opened=thinking))
    (chunk,) = world.say(1, tokenizer.encode("a")[:1], Finish.LENGTH)
    assert chunk.thinking is thinking


# ------------------------------------------------------------------ questions and orders


def question(world: World, message: Any, front: str = "front.0") -> list[Any]:
    world.fronts[front].ref("text").post(message)
    world.settle()
    return world.front(front)


def test_tokens_of_a_text_and_back(world: World, tokenizer: Tokenizer) -> None:
    (tokenized,) = question(world, Tokenize(5, TextPrompt("Hello 🦊 <|im_start|>")))
    ids = list(tokenized.ids.cast("i"))
    assert tokenized.rid == 5 and ids == tokenizer.encode("Hello 🦊 <|im_start|>")
    assert question(world, Detokenize(6, view("i", ids), False)) == [Detokenized(6, "Hello 🦊 <|im_start|>")]
    assert question(world, Detokenize(7, view("i", ids), True)) == [Detokenized(7, "Hello 🦊 ")]
    (refused,) = question(world, Tokenize(8, ChatPrompt(b'{"messages": [{"role": "robot"}]}')))
    assert (refused.rid, refused.status, refused.param) == (8, 400, "messages")


def test_an_answer_that_no_lane_takes_is_refused(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few long tokens have a text that is many times longer than the question."""
    ref = world.context.ref("front.0")
    post = ref.post

    def posted(message: Any) -> None:
        if isinstance(message, Tokenized | Detokenized):
            raise ValueError("message of 81000016 bytes; a lane takes at most 67108864")
        post(message)

    monkeypatch.setattr(ref, "post", posted)
    for asked in (Tokenize(5, TextPrompt("Hello")), Detokenize(6, view("i", [3, 4]), False)):
        (refused,) = question(world, asked)
        assert (refused.rid, refused.status, refused.code) == (asked.rid, 400, "too_large")


def test_many_tokens_become_text_in_a_thread(world: World, tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("Hello")

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            world.context.host({}, nursery)
            for rid, count in ((1, INLINE_CHARS), (2, 1)):
                world.fronts["front.0"].ref("text").post(Detokenize(rid, view("i", ids * count + ids), True))
            world.settle()
            assert world.front() == [Detokenized(2, "HelloHello")], "nobody waits for the long one"

    trio.run(main)
    assert world.front() == [Detokenized(1, "Hello" * (INLINE_CHARS + 1))]


def test_a_pause_outlives_the_text_actor_that_was_told_of_it(world: World) -> None:
    """The next one learns of it from the scheduler, and of its end, until it is told itself."""
    for waiting, paused in ((1, True), (2, False), (3, True)):
        world.sched.ref("text").post(msgspec.structs.replace(NO_STATS, waiting=waiting, paused=paused))
        restart_scheduler(world)
        assert world.scheduler() == ([Order(-1, "pause")] if paused else [])
    question(world, Order(5, "continue"))
    world.sched.ref("text").post(Done(5))
    world.settle()
    world.scheduler()
    restart_scheduler(world)
    assert world.scheduler() == []


def test_orders_are_passed_on_and_answered(world: World) -> None:
    assert question(world, Order(5, "pause")) == []
    assert question(world, Order(1 << 40, "flush_cache"), "front.1") == []
    assert world.scheduler() == [Order(5, "pause"), Order(1 << 40, "flush_cache")]
    world.sched.ref("text").post(Refused(1 << 40, 1, 400, "not_idle", "busy"))
    world.sched.ref("text").post(Done(5))
    world.settle()
    assert world.front() == [Done(5)] and [m.rid for m in world.front("front.1")] == [1 << 40]
    question(world, Look(8, 9, 9))
    assert world.scheduler() == [Look(8, 9, 9)]
    world.sched.ref("text").post(Seen(8, NO_STATS, [], [], 0, [], False))
    world.settle()
    (view,) = world.front()
    assert view.rid == 8 and ("text", "front.0") in [(lane.source, lane.target) for lane in view.lanes]
    world.sched.ref("text").post(msgspec.structs.replace(NO_STATS, waiting=1))  # from before
    question(world, Order(6, "flush_cache"))
    world.scheduler()
    restart_scheduler(world)
    assert world.scheduler() == [Order(-1, "pause"), Order(6, "flush_cache")]  # what was ordered still holds
    world.sched.ref("text").post(Done(-1))
    world.sched.ref("text").post(Done(6))
    world.settle()
    assert [m for m in world.front() if not isinstance(m, Stats)] == [Done(6)]


def test_a_front_may_end_a_request_and_keep_its_output(world: World, tokenizer: Tokenizer) -> None:
    world.ask(1)
    world.scheduler()
    world.row((1, tokenizer.encode("a")[0]))
    question(world, Abort(2))
    assert world.scheduler() == []
    question(world, Abort(1))
    assert world.scheduler() == [Abort(1)]
    world.sched.ref("text").post(Ended(1, 0, "aborted", "aborted"))
    world.settle()
    (last,) = world.chunks()
    assert (last.finish, last.completion_tokens) == ("abort", 1)


def test_all_messages_are_encodable(world: World) -> None:
    """Chunks with every field go through the codec, as between processes."""
    world.ask(1, logprobs=2)
    world.row((1, 70, Finish.LENGTH), logprobs=[-1.0], top_n=2, top_ids=[70, 71], top_logprobs=[-1.0, -2.0])
    (message,) = world.front()
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(message), type=Chunks) == message


def test_first_tokens_do_not_wait_for_the_rest(world):
    """They have a message of their own, before everybody's next token is made text; in one message they come first."""
    for rid in (1, 2):
        world.ask(rid, "Hi")
    world.row((1, 70), (2, 71))
    assert [[c.rid for c in m.chunks] for m in world.front()] == [[1, 2]]
    world.ask(3, "Hi")
    world.row((1, 72), (2, 73), (3, 74))
    assert [[c.rid for c in m.chunks] for m in world.front()] == [[3], [1, 2]]
    world.ask(4, "Hi")
    world.row((1, 75), (2, 76), settle=False)
    world.row((4, 77))
    assert [[c.rid for c in m.chunks] for m in world.front()] == [[4, 1, 2]]
