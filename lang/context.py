"""The text of a running program, or of one of its branches: what has been said so far, as a text and as messages.

Used by the interpreter, which changes it, and by backends, which read it. Invariant: `messages` are the roles that have
ended; `text` is everything, in the chat template's form; a copy shares nothing that changes.
"""

from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

from ..errors import RequestError
from .images import Picture
from .speculation import Ahead, Speculation
from .templates import ChatTemplate

ChatTurn: TypeAlias = dict[str, Any]
"""A message in OpenAI's form."""


@dataclass(slots=True)
class Context:
    template: ChatTemplate
    text: str = ""
    messages: list[ChatTurn] = field(default_factory=list)
    role: str | None = None
    """The role that is open."""
    role_begin: int = 0
    """Where its content begins in `text`, behind the template's prefix."""
    pictures: tuple[Picture, ...] = ()
    new_pictures: tuple[Picture, ...] = ()
    """Those of the open role."""
    scopes: dict[str, int] = field(default_factory=dict)
    """Where variable scopes began."""
    fork_begin: int = 0
    ahead: Ahead | None = None
    """What the model has said beyond the program's text (speculation.py)."""
    speculation: Speculation = field(default_factory=Speculation)
    pin: int = 0
    """Under which number the backend keeps this text in its prefix cache between two calls; 0: under none."""

    def branch(self) -> "Context":
        """A copy that goes on alone. What is ahead was drawn once: branches that draw at random share none of it."""
        return replace(
            self,
            messages=list(self.messages),
            scopes=dict(self.scopes),
            fork_begin=len(self.text),
            ahead=self.ahead.copy() if self.ahead is not None and self.ahead.greedy else None,
            speculation=replace(self.speculation),
            pin=0,
        )

    def fill(self, text: str) -> None:
        """Append text that the program gives."""
        if self.ahead is not None and not self.ahead.take_literal(text):
            self.speculation.misses += bool(self.ahead.text)
            self.ahead = None
        self.text += text

    def begin_role(self, role: str) -> None:
        """Raises RequestError inside another role, and for one that the template does not have."""
        if self.role is not None:
            raise RequestError(f"the role {role!r} begins inside {self.role!r}: roles do not nest")
        if not self.messages and role != "system" and self.template.default_system_prompt:
            self.begin_role("system")
            self.fill(self.template.default_system_prompt)
            self.end_role("system")
        self.fill(self.template.prefix_and_suffix(role, self.messages)[0])
        self.role, self.role_begin = role, len(self.text)

    def end_role(self, role: str) -> None:
        """Raises RequestError if another role is open, or none."""
        if self.role != role:
            raise RequestError(f"the role {role!r} ends, but {self.role or 'no role'} is open")
        message = self._open_message()
        self.fill(self.template.prefix_and_suffix(role, self.messages)[1])
        self.messages.append(message)
        self.role, self.new_pictures = None, ()

    def conversation(self) -> tuple[list[ChatTurn], str]:
        """(the messages with the open one if it has content, that content).

        Raises RequestError for text outside of roles, which a chat model cannot be given.
        """
        if self.role is None:
            raise RequestError(
                "this backend's model takes conversations: generate inside a role, as in"
                " s += sgl.assistant(sgl.gen(...))"
            )
        content = self.text[self.role_begin :]
        if not content and not self.new_pictures:
            return list(self.messages), ""
        return [*self.messages, self._open_message()], content

    def _open_message(self) -> ChatTurn:
        content = self.text[self.role_begin :].lstrip()
        if not self.new_pictures:
            return {"role": self.role, "content": content}
        content = content.replace(self.template.image_token, "")  # the parts say where pictures are
        parts = [{"type": "image_url", "image_url": {"url": picture.url}} for picture in self.new_pictures]
        return {"role": self.role, "content": [{"type": "text", "text": content}, *parts]}
