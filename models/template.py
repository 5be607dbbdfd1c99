"""ChatTemplate: a conversation in OpenAI's form to the text of the model's prompt, by the model's own Jinja template.

Used by the text actor. The result is masked text for `Tokenizer.encode_chat` (see control.py): what the request
brought cannot become a control token. Invariant: rendering ends soon, whatever template and messages are (sandbox.py),
and every fault of a request is a RequestError for "messages".
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, TypeAlias

import jinja2
import msgspec
from jinja2 import meta, nodes

from ..errors import RequestError, StartupError
from .control import TAG, ControlTokens
from .sandbox import Sandbox, TooMuch
from .tokenizer import Tokenizer

Json: TypeAlias = dict[str, Any]

ROLES: Final = frozenset(
    "system developer user assistant tool function ipython model observation context documents tool_calls"
    " tool_results".split()
)
"""Templates build control tokens from a role ("<|" + role + "|>"), so it cannot be any word."""
RESERVED: Final = frozenset(
    "messages tools documents add_generation_prompt continue_final_message tokenize chat_template conversation"
    " return_dict bos_token eos_token unk_token pad_token sep_token cls_token mask_token raise_exception strftime_now"
    " range dict namespace cycler joiner loop self caller varargs kwargs".split()
)
"""Names that chat_template_kwargs may not set."""
MAX_MESSAGES: Final = 4096
PROBE: Final = "probe of parts"


class ChatRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """What a ChatPrompt's payload holds, as JSON."""

    messages: list[Json]
    tools: list[Json] | None = None
    documents: list[Json] | None = None
    add_generation_prompt: bool | None = None
    """Default: true, unless the final message is to be continued."""
    continue_final_message: bool = False
    chat_template_kwargs: Json | None = None
    """Further variables; those that the template does not use are ignored."""


_decoder: Final = msgspec.json.Decoder(ChatRequest)


def decode_chat(payload: bytes | memoryview) -> ChatRequest:
    """Parse and check a payload. Raises RequestError naming the field."""
    try:
        request = _decoder.decode(payload)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise RequestError(f"not a valid conversation: {error}", param="messages") from error
    if not request.messages:
        raise RequestError("messages must not be empty", param="messages")
    if len(request.messages) > MAX_MESSAGES:
        raise RequestError(f"at most {MAX_MESSAGES} messages", param="messages")
    if request.continue_final_message and request.add_generation_prompt:
        raise RequestError(
            "continue_final_message and add_generation_prompt exclude each other", param="continue_final_message"
        )
    return request


class ChatTemplate:
    """The templates of one model, compiled. Safe to share between threads."""

    def __init__(self, sources: str | Mapping[str, str], special: Mapping[str, str], control: ControlTokens) -> None:
        """`sources`: one template or several by name ("default", "tool_use"); `special`: bos_token and so on.

        Raises StartupError when a template does not compile.
        """
        named = {"default": sources} if isinstance(sources, str) else sources
        self._control = control
        self._variants = {name: _Variant(source, special, control) for name, source in named.items()}
        self._default = self._variants.get("default") or next(iter(self._variants.values()))

    def render(self, request: ChatRequest) -> str:
        """The prompt as masked text (`ControlTokens.unmask` gives the plain one). Raises RequestError."""
        variant = self._variants.get("tool_use", self._default) if request.tools else self._default
        kwargs = request.chat_template_kwargs or {}
        for name in kwargs:
            if name in RESERVED or name.startswith("_") or not name.isidentifier():
                raise RequestError(f"chat_template_kwargs may not set {name[:40]!r}", param="chat_template_kwargs")
        try:
            return variant.render(request, kwargs)
        except RecursionError as error:
            raise RequestError("the messages are nested too deeply", param="messages") from error


