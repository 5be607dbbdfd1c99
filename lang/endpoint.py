"""RuntimeEndpoint: a remote actorserve or SGLang server by its native `/generate`; Runtime: one that is started here.

Choices are scored as SGLang's frontend does it, by the logprobs of prompts that end in them. Invariant: the same
requests serve both kinds of server.
"""

import atexit
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any, Final

import msgspec

from ..errors import ActorserveError, RequestError, StartupError
from .backend import Backend, Reply
from .choices import ChoiceScores, ChoicesDecision, ChoicesMethod, TokenScore
from .context import Context
from .expressions import Sampling
from .http_calls import Http, stopped
from .loop import LOOP
from .remote import ProgramReply, ProgramRequest
from .templates import chat_template_of, get_chat_template

OUTSIDE: Final = frozenset(
    "return_logprob logprob_start_len top_logprobs_num return_text_in_logprobs priority dtype".split()
)
"""What `/generate` takes beside its sampling_params, or not at all."""
NAMES: Final = {"seed": "sampling_seed"}
START_SECONDS: Final = 300.0


class RuntimeEndpoint(Backend):
    """A server at `base_url`."""

    takes_pictures = True

    def __init__(
        self,
        base_url: str,
        api_key: str | None = None,
        verify: Any = True,
        chat_template_name: str | None = None,
        timeout: float = 3600.0,
    ) -> None:
        """Asks the server what it serves. Raises EngineDown if it cannot be reached."""
        headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
        self._http = Http(base_url, headers, timeout, verify=verify if verify is not None else True)
        self.model_info: dict[str, Any] = LOOP.call(self._told, "model_info")
        name = str(self.model_info["model_path"])
        super().__init__(name, get_chat_template(chat_template_name) if chat_template_name else chat_template_of(name))
        self.takes_programs = bool(self.model_info.get("runs_programs"))
        self._is_ours = "context_length" in self.model_info and "has_chat_template" in self.model_info

    async def generate(self, context: Context, sampling: Sampling) -> Reply:
        answer = await self._http.post("/generate", self._body(context, sampling))
        answers = answer if isinstance(answer, list) else [answer]
        return Reply([item["text"] for item in answers], answers[0]["meta_info"])

    async def stream(self, context: Context, sampling: Sampling) -> AsyncIterator[tuple[str, dict[str, Any]]]:
        sent = 0
        async for event in self._http.events("/generate", self._body(context, sampling) | {"stream": True}):
            if "error" in event:
                raise stopped(event["error"])
            yield event["text"][sent:], event["meta_info"]  # the server's text is all so far
            sent = len(event["text"])

    async def select(
        self, context: Context, choices: Sequence[str], temperature: float, method: ChoicesMethod
    ) -> ChoicesDecision:
        if temperature > 1e-5:
            raise RequestError("select chooses by probability: its temperature must be 0", param="temperature")
        answer = await self._http.post("/generate", self._whole(context.text))
        scores = await self._prompt_scores(context.text, choices, answer["meta_info"]["prompt_tokens"])
        alone = await self._unconditional(scores) if method.requires_unconditional_logprobs else None
        return method.decide(choices, scores, alone)

    async def run_program(self, request: ProgramRequest) -> ProgramReply:
        answer = await self._http.post("/v1/programs", msgspec.to_builtins(request, str_keys=True))
        return msgspec.convert(answer, ProgramReply)

    async def commit(self, context: Context) -> None:
        await self._http.post("/generate", self._whole(context.text))

    async def cache_prefix(self, text: str) -> None:
        await self._http.post("/generate", self._whole(text))

    async def flush_cache(self, empty_cache: bool = True) -> bool:
        await self._http.post("/flush_cache", {"empty_cache": empty_cache})
        return True

    async def get_server_info(self) -> dict[str, Any]:
        return await self._told("server_info")

    async def _told(self, what: str) -> dict[str, Any]:
        """What the server says of itself; SGLang's older ones under another name."""
        try:
            info: dict[str, Any] = await self._http.get(f"/{what}")
        except RequestError as error:
            if error.status != 404:
                raise
            info = await self._http.get(f"/get_{what}")
        return info

    async def _prompt_scores(self, prompt: str, choices: Sequence[str], tokens: int) -> list[list[TokenScore]]:
        """The tokens of each choice. Asked from two before the prompt's end: a choice may be spelt with the prompt's
        last token in one (token healing), which then counts."""
        body = {
            "text": [prompt + choice for choice in choices],
            "sampling_params": {"max_new_tokens": 0, "temperature": 0},
            "return_logprob": True,
            "return_text_in_logprobs": True,
            "logprob_start_len": max(tokens - 2, 0),
        }
        answers = await self._http.post("/generate", body)
        scores = [[_row(row) for row in answer["meta_info"]["input_token_logprobs"]] for answer in answers]
        return [_last(rows, len(choice)) for rows, choice in zip(scores, choices, strict=True)]

    async def _unconditional(self, scores: ChoiceScores) -> list[list[TokenScore]]:
        body = {
            "input_ids": [[token for _, token, _ in rows] for rows in scores],
            "sampling_params": {"max_new_tokens": 0},
            "return_logprob": True,
            "logprob_start_len": 0,
        }
        answers = await self._http.post("/generate", body)
        return [[_row(row) for row in answer["meta_info"]["input_token_logprobs"]] for answer in answers]

    def _body(self, context: Context, sampling: Sampling) -> dict[str, Any]:
        given = {name: v for name, v in msgspec.structs.asdict(sampling).items() if v is not None}
        inner = {self._named(name): value for name, value in given.items() if name not in OUTSIDE}
        inner = {name: value for name, value in inner.items() if value != ()}
        outer = {name: value for name, value in given.items() if name in OUTSIDE}
        pictures = [picture.data for picture in context.pictures]
        if pictures:
            outer["image_data"] = pictures if len(pictures) > 1 else pictures[0]
        return {"text": context.text, "sampling_params": inner, **outer}

    def _named(self, name: str) -> str:
        return name if self._is_ours else NAMES.get(name, name)

    def _whole(self, text: str) -> dict[str, Any]:
        """A request that computes a text and draws nothing."""
        return {"text": text, "sampling_params": {"max_new_tokens": 0}}


