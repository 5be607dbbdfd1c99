"""An assistant block of a chat model under API speculation: recorded, answered by one call, matched to the program.

A chat API answers with a whole message; a program wants parts of it between texts of its own. So the block is recorded,
one call brings a whole message, and the message must agree with the block: the program's texts, and between them what
the `gen`s take, each up to its stop string, or to the program's next text if it has none. Used by the interpreter.
Invariant: either every part agrees and all variables are filled, or none is and the block is done without speculation
or fails; a message that disagrees is never used.
"""

from dataclasses import dataclass, field
from typing import Any

import msgspec

from ..errors import RequestError
from .backend import Backend
from .context import Context
from .expressions import Gen, Sampling
from .speculation import TRIES, Ahead, ahead_of, beyond, may_speculate
from .structured import instance
from .variables import Slot


@dataclass(slots=True)
class Wanted:
    """A recorded `gen`."""

    output_type: Any
    sampling: Sampling
    slot: Slot


@dataclass(slots=True)
class Block:
    """The texts and gens of an open block, in order."""

    parts: list[str | Wanted] = field(default_factory=list)

    @property
    def gens(self) -> list[Wanted]:
        return [part for part in self.parts if isinstance(part, Wanted)]

    def add_text(self, text: str) -> None:
        if self.parts and isinstance(self.parts[-1], str):
            self.parts[-1] += text
        elif text:
            self.parts.append(text)

    def add_gen(self, gen: Gen, sampling: Sampling, slot: Slot) -> None:
        self.parts.append(Wanted(gen.output_type, sampling, slot))

    def text(self) -> str:
        """All text of a block without gens."""
        return "".join(part for part in self.parts if isinstance(part, str))

    def fail(self, error: Exception) -> None:
        for wanted in self.gens:
            wanted.slot.fail(error)


async def run_block(block: Block, backend: Backend, context: Context, tokens: int) -> None:
    """Fill the block's variables and append it to the context. Raises RequestError where that cannot be done."""
    try:
        texts = await _speculate(block, backend, context, tokens)
        if texts is None:
            await _one_by_one(block, backend, context)
            return
    except Exception as error:
        block.fail(error)
        raise
    context.text += "".join(texts)


async def _speculate(block: Block, backend: Backend, context: Context, tokens: int) -> list[str] | None:
    """The texts of all parts by one call, or None if no message agreed."""
    gens, stats = block.gens, context.speculation
    if len(block.parts) < 2 or not all(may_speculate(gen.sampling) for gen in gens):
        return None
    first = gens[0].sampling
    same = [msgspec.structs.replace(gen.sampling, stop=None, max_new_tokens=None) for gen in gens]
    if any(sampling != same[0] for sampling in same):
        raise RequestError("under num_api_spec_tokens the gens of a block may differ in stop and max_tokens only")
    most = max(tokens, *(gen.sampling.max_new_tokens or 0 for gen in gens))
    asked = beyond(first, most, backend.tells_tokens)
    greedy = first.temperature is not None and first.temperature < 1e-6
    for _ in range(1 if greedy else TRIES):
        stats.calls += 1
        reply = await backend.generate(context, asked)
        ahead = ahead_of(reply.texts[0], reply.meta, asked)
        sent = ahead.prompt_tokens
        found = matched(block.parts, ahead)
        if found is not None:
            stats.hits += len(gens) - 1
            # Each call saved would have sent the prompt and what came before it in the block again.
            stats.tokens_saved += sum(before for _, _, before in found[1][1:]) if sent else 0
            for gen, (text, finish, _) in zip(gens, found[1], strict=True):
                meta = reply.meta | {"finish_reason": {"type": finish}, "speculation": stats.report()}
                gen.slot.fill(text, meta)
            return found[0]
        stats.misses += 1
    return None


def matched(parts: list[str | Wanted], ahead: Ahead) -> tuple[list[str], list[tuple[str, str, int]]] | None:
    """Lay a message over a block: (each part's text, and of each gen its text, finish reason, tokens before it).

    None if they disagree. A message may lack whitespace that the block begins with: servers strip it.
    """
    texts: list[str] = []
    gens: list[tuple[str, str, int]] = []
    for i, part in enumerate(parts):
        if isinstance(part, str):
            if not (ahead.take_literal(part) or (i == 0 and ahead.take_literal(part.lstrip()))):
                return None
            texts.append(part)
            continue
        following = parts[i + 1] if i + 1 < len(parts) else None
        stops = part.sampling.stop or ()
        if isinstance(following, str):
            stops = (*stops, following)
        before = ahead.prompt_tokens
        taken = ahead.take_gen(stops, part.sampling.max_new_tokens or 0)
        if taken is None:
            return None
        texts.append(taken[0])
        gens.append((*taken, before))
    return texts, gens


async def _one_by_one(block: Block, backend: Backend, context: Context) -> None:
    """Without speculation: a call for each gen, with the message so far."""
    for part in block.parts:
        if isinstance(part, str):
            context.text += part
            continue
        context.speculation.calls += 1
        reply = await backend.generate(context, part.sampling)
        context.text += reply.texts[0]
        several = (part.sampling.n or 1) > 1
        meta = reply.meta | {"speculation": context.speculation.report()}
        values = [instance(text, part.output_type) for text in reply.texts]
        part.slot.fill(values if several else values[0], meta, reply.texts if several else reply.texts[0])
