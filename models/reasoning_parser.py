"""ReasoningParser: a model's thoughts apart from its answer, as the text arrives; and the tags of each model family.

parsers.py makes one for each choice of a request with `separate_reasoning`. Invariants: the joined events depend on the
text alone, not on its cutting; all text is reasoning, content or markup, in order, once.
Thoughts stand first in an output: an opening tag counts before any other text, a closing tag only after that. The
opening tag may be missing where the template wrote it (`opened`). Without a closing tag all of it is reasoning.
Whitespace next to a tag belongs to the tag, also next to one that the template wrote.
"""

from types import MappingProxyType
from typing import Final

from msgspec import Struct

from .markers import first_marker, safe_length
from .parse_events import SPACE, Content, Event, Reasoning, ReasoningEnd


class ReasoningFamily(Struct, frozen=True):
    """`opened`: the template always writes the opening tag, so the output begins with thoughts.

    `interrupts`: markup that ends the thoughts without a closing tag, and is part of the answer: models that forget
    the tag call a tool. `dropped`: tags around the answer, which nobody wants to see.
    """

    opens: tuple[str, ...] = ("<think>",)
    closes: tuple[str, ...] = ("</think>",)
    opened: bool = False
    interrupts: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()

    @property
    def markers(self) -> frozenset[str]:
        """All tags; those that are special tokens must be shown by the detokenizer."""
        return frozenset(self.opens + self.closes + self.interrupts + self.dropped)


class ReasoningParser:
    __slots__ = ("_dropped", "_ends", "_family", "_gathered", "_opened", "_place", "_said", "_stream", "_text", "_trim")

    def __init__(self, family: ReasoningFamily, opened: bool | None = None, stream_reasoning: bool = True) -> None:
        """`opened` None: as the family has it. `stream_reasoning` False: all thoughts come in one event at their end.

        opens_reasoning() says it for a prompt.
        """
        self._family = family
        self._opened = family.opened if opened is None else opened
        self._stream = stream_reasoning
        self._ends = family.closes + family.interrupts
        self._place = "start"
        """start, thoughts or answer."""
        self._text = ""
        """What has arrived and is not decided."""
        self._trim = False
        """Whitespace that comes next follows a tag."""
        self._said = False
        self._gathered = ""

    def feed(self, text: str) -> list[Event]:
        """Take the next chunk; return what it decides."""
        if self._place == "answer" and not (self._text or self._trim or self._family.dropped):
            return [Content(text)] if text else []
        self._text += text
        return self._run(final=False)

    def finish(self) -> list[Event]:
        """The text ended: what was held back is reasoning or content, by where it stands."""
        return self._run(final=True)

    def _run(self, final: bool) -> list[Event]:
        events: list[Event] = []
        if self._place == "start":
            self._begin(final)
        if self._place == "thoughts":
            self._think(events, final)
        if self._place == "answer":
            self._answer(events, final)
        return events

    def _begin(self, final: bool) -> None:
        """Decide whether the output begins with thoughts."""
        text = self._text.lstrip(SPACE)
        opening = next((tag for tag in self._family.opens if text.startswith(tag)), None)
        if opening is not None:
            self._text, self._trim, self._place = text[len(opening) :], True, "thoughts"
        elif final or not any(tag.startswith(text) for tag in self._family.opens):
            self._trim = self._opened
            self._place = "thoughts" if self._opened else "answer"

    def _think(self, events: list[Event], final: bool) -> None:
        """Pass on thoughts up to the tag that ends them."""
        self._skip_space()
        found = first_marker(self._text, self._ends)
        if found is None:
            self._reason(events, len(self._text) if final else safe_length(self._text, self._ends))
            if final:
                self._end(events)
            return
        begin, tag = found
        self._reason(events, len(self._text[:begin].rstrip(SPACE)))
        self._end(events)
        self._text = self._text.lstrip(SPACE)
        if tag in self._family.closes:
            self._text = self._text[len(tag) :]
        self._trim, self._place = True, "answer"

    def _answer(self, events: list[Event], final: bool) -> None:
        """Pass on the answer, without the tags around it."""
        self._skip_space()
        while (found := first_marker(self._text, self._family.dropped)) is not None:
            begin, tag = found
            self._show(events, len(self._text[:begin].rstrip(SPACE)))
            self._text, self._trim = self._text.lstrip(SPACE)[len(tag) :], True
            self._skip_space()
        hold = bool(self._family.dropped) and not final
        self._show(events, safe_length(self._text, self._family.dropped) if hold else len(self._text))

    def _skip_space(self) -> None:
        if self._trim:
            self._text = self._text.lstrip(SPACE)
            self._trim = not self._text

    def _reason(self, events: list[Event], length: int) -> None:
        text, self._text = self._text[:length], self._text[length:]
        if text:
            self._said = True
            if self._stream:
                events.append(Reasoning(text))
            else:
                self._gathered += text

    def _end(self, events: list[Event]) -> None:
        if self._gathered:
            events.append(Reasoning(self._gathered))
            self._gathered = ""
        if self._said:
            events.append(ReasoningEnd())

    def _show(self, events: list[Event], length: int) -> None:
        text, self._text = self._text[:length], self._text[length:]
        if text:
            events.append(Content(text))