class Runtime:
    """A server in a process of its own, started by the constructor; a backend by its `endpoint`."""

    def __init__(self, model_path: str | None = None, *, port: int | None = None, **flags: Any) -> None:
        """`flags` are those of `actorserve run`, with underscores. Raises StartupError."""
        port = port or _free_port()
        settings = {"model": model_path, **flags}
        words = [_flag(name, value) for name, value in settings.items() if value is not None and value is not False]
        command = [sys.executable, "-m", "actorserve", "run", "--port", str(port), *(w for word in words for w in word)]
        self.url = f"http://127.0.0.1:{port}"
        self.generate_url = self.url + "/generate"
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        atexit.register(self.shutdown)
        self._wait()
        self.endpoint = RuntimeEndpoint(self.url)

    def shutdown(self) -> None:
        """End the server; without effect the second time."""
        atexit.unregister(self.shutdown)
        if self._process.poll() is None:
            self._process.terminate()
            self._process.wait()

    def cache_prefix(self, prefix: str) -> None:
        """Compute a text into the prefix cache."""
        LOOP.call(self.endpoint.cache_prefix, prefix)

    def __enter__(self) -> "Runtime":
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()

    def _wait(self) -> None:
        http = Http(self.url, {}, timeout=10.0, max_retries=0)
        end = time.monotonic() + START_SECONDS
        while time.monotonic() < end:
            if self._process.poll() is not None:
                raise StartupError("the server ended while it started; its messages are above")
            try:
                LOOP.call(http.get, "/ready")
            except ActorserveError:
                time.sleep(0.1)
            else:
                return
        self.shutdown()
        raise StartupError(f"the server did not start within {START_SECONDS:.0f} s")


def _row(row: Sequence[Any]) -> TokenScore:
    """(logprob, token, text); the first token of all has no logprob, and 0 stands in."""
    return (row[0] or 0.0, row[1], row[2])


def _last(rows: list[TokenScore], characters: int) -> list[TokenScore]:
    """The last rows, as many as it takes to spell so many characters."""
    count = 0
    while characters > 0 and count < len(rows):
        count += 1
        characters -= len(rows[-count][2] or "")
    return rows[len(rows) - count :]


def _flag(name: str, value: Any) -> tuple[str, ...]:
    flag = "--" + name.replace("_", "-")
    return (flag,) if value is True else (flag, str(value))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
