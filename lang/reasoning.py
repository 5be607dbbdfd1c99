"""`separate_reasoning`: thoughts and answer of generated text as two variables; the program's text keeps the answer.

Used by the interpreter. The formats are those of models/reasoning_parser.py, by the names of `--reasoning-parser`.
"""

from collections.abc import Sequence

from ..errors import RequestError, StartupError
from ..models.parse_events import Content, Reasoning, parse
from ..models.parsers import reasoning_parser
from .context import Context
from .variables import Slot


def split(context: Context, raw: Sequence[Slot], made: Sequence[Slot], model_type: str) -> None:
    """Fill `made`, an answer and its thoughts for each of `raw`, and leave only the answers in the text.

    Raises RequestError for an unknown model type, and ProgramError where the text itself failed.
    """
    for i, source in enumerate(raw):
        text = source.result()
        if not isinstance(text, str):
            raise RequestError("separate_reasoning takes texts: n must be 1, without an output type")
        try:
            events = parse(reasoning_parser(model_type), text)
        except StartupError as error:
            raise RequestError(error.message.replace("--reasoning-parser", "model_type"), param="model_type") from None
        answer = "".join(event.text for event in events if isinstance(event, Content))
        thoughts = "".join(event.text for event in events if isinstance(event, Reasoning))
        place = context.text.rfind(text, context.role_begin)
        if place >= 0:
            context.text = context.text[:place] + answer + context.text[place + len(text) :]
        made[2 * i].fill(answer, source.meta)
        made[2 * i + 1].fill(thoughts, source.meta)