def opens_reasoning(opens: tuple[str, ...], prompt: str) -> bool:
    """Whether a prompt ends in one of these opening tags, so that the output begins amid thoughts."""
    return bool(opens) and prompt.rstrip(SPACE).endswith(tuple(tag.rstrip(SPACE) for tag in opens))


THINK: Final = ReasoningFamily()
THINKING: Final = ReasoningFamily(opened=True)
QWEN3: Final = ReasoningFamily(interrupts=("<tool_call>",))

REASONING_FAMILIES: Final = MappingProxyType(
    {
        "deepseek-r1": THINKING,
        "deepseek_r1": THINKING,
        "deepseek-v3": THINK,
        "deepseek_v3": THINK,
        "qwen3": QWEN3,
        "qwen3-thinking": ReasoningFamily(interrupts=("<tool_call>",), opened=True),
        "glm45": QWEN3,
        "glm47": QWEN3,
        "mimo": QWEN3,
        "holo2": THINK,
        "interns1": THINK,
        "minimax": THINK,
        "nano_v3": THINK,
        "nemotron_3": THINK,
        "nemotron_v3": THINK,
        "olmo3": THINK,
        "step3": THINKING,
        "step3p5": THINKING,
        "minimax_m2": THINKING,
        "kimi_k2": ReasoningFamily(interrupts=("<|tool_calls_section_begin|>",)),
        "kimi": ReasoningFamily(opens=("◁think▷",), closes=("◁/think▷",)),
        "mistral": ReasoningFamily(opens=("[THINK]",), closes=("[/THINK]",)),
        "seed_oss": ReasoningFamily(opens=("<seed:think>",), closes=("</seed:think>",)),
        "gemma4": ReasoningFamily(opens=("<|channel>thought\n",), closes=("<channel|>",)),
        "granite": ReasoningFamily(
            opens=("Here is my thought process:", "Here's my thought process:"),
            closes=("Here is my response:", "Here's my response:"),
        ),
        "hunyuan_a13b": ReasoningFamily(dropped=("<answer>", "</answer>")),
        "ernie45": ReasoningFamily(opened=True, dropped=("<response>", "</response>")),
        "cohere_command3": ReasoningFamily(
            opens=("<|START_THINKING|>",),
            closes=("<|END_THINKING|>",),
            interrupts=("<|START_ACTION|>", "<|START_RESPONSE|>"),
            dropped=("<|START_RESPONSE|>", "<|END_RESPONSE|>"),
        ),
    }
)
"""The names that --reasoning-parser takes, which are SGLang's and vLLM's."""
