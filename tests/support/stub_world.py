"""The real scheduler and the stub executor on local lanes, driven by hand; a text actor and an fsm actor stand in.

Every message passes the codec. What the stand-in for text gets is compared, request by request, with what the stub
must say, and each request must end once. Actors die here between any two messages.
"""

from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from msgspec.structs import replace
from simulated_executor import EOS, VOCAB
from simulated_grammars import grammar_of

from actorserve.actors.actor import Actor, Context, connect, disconnect
from actorserve.actors.constraint import Grammar
from actorserve.actors.messages import (
    Abort,
    Compile,
    Compiled,
    Done,
    Ended,
    ExecutorInbox,
    Finish,
    FsmInbox,
    GrammarSpec,
    Order,
    PeerDown,
    Plan,
    Refused,
    SamplerInbox,
    SchedulerInbox,
    Started,
    StepOut,
    Submit,
    TextInbox,
    Tokens,
)
from actorserve.actors.schedule import Schedule
from actorserve.actors.scheduler import Scheduler
from actorserve.actors.stub_draw import Draw, hash_of, moved
from actorserve.actors.stub_executor import StubExecutor, StubSampler
from actorserve.config import EngineConfig, ModelInfo
from actorserve.sampler.params import SamplingParams

MODEL = ModelInfo(name="m", path="", model_type="llama", vocab_size=VOCAB, context_length=512, eos_ids=(EOS,))
INBOXES = {
    "text": (TextInbox, ["sched"]),
    "fsm": (FsmInbox, ["sched"]),
    "sched": (SchedulerInbox, ["text", "fsm", "exec.0", "sampler.0"]),
    "exec.0": (ExecutorInbox, ["sched"]),
    "sampler.0": (SamplerInbox, []),
}


def expected(prompt: list[int], params: SamplingParams, grammar: Grammar | None, limit: int) -> list[int]:
    """What the stub says to a prompt, up to `limit` tokens in all."""
    draw, state, said = Draw(params, len(prompt), grammar), hash_of(prompt), list[int]()
    while len(prompt) + len(said) < limit:
        token, finish = draw.token(state, len(prompt) + len(said), VOCAB, (EOS,))
        said.append(token)
        if finish:
            break
        state = moved(state, token)
    return said


@dataclass
class Asked:
    """A request, as its text actor knows it."""

    submit: Submit
    said: list[int] = field(default_factory=list)
    end: str = ""
    """Empty: it runs."""

    @property
    def grammar(self) -> Grammar | None:
        spec = self.submit.grammar
        return None if spec is None else grammar_of(int(spec.text))

    def again(self) -> Submit:
        """How a text actor asks for the rest."""
        generated = memoryview(array("i", self.said).tobytes())
        return replace(self.submit, generated=generated)


class PoisonableExecutor(StubExecutor):
    """Draws NaN for some requests."""

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self.poison: set[int] = set()
        """Request ids."""

    def _draw(self, slots: list[int]) -> tuple[list[int], list[int], list[float]]:
        ids, finishes, logprobs = super()._draw(slots)
        bad = [self.seats[slot].rid in self.poison for slot in slots]
        return (
            [0 if b else i for b, i in zip(bad, ids, strict=True)],
            [int(Finish.POISON) if b else f for b, f in zip(bad, finishes, strict=True)],
            logprobs,
        )


