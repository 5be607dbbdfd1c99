"""The chat template of a local model as text, read off its own Jinja template. Used by the embedded backend.

Conversations of marks are rendered, and what stands around the marks is each role's prefix and suffix. Invariant: the
result gives what the Jinja template gives for every conversation that is tried, or there is no result.
"""

from collections.abc import Callable, Sequence
from typing import Any, Final, TypeAlias

from ..errors import ActorserveError
from ..models.template import ChatRequest
from ..models.template import ChatTemplate as JinjaTemplate
from ..models.tokenizer import Tokenizer, load_tokenizer
from .context import Context
from .templates import ChatTemplate

SYSTEM: Final = {"role": "system", "content": "Mark of system"}
USER: Final = {"role": "user", "content": "Mark of user"}
ANSWER: Final = {"role": "assistant", "content": "Mark of answer"}
AGAIN: Final = {"role": "user", "content": "Mark of again"}
TRIED: Final = ([SYSTEM, USER], [USER], [SYSTEM, USER, ANSWER, AGAIN], [USER, ANSWER, AGAIN])
Render: TypeAlias = Callable[[Sequence[dict[str, Any]], bool], str]
"""(messages, whether the model's turn is opened at the end) to text."""


def model_template(path: str) -> ChatTemplate | None:
    """The template of the model in a Hugging Face folder; None if it has none that can be said in pieces."""
    try:
        tokenizer = load_tokenizer(path)
        jinja = JinjaTemplate(tokenizer.templates, tokenizer.special_tokens, tokenizer.control)
        return derived(lambda messages, opened: _rendered(jinja, tokenizer, messages, opened))
    except (ActorserveError, LookupError, StopIteration):  # no template, or one that refuses a conversation of marks
        return None


def derived(render: Render) -> ChatTemplate | None:
    """The template in pieces; None where the pieces do not make the same texts. Raises what `render` raises."""
    head = _around(render([SYSTEM, USER], False), SYSTEM, USER)
    whole = _around(render([SYSTEM, USER, ANSWER, AGAIN], False), SYSTEM, USER, ANSWER, AGAIN)
    answered = _around(render([SYSTEM, USER, ANSWER], False), ANSWER)
    if head is None or whole is None or answered is None:
        return None
    system_prefix, between, user_suffix = head
    assistant_prefix = whole[2].removeprefix(user_suffix)
    user_prefix = whole[3].removeprefix(answered[1])
    roles = {
        "system": (system_prefix, between.removesuffix(user_prefix)),
        "user": (user_prefix, user_suffix),
        "assistant": (assistant_prefix, answered[1]),
    }
    alone = render([USER], False).partition(USER["content"])[0]
    default = alone.removesuffix(user_prefix).removesuffix(roles["system"][1]).removeprefix(system_prefix)
    template = ChatTemplate(name="model", roles=roles, default_system_prompt=default or None)
    return template if all(_text(template, messages) == render(messages, True) for messages in TRIED) else None


def _around(text: str, *messages: dict[str, Any]) -> list[str] | None:
    """What stands before, between and behind the contents; None if one is missing."""
    pieces = []
    for message in messages:
        before, found, text = text.partition(message["content"])
        if not found:
            return None
        pieces.append(before)
    return [*pieces, text]


def _text(template: ChatTemplate, messages: Sequence[dict[str, Any]]) -> str:
    """What a program with these turns, and the model's turn opened, has for text."""
    context = Context(template)
    for message in messages:
        context.begin_role(message["role"])
        context.fill(message["content"])
        context.end_role(message["role"])
    context.begin_role("assistant")
    return context.text


def _rendered(jinja: JinjaTemplate, tokenizer: Tokenizer, messages: Sequence[dict[str, Any]], opened: bool) -> str:
    """Without the token that the tokenizer puts before every text by itself."""
    request = ChatRequest(messages=list(messages), add_generation_prompt=opened)
    text = tokenizer.control.unmask(jinja.render(request))
    adds_bos = tokenizer.bos_id is not None and tokenizer.encode("x")[:1] == [tokenizer.bos_id]
    return text.removeprefix(tokenizer.special_tokens.get("bos_token", "")) if adds_bos else text