def load_template(tokenizer: Tokenizer, file: str | None) -> ChatTemplate | None:
    """The template in `file` (--chat-template), else the model's; None if there is none. Raises StartupError."""
    sources: dict[str, str] = tokenizer.templates
    if file is not None:
        try:
            sources = {"default": Path(file).read_text(encoding="utf-8")}
        except (OSError, UnicodeDecodeError) as error:
            raise StartupError(f"cannot read the chat template {file}: {error}") from error
    return ChatTemplate(sources, tokenizer.special_tokens, tokenizer.control) if sources else None


class _Variant:
    """One compiled template and what its source tells: which variables it reads, which strings it looks for."""

    def __init__(self, source: str, special: Mapping[str, str], control: ControlTokens) -> None:
        self._special = dict(special)
        self._sandbox = Sandbox(_ascii_string(control))
        try:
            tree = self._sandbox.parse(source)
            self._template = self._sandbox.load(source)
        except (jinja2.TemplateError, RecursionError, SyntaxError, MemoryError) as error:
            raise StartupError(f"the chat template does not compile: {error}") from error
        self._reads = meta.find_undeclared_variables(tree)
        words = [node.value for node in tree.find_all(nodes.Const) if isinstance(node.value, str)]
        words += [node.attr for node in tree.find_all(nodes.Getattr)]
        self._mask = control.mask(words)
        self._takes_parts = self._probe([{"type": "text", "text": PROBE}])
        self._takes_strings = not self._takes_parts or self._probe(PROBE)
        self._takes = ["text", *(kind for kind in ("image", "video") if self._takes_parts and self._probe_part(kind))]
        """Types of parts."""
        self._takes_silence = self._probe_silence()

    def render(self, request: ChatRequest, kwargs: Json) -> str:
        messages = [self._message(i, message) for i, message in enumerate(request.messages)]
        if request.continue_final_message:
            _tag_end(messages[-1])
        prompt = request.add_generation_prompt
        if prompt is None:
            prompt = not request.continue_final_message
        value = self._mask.value
        text = self._run(
            {name: value(item) for name, item in kwargs.items() if name in self._reads}
            | {"messages": messages, "tools": value(request.tools), "documents": value(request.documents)}
            | {"add_generation_prompt": prompt}
        )
        return _cut_at_tag(text) if request.continue_final_message else text

    def _run(self, variables: Json) -> str:
        """Render; what goes wrong is the request's fault, in words that give away nothing of the inside."""
        try:
            return self._sandbox.run(self._template, self._special | variables)
        except TooMuch as error:
            raise RequestError(f"the chat template cannot render this: {error.message}", param="messages") from error
        except RecursionError:
            raise
        except jinja2.TemplateError as error:
            said = f": {error.message}" if type(error) is jinja2.TemplateError else ""
            raise RequestError(f"the chat template refuses these messages{said}", param="messages") from error
        except Exception as error:  # a template is a program: TypeError, KeyError, MemoryError, anything
            raise RequestError("the chat template fails for these messages", param="messages") from error

    def _message(self, index: int, message: Json) -> Json:
        """One message, masked, in the form that templates expect: no nulls, arguments as objects, content that fits."""
        role = message.get("role")
        if not isinstance(role, str) or role not in ROLES:
            raise RequestError(f"messages[{index}].role must be one of {', '.join(sorted(ROLES))}", param="messages")
        plain = {key: item for key, item in message.items() if item is not None}
        if "content" in plain:
            plain["content"] = self._content(index, plain["content"])
        elif "tool_calls" not in plain and "function_call" not in plain:
            raise RequestError(f"messages[{index}] has no content", param="messages")
        elif not self._takes_silence:
            plain["content"] = self._content(index, "")
        if isinstance(plain.get("tool_calls"), list):
            plain["tool_calls"] = [_parsed_call(call) for call in plain["tool_calls"]]
        reasoning = next((plain[n] for n in ("reasoning_content", "thinking", "reasoning") if n in plain), None)
        if reasoning is not None:  # one field with three names; gpt-oss reads "thinking"
            plain = {"thinking": reasoning, **plain, "reasoning_content": reasoning}
        masked: Json = self._mask.value(plain)
        return masked | {"role": role}

    def _content(self, index: int, content: Any) -> str | list[Json]:
        """Strings and lists of text parts, whichever of the two the template understands."""
        if isinstance(content, str):
            return content if self._takes_strings else [{"type": "text", "text": content}]
        where = f"messages[{index}].content"
        if not isinstance(content, list):
            raise RequestError(f"{where} must be a string or a list of parts", param="messages")
        for part in content:
            if isinstance(part, dict) and part.get("type") != "text" and part.get("type") in self._takes:
                continue
            if not (isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)):
                kinds = " and ".join(self._takes)
                text = f"{where}: this model's chat template takes parts of type {kinds} only"
                raise RequestError(text, param="messages")
        if self._takes_parts:
            return [_plain_part(part) for part in content]
        return "\n".join(part["text"] for part in content)

    def _probe(self, content: Any) -> bool:
        """Whether the template prints the text of this content, and not its Python form."""
        probe = {"messages": [{"role": "user", "content": content}], "tools": None, "documents": None}
        try:
            text = self._run(probe | {"add_generation_prompt": True})
        except (RequestError, RecursionError):
            return False
        return PROBE in text and not any(f"{q}text{q}" in text for q in "'\"")

    def _probe_part(self, kind: str) -> bool:
        """Whether the template writes something for a part of this type."""
        text = {"type": "text", "text": PROBE}
        rendered = []
        for parts in ([text], [{"type": kind}, text]):
            probe = {"messages": [{"role": "user", "content": parts}], "tools": None, "documents": None}
            try:
                rendered.append(self._run(probe | {"add_generation_prompt": True}))
            except (RequestError, RecursionError):
                return False
        return rendered[0] != rendered[1] and PROBE in rendered[1]

    def _probe_silence(self) -> bool:
        """Whether the template renders a message with calls and without content: some print the content unasked."""
        call = {"id": "123456789", "type": "function", "function": {"name": "f", "arguments": {}}}
        turns = [{"role": "user", "content": PROBE}, {"role": "assistant", "tool_calls": [call]}]
        try:
            self._run({"messages": turns, "tools": None, "documents": None, "add_generation_prompt": True})
        except (RequestError, RecursionError):
            return False
        return True