class StubWorld:
    """See the module's text. `turn` lets everybody do a little; `settle` goes on until nothing runs."""

    def __init__(self, pages: int = 24, slots: int = 4, **config: object) -> None:
        settings = {"max_total_tokens": pages * 16, "max_running_requests": slots, "window_ms": 0.0}
        self.config = EngineConfig(**{**settings, **config})  # type: ignore[arg-type]
        self.contexts: dict[str, Context] = {}
        self.actors: dict[str, Actor] = {}
        self.asked: dict[int, Asked] = {}
        self.steps: Iterator[StepOut] | None = None
        self.epoch = 1
        for name in INBOXES:
            self._make(name)
        for name in ("text", "fsm", "exec.0", "sampler.0"):
            self._join(name)

    # ------------------------------------------------------------------ who lives

    def _make(self, name: str) -> None:
        inbox, sends_to = INBOXES[name]
        context = Context(name, self.config, MODEL, inbox, sends_to=sends_to, epoch=self.epoch)
        self.contexts[name] = context
        kinds: dict[str, type[Actor]] = {"sched": Scheduler, "exec.0": PoisonableExecutor, "sampler.0": StubSampler}
        if name in kinds:
            self.actors[name] = kinds[name](context)
        if name == "sampler.0":
            executor, sampler = self.actors["exec.0"], self.actors["sampler.0"]
            assert isinstance(executor, StubExecutor) and isinstance(sampler, StubSampler)
            executor.sampler = sampler

    def _join(self, name: str) -> None:
        """Lanes between the scheduler and another actor."""
        if name != "sampler.0":
            connect(self.contexts[name], self.contexts["sched"], codec=True)
        connect(self.contexts["sched"], self.contexts[name], codec=True)

    def _part(self, name: str, *, dead: str, fault: bool = True) -> None:
        """The end of these lanes; the one that lives on is told."""
        disconnect(self.contexts["sched"], self.contexts[name])
        if name != "sampler.0":
            disconnect(self.contexts[name], self.contexts["sched"])
        alive = "sched" if dead == name else name
        self.contexts[alive].inbox.put_system(PeerDown(dead, self.epoch, "killed", fault))

    def kill_executor(self, fault: bool = True) -> None:
        """With its sampler; another comes up. Not `fault`: somebody killed it."""
        for name in ("exec.0", "sampler.0"):
            self._part(name, dead=name, fault=fault)
            self.contexts[name].close()
        self.epoch, self.steps = self.epoch + 1, None
        for name in ("exec.0", "sampler.0"):
            self._make(name)
            self._join(name)

    def kill_scheduler(self) -> None:
        """Text asks the next one for the rest of everything."""
        others = [name for name in INBOXES if name != "sched"]
        for name in others:
            self._part(name, dead="sched")
        self.contexts["sched"].close()
        self.epoch += 1
        self._make("sched")
        for name in others:
            self._join(name)
        self._ask_again()

    def kill_text(self, lose: int) -> None:
        """The front has `lose` tokens less of each output than it had, and asks for the rest."""
        self._part("text", dead="text")
        self.contexts["text"].close()
        self.epoch += 1
        self._make("text")
        self._join("text")
        for one in self.asked.values():
            if not one.end:
                del one.said[max(len(one.said) - lose, 0) :]
        self._ask_again()

    def _ask_again(self) -> None:
        for one in self.asked.values():
            if not one.end:
                self.post(one.again())

    # ------------------------------------------------------------------ what is asked

    @property
    def scheduler(self) -> Scheduler:
        actor = self.actors["sched"]
        assert isinstance(actor, Scheduler)
        return actor

    @property
    def schedule(self) -> Schedule | None:
        return self.scheduler.schedule

    def post(self, message: Submit | Abort | Order) -> None:
        """From text to the scheduler."""
        self.contexts["text"].ref("sched").post(message)

    def ask(self, prompt: list[int], params: SamplingParams, salt: str = "", grammar: int = -1) -> Asked:
        """Submit a request; `grammar`: the seed of one."""
        rid = len(self.asked) + 1
        spec = GrammarSpec("regex", str(grammar)) if grammar >= 0 else None
        one = Asked(Submit(rid, memoryview(array("i", prompt).tobytes()), params, salt, grammar=spec))
        self.asked[rid] = one
        self.post(one.submit)
        return one

    def live(self) -> list[Asked]:
        return [one for one in self.asked.values() if not one.end]

    def abort(self, one: Asked) -> None:
        """As for a client that left."""
        one.end = "left"
        self.post(Abort(one.submit.rid))

    def poison(self, one: Asked) -> None:
        """Its next token is not a number, if this executor lives so long."""
        executor = self.actors["exec.0"]
        assert isinstance(executor, PoisonableExecutor)
        executor.poison.add(one.submit.rid)

    # ------------------------------------------------------------------ what happens

    def turn(self) -> bool:
        """The scheduler, the executor (a step), and who listens; whether anything happened."""
        self.scheduler.drain()
        stepped = self.step()
        return any([stepped, self._compile(), self._listen()])

    def step(self) -> bool:
        """Let the executor take messages until there is a plan, and compute one step of it."""
        executor = self.actors["exec.0"]
        assert isinstance(executor, StubExecutor)
        while self.steps is None:
            item = self.contexts["exec.0"].inbox.poll()
            if item is None:
                return False
            if isinstance(item[0], Plan):
                self.steps = executor.steps(item[0])
            else:
                if isinstance(item[0], PeerDown):
                    self._forget_plans()
                executor.receive(*item)
        out = next(self.steps, None)
        if out is None:
            self.steps = None
            return True
        executor._publish(out)
        return True

    def _forget_plans(self) -> None:
        """In the executor's process its sampler hears of the death at the same moment."""
        inbox = self.contexts["sampler.0"].inbox
        while (item := inbox.poll()) is not None:
            self.actors["sampler.0"].receive(*item)

    def _compile(self) -> bool:
        """The fsm actor's work."""
        happened = False
        while (item := self.contexts["fsm"].inbox.poll()) is not None:
            if isinstance(item[0], Compile):
                happened = True
                made = grammar_of(int(item[0].spec.text))
                arrays = (memoryview(a.tobytes()) for a in (made.token_class, made.transitions, made.canonical))
                self.contexts["fsm"].ref("sched").post(Compiled(item[0].handle, *arrays))
        return happened

    def _listen(self) -> bool:
        happened = False
        while (item := self.contexts["text"].inbox.poll()) is not None:
            match item[0]:
                case Tokens() as m:
                    happened = True
                    self._tokens(m)
                case Ended() as m:
                    happened = True
                    self._end(m.rid, m.code)
                case Started() | Done() | Refused():
                    happened = True
        return happened

    def _tokens(self, m: Tokens) -> None:
        rids, ids = np.frombuffer(m.rids, np.int64).tolist(), np.frombuffer(m.ids, np.int32).tolist()
        for rid, token, finish in zip(rids, ids, bytes(m.finish), strict=True):
            one = self.asked[rid]
            if one.end in ("left", f"finish {int(Finish.POISON)}"):
                continue  # a jump that was planned before is run all the same; a text actor knows the request no more
            assert not one.end, f"{rid} has ended by {one.end}, and says {token}"
            if token >= 0 and finish != Finish.POISON:
                one.said.append(token)
            if finish:
                self._end(rid, f"finish {finish}")

    def _end(self, rid: int, why: str) -> None:
        one = self.asked[rid]
        if one.end == "left":
            return
        assert not one.end, f"{rid} ends twice: {one.end}, {why}"
        one.end = why
        self.compare(one)

    def compare(self, one: Asked) -> None:
        """What it has said is what it had to say, as far as it came."""
        s = one.submit
        prompt = s.ids.cast("i").tolist()
        assert s.params.max_new_tokens is not None
        limit = min(len(prompt) + s.params.max_new_tokens, self.config.max_total_tokens or 0)
        want = expected(prompt, s.params, one.grammar, limit)
        whole = one.end.startswith("finish") and one.end != f"finish {int(Finish.POISON)}"
        assert one.said == (want if whole else want[: len(one.said)]), (one.end, one.said, want)

    def settle(self) -> None:
        """Until everything has ended; then all pages are back."""
        idle = 0
        for _ in range(100_000):
            idle = 0 if self.turn() else idle + 1
            if idle > 3:
                break
            self.check()
        assert not self.live(), f"{len(self.live())} requests are stuck"
        assert self.schedule is None or self.schedule.pages_running == 0

    def check(self) -> None:
        """free + tree + running = total; no page has two owners; the tree is well."""
        if self.schedule is not None:
            self.schedule.check()

    def close(self) -> None:
        for context in self.contexts.values():
            context.close()
