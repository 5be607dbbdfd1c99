"""Servers that speak OpenAI's API as backends: chat and completion models, also on Azure, and our own server.

What the API has no parameter for is checked and retried (`regex`), asked for in the API's way (`json_schema`, by
response_format), or refused; nothing is dropped silently. Invariant: a chat model is never made to continue a message
unless `continues` says that the server can: a reply would begin anew and be wrong without a sign.
"""

import os
import re
from collections.abc import AsyncIterator, Sequence
from typing import Any, Final

import msgspec

from ..errors import RequestError
from .backend import Backend, Reply
from .checks import matching
from .choices import ChoicesDecision, ChoicesMethod, TokenScore, greedy_token_selection
from .context import Context
from .expressions import Sampling
from .http_calls import Http, stopped
from .templates import chat_template_of, get_chat_template
from .tools import call_text

COMPLETION_MODELS: Final = ("gpt-3.5-turbo-instruct", "davinci-002", "babbage-002")
NEW_LIMIT: Final = re.compile(r"^(o\d|gpt-5)")
"""Models that name their limit max_completion_tokens."""
NOT_OPENAI: Final = {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0, "ignore_eos": False, "min_new_tokens": 0}
"""Parameters that OpenAI does not have, and their values without effect."""
BEYOND: Final = ("regex", "ebnf", "stop_regex", "stop_token_ids", "priority")
"""Parameters that servers with `continues` take beyond OpenAI's."""


