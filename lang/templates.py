"""Chat templates as text: what stands before and after each role's content in a prompt. Used by the interpreter.

A program is one text with roles in it, which may be generated into in any role and at any place, so a template here is
a prefix and a suffix per role, not a function of a whole conversation. Invariant: each equals what the model's own
Jinja template gives for the conversations both can express.
"""

import re
from collections.abc import Sequence
from typing import Any, Final

import msgspec

from ..errors import RequestError


class ChatTemplate(msgspec.Struct, frozen=True, kw_only=True):
    """`roles`: role to (prefix, suffix). `matches`: a regular expression that finds the models' names, any case."""

    name: str
    roles: dict[str, tuple[str, str]]
    matches: str = ""
    default_system_prompt: str | None = None
    """What is said first where the program says nothing."""
    stop_str: tuple[str, ...] = ()
    image_token: str = "<image>"
    system_in_user: tuple[str, str] | None = None
    """(prefix, suffix) of the system's text inside the first user turn, where the model has no system turn."""

    def prefix_and_suffix(self, role: str, messages: Sequence[Any]) -> tuple[str, str]:
        """What stands around the next message, whose forerunners are `messages`. Raises RequestError."""
        if role not in self.roles:
            raise RequestError(f"the chat template {self.name!r} has no role {role!r}", param="role")
        prefix, suffix = self.roles[role]
        if self.system_in_user is not None:
            if role == "system":
                return prefix + self.system_in_user[0], self.system_in_user[1]
            if role == "user" and len(messages) == 1 and messages[0]["role"] == "system":
                return "", suffix  # the user's turn was opened by the system's
        return prefix, suffix


def _same(prefix: str, suffix: str) -> dict[str, tuple[str, str]]:
    """A template that treats all roles alike; {role} in the prefix is the role's name."""
    return {role: (prefix.format(role=role), suffix) for role in ("system", "user", "assistant")}


_CHATML: Final = _same("<|im_start|>{role}\n", "<|im_end|>\n")
_INST: Final = {"system": ("[INST] ", ""), "user": ("[INST] ", " [/INST]"), "assistant": ("", " </s>")}
_SMOLLM: Final = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
_QWEN25: Final = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
_GEMMA: Final = {
    "system": ("<start_of_turn>user\n", ""),
    "user": ("<start_of_turn>user\n", "<end_of_turn>\n"),
    "assistant": ("<start_of_turn>model\n", "<end_of_turn>\n"),
}

_BUILT_IN: Final = (
    ChatTemplate(
        name="smollm",
        matches="smollm2?-",
        roles=_CHATML,
        default_system_prompt=_SMOLLM,
        stop_str=("<|im_end|>",),
    ),
    ChatTemplate(
        name="qwen2.5",
        matches=r"qwen-?2\.5",
        roles=_CHATML,
        default_system_prompt=_QWEN25,
        stop_str=("<|im_end|>",),
    ),
    ChatTemplate(
        name="qwen",
        matches="qwen.*(chat|instruct)",
        roles=_CHATML,
        default_system_prompt="You are a helpful assistant.",
        stop_str=("<|im_end|>",),
    ),
    ChatTemplate(name="chatml", matches="chatml|qwen-?3|yi-.*chat|hermes", roles=_CHATML, stop_str=("<|im_end|>",)),
    ChatTemplate(
        name="llama-3-instruct",
        matches=r"llama-?3.*instruct",
        roles=_same("<|start_header_id|>{role}<|end_header_id|>\n\n", "<|eot_id|>"),
        stop_str=("<|eot_id|>",),
    ),
    ChatTemplate(
        name="llama-2-chat",
        matches="llama-?2.*chat|codellama.*instruct",
        roles=_INST,
        system_in_user=("<<SYS>>\n", "\n<</SYS>>\n\n"),
    ),
    ChatTemplate(name="mistral", matches="mi[sx]tral.*instruct", roles=_INST, system_in_user=("", "\n\n")),
    ChatTemplate(
        name="gemma-it",
        matches="gemma.*it",
        roles=_GEMMA,
        stop_str=("<end_of_turn>",),
        system_in_user=("", "\n\n"),
    ),
    ChatTemplate(
        name="vicuna_v1.1",
        matches="vicuna|llava-v1.5",
        roles={"system": ("", " "), "user": ("USER: ", " "), "assistant": ("ASSISTANT: ", "</s>")},
        default_system_prompt=(
            "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful,"
            " detailed, and polite answers to the user's questions."
        ),
    ),
    ChatTemplate(
        name="granite-3-instruct",
        matches="granite.*instruct",
        roles=_same("<|start_of_role|>{role}<|end_of_role|>", "<|end_of_text|>\n"),
        stop_str=("<|end_of_text|>",),
    ),
    ChatTemplate(
        name="claude",
        matches="claude",
        roles={"system": ("", ""), "user": ("\n\nHuman: ", ""), "assistant": ("\n\nAssistant: ", "")},
    ),
    ChatTemplate(
        name="default",
        roles={"system": ("SYSTEM:", "\n"), "user": ("USER:", "\n"), "assistant": ("ASSISTANT:", "\n")},
    ),
)
_registry: Final = {template.name: template for template in _BUILT_IN}


def register_chat_template(template: ChatTemplate) -> None:
    """Add a template, or replace the one of this name; among those that match a model it goes first."""
    _registry[template.name] = template


def get_chat_template(name: str) -> ChatTemplate:
    """Raises RequestError for an unknown name."""
    if name not in _registry:
        raise RequestError(f"no chat template {name!r}; there are: {', '.join(_registry)}", param="chat_template")
    return _registry[name]


def chat_template_of(model: str) -> ChatTemplate:
    """The template of a model, by its name or path; "default", as in SGLang, where none matches."""
    added = [template for template in _registry.values() if template not in _BUILT_IN]
    for template in (*added, *_BUILT_IN):
        if template.matches and re.search(template.matches, model, re.IGNORECASE):
            return template
    return _registry["default"]