def _plain_part(part: Json) -> Json:
    return {"type": "text", "text": part["text"]} if part["type"] == "text" else {"type": part["type"]}


def _parsed_call(call: Any) -> Any:
    """A tool call whose arguments are an object: OpenAI sends them as JSON in a string, templates print them."""
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return call
    try:
        arguments = msgspec.json.decode(function["arguments"])
    except (msgspec.MsgspecError, UnicodeError, RecursionError):
        return call
    return call | {"function": function | {"arguments": arguments}} if isinstance(arguments, dict) else call


def _tag_end(message: Json) -> None:
    """Mark the end of the final message, so that the prompt can be cut there. The space shows whether it is trimmed."""
    content = message.get("content")
    if isinstance(content, str):
        message["content"] = content + TAG + " "
    elif isinstance(content, list) and content and content[-1]["type"] == "text":
        content[-1]["text"] += TAG + " "
    else:
        raise RequestError("the final message has no text to continue", param="continue_final_message")


def _cut_at_tag(text: str) -> str:
    end = text.rfind(TAG)
    if end < 0:
        raise RequestError("the chat template drops the final message", param="continue_final_message")
    return text[:end] if text.startswith(TAG + " ", end) else text[:end].rstrip()


def _ascii_string(control: ControlTokens) -> Any:
    """`tojson(ensure_ascii=True)`: escapes what is not ASCII, but for masked characters, which stand for ASCII."""

    def escape(text: str) -> str:
        return "".join(c if c.isascii() or control.is_masked(c) or c == TAG else json.dumps(c)[1:-1] for c in text)

    return escape