class OpenAI(Backend):
    """A model behind OpenAI's API."""

    def __init__(
        self,
        model_name: str,
        is_chat_model: bool | None = None,
        chat_template: str | None = None,
        is_azure: bool = False,
        *,
        api_key: str | None = None,
        base_url: str | None = None,
        azure_endpoint: str | None = None,
        azure_deployment: str | None = None,
        api_version: str | None = None,
        timeout: float = 600.0,
        max_retries: int = 2,
        continues: bool = False,
        extra_body: dict[str, Any] | None = None,
    ) -> None:
        """Keys and addresses that are not given come from the variables that OpenAI's client reads.

        `continues`: the server takes continue_final_message (ours, vLLM, SGLang), so that an assistant's turn may mix
        texts and gens, and top_k and its like. `extra_body`: further members of every request. Raises RequestError.
        """
        template = get_chat_template(chat_template) if chat_template else chat_template_of(model_name)
        super().__init__(model_name, template)
        self.is_chat_model = model_name not in COMPLETION_MODELS if is_chat_model is None else is_chat_model
        self.takes_pictures = self.takes_tools = self.is_chat_model
        self._continues = continues
        self._extra = extra_body or {}
        self._query = ""
        if is_azure:
            endpoint = azure_endpoint or os.environ.get("AZURE_OPENAI_ENDPOINT", "")
            base_url = f"{endpoint.rstrip('/')}/openai/deployments/{azure_deployment or model_name}"
            self._query = f"?api-version={api_version or os.environ.get('OPENAI_API_VERSION', '')}"
            headers = {"api-key": api_key or os.environ.get("AZURE_OPENAI_API_KEY", "")}
        else:
            base_url = base_url or os.environ.get("OPENAI_BASE_URL", "https://api.openai.com/v1")
            headers = {"authorization": f"Bearer {api_key or os.environ.get('OPENAI_API_KEY', 'none')}"}
        self._http = Http(base_url, headers, timeout, max_retries)

    async def generate(self, context: Context, sampling: Sampling) -> Reply:
        path, body = self._request(context, sampling)

        async def generate() -> Reply:
            return _reply(await self._http.post(path, body))

        return await (matching(generate, sampling) if self._must_check(sampling) else generate())

    async def stream(self, context: Context, sampling: Sampling) -> AsyncIterator[tuple[str, dict[str, Any]]]:
        if self._must_check(sampling):
            raise RequestError("a stream cannot be checked against a regular expression or a schema", param="stream")
        if sampling.tools is not None:
            raise self._cannot("stream calls of tools")
        path, body = self._request(context, sampling)
        finish, tokens = None, 0
        async for event in self._http.events(path, body | {"stream": True}):
            if "error" in event:
                raise stopped(event["error"])
            for choice in event.get("choices", ()):
                text = (choice["delta"].get("content") if "delta" in choice else choice.get("text")) or ""
                finish, tokens = choice.get("finish_reason") or finish, tokens + bool(text)
                yield text, {"finish_reason": None if finish is None else {"type": finish}, "chunks": tokens}

    async def select(
        self, context: Context, choices: Sequence[str], temperature: float, method: ChoicesMethod
    ) -> ChoicesDecision:
        """Completion models score the choices, if the server echoes prompts with logprobs. Chat models choose by
        response_format, which is a greedy selection token by token and no other method."""
        if temperature > 1e-5:
            raise RequestError("select chooses by probability: its temperature must be 0", param="temperature")
        if not self.is_chat_model:
            scores = [await self._echoed(context.text, choice) for choice in choices]
            alone = [await self._echoed("", choice) for choice in choices]
            return method.decide(choices, scores, alone if method.requires_unconditional_logprobs else None)
        if method.name != greedy_token_selection.name:
            raise RequestError(
                "chat models give no scores: choices_method must be sgl.greedy_token_selection here",
                param="choices_method",
            )
        schema = {
            "type": "object",
            "properties": {"choice": {"enum": list(choices)}},
            "required": ["choice"],
            "additionalProperties": False,
        }
        text = msgspec.json.encode(schema).decode()
        reply = await self.generate(context, Sampling(json_schema=text, temperature=0.0, max_new_tokens=256))
        try:
            chosen = msgspec.json.decode(reply.texts[0])["choice"]
        except (msgspec.DecodeError, TypeError, KeyError):
            chosen = None
        if chosen not in choices:
            raise RequestError(f"the model chose none of the choices: {reply.texts[0][:100]!r}", param="choices")
        return ChoicesDecision(chosen, reply.meta)

    async def _echoed(self, prompt: str, choice: str) -> list[TokenScore]:
        """The tokens of a choice behind a prompt, as the server echoes them; the very first of all has no logprob."""
        body = self._head() | {
            "prompt": prompt + choice,
            "max_tokens": 0,
            "echo": True,
            "logprobs": 1,
            "temperature": 0,
        }
        logprobs = (await self._http.post("/completions" + self._query, body))["choices"][0].get("logprobs") or {}
        tokens, offsets = logprobs.get("tokens") or [], logprobs.get("text_offset") or []
        rows = zip(logprobs.get("token_logprobs") or [], tokens, offsets, strict=True)
        # A token that crosses the border belongs to the choice (token healing).
        found = [(p or 0.0, -1, token) for p, token, offset in rows if offset + len(token) > len(prompt)]
        if not found:
            raise self._cannot("score choices: the server does not echo prompts with logprobs")
        return found

    def _must_check(self, sampling: Sampling) -> bool:
        """Whether the server cannot be told what the output must match."""
        return not self._continues and (
            sampling.regex is not None or (sampling.json_schema is not None and not self.is_chat_model)
        )

    def _head(self) -> dict[str, Any]:
        return {"model": self.name, **self._extra}

    def _request(self, context: Context, sampling: Sampling) -> tuple[str, dict[str, Any]]:
        """(path, body) of a call. Raises RequestError for what the API cannot do."""
        body = self._head() | self._parameters(sampling)
        if not self.is_chat_model:
            if not self._continues:
                body.pop("response_format", None)
            if sampling.return_logprob:
                body["logprobs"] = sampling.top_logprobs_num or 0
            return "/completions" + self._query, body | {"prompt": context.text}
        messages, content = context.conversation()
        if content and context.role != "assistant":
            raise self._cannot(f"generate inside a {context.role} turn that has begun")
        if content and not self._continues:
            raise RequestError(
                "a chat model answers with a whole turn: a gen must be alone in it, or the backend be made with"
                " continues=True for a server that continues messages",
                code="cannot_continue",
            )
        if content:
            body |= {"continue_final_message": True, "add_generation_prompt": False}
        if NEW_LIMIT.match(self.name):
            body["max_completion_tokens"] = body.pop("max_tokens")
        if sampling.return_logprob:
            body |= {"logprobs": True, "top_logprobs": sampling.top_logprobs_num}
        return "/chat/completions" + self._query, body | {"messages": messages}

    def _parameters(self, sampling: Sampling) -> dict[str, Any]:
        body: dict[str, Any] = {
            "max_tokens": sampling.max_new_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "frequency_penalty": sampling.frequency_penalty,
            "presence_penalty": sampling.presence_penalty,
            "stop": list(sampling.stop or ()) or None,
            "n": sampling.n if (sampling.n or 1) > 1 else None,
            "seed": sampling.seed,
            "logit_bias": sampling.logit_bias and {str(token): bias for token, bias in sampling.logit_bias.items()},
            "response_format": _response_format(sampling.json_schema),
        }
        for name, idle in NOT_OPENAI.items():
            value = getattr(sampling, name)
            if value is None or value == idle:
                continue
            if not self._continues:
                raise self._cannot(f"take {name}")
            body["min_tokens" if name == "min_new_tokens" else name] = value
        for name in BEYOND[1:]:
            if getattr(sampling, name) and not self._continues:
                raise self._cannot(f"take {name} (a server that does is told by continues=True)")
        if self._continues:
            body |= {name: getattr(sampling, name) or None for name in BEYOND}
        if sampling.tools is not None:
            tools = msgspec.json.decode(sampling.tools)
            body |= {"tools": tools, "tool_choice": "required", "parallel_tool_calls": False}
        return {name: value for name, value in body.items() if value is not None}


def _response_format(schema: str | None) -> dict[str, Any] | None:
    if schema is None:
        return None
    inner = {"name": "output", "schema": msgspec.json.decode(schema), "strict": True}
    return {"type": "json_schema", "json_schema": inner}


def _said(message: dict[str, Any]) -> str:
    """A message's text; the first of its calls, if it has some (tools.py)."""
    for call in message.get("tool_calls") or ():
        return call_text(call["function"]["name"], call["function"]["arguments"])
    return message.get("content") or ""


def _reply(answer: dict[str, Any]) -> Reply:
    """A reply of either kind. meta_info has "output_token_texts" where the server tells the tokens."""
    choices = sorted(answer["choices"], key=lambda choice: choice.get("index") or 0)
    texts = [choice["text"] if "text" in choice else _said(choice["message"]) for choice in choices]
    usage, first = answer.get("usage") or {}, choices[0]
    logprobs = first.get("logprobs") or {}
    rows = logprobs.get("content")
    tokens = [row["token"] for row in rows] if rows else logprobs.get("tokens")
    meta = {
        "id": answer.get("id"),
        "finish_reason": {"type": first.get("finish_reason")},
        "prompt_tokens": usage.get("prompt_tokens"),
        "completion_tokens": usage.get("completion_tokens"),
        "output_token_texts": tokens,
    }
    return Reply(texts, {name: value for name, value in meta.items() if value is not None})
