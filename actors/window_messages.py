"""What executors and samplers are told of a window: the plan, what a slot samples by, masks, and states of grammars.

Used by the scheduler actor. Invariant: a message's arrays are its own, so what it was made from may change at once.
"""

from array import array
from itertools import chain

import numpy as np
from msgspec.structs import replace

from .messages import NOTHING, Admit, ChunkEnd, GrammarStates, Plan, SlotMasks, SlotParams
from .request import Request
from .score_rows import scored_fields
from .window import PrefillChunk, Window


def int32(values: list[int]) -> memoryview:
    """Return a message's array of int32."""
    return memoryview(array("i", values).tobytes()) if values else NOTHING


def jumps_of(window: Window) -> GrammarStates:
    """Return what the samplers must know of the window's jumps."""
    jumps = window.jumps
    counted = [j.tokens[1:] if j.request.params.has_penalty else () for j in jumps]
    return GrammarStates(
        window=window.number,
        slots=int32([j.request.slot for j in jumps]),
        states=int32([j.state for j in jumps]),
        counted=int32([len(tokens) for tokens in counted]),
        counted_ids=int32(list(chain.from_iterable(counted))),
    )


def chunk_end(chunk: PrefillChunk) -> ChunkEnd:
    """Return what comes behind a prompt chunk."""
    if chunk.draws:
        return ChunkEnd.DRAW
    return ChunkEnd.POOL if chunk.request.pooled and chunk.end == chunk.request.target else ChunkEnd.MORE


def slot_masks(window: Window, requests: list[Request | None]) -> SlotMasks:
    """Return the masks for one draw each of the window's `once` slots; `requests` by slot."""
    masks = []
    for slot in window.once:
        request = requests[slot]
        assert request is not None and request.guided is not None and request.guided.mask is not None
        masks.append(request.guided.mask)
    return SlotMasks(window.number, int32(window.once), memoryview(np.concatenate(masks).tobytes()))


def slot_params(number: int, request: Request) -> SlotParams:
    """Return what the request, seated in window `number`, samples by."""
    looks_at_tokens = request.params.has_penalty
    prompt, output = request.tokens[: request.prompt_length], request.tokens[request.prompt_length :]
    if request.images and looks_at_tokens:  # penalties know the vocabulary only
        for span in request.images:
            prompt[span.start : span.start + span.length] = array("i", [span.token]) * span.length
    return SlotParams(
        window=number,
        slot=request.slot,
        # An end that the mask allows is one, as it is for a grammar that the sampler follows.
        params=request.params if request.guided is None else replace(request.params, ignore_eos=False),
        prompt_ids=memoryview(prompt.tobytes()) if looks_at_tokens else NOTHING,
        output_ids=memoryview(output.tobytes()) if looks_at_tokens else NOTHING,
        prompt_length=request.prompt_length,
        output_length=request.generated,
        grammar=-1 if request.constraint is None else request.constraint.grammar.handle,
        grammar_state=0 if request.constraint is None else request.constraint.state,
    )


def plan_of(w: Window, sampler_changes: int) -> Plan:
    """Return the window as the executors get it; the samplers get so many messages before."""
    admits = [
        Admit(
            a.request.slot,
            a.request.rid,
            int32(a.pages),
            a.cached,
            a.request.limit,
            a.request.images,
            a.request.second,
        )
        for a in w.admits
    ]
    prompts = (c.request.tokens[c.start : c.end] for c in w.chunks)
    ids = array("i", chain.from_iterable(chain(prompts, (j.tokens for j in w.jumps))))
    chunks = [(c.request.slot, c.start, c.end - c.start, chunk_end(c)) for c in w.chunks]
    chunks += [(j.request.slot, j.start, len(j.tokens), ChunkEnd.DRAW) for j in w.jumps]
    return Plan(
        window=w.number,
        k=w.k,
        release=int32(w.release),
        copies=int32(list(chain.from_iterable(w.copies))),
        admits=admits,
        grow_slots=int32(w.grow_slots),
        grow_pages=int32(w.grow_pages),
        chunk_slots=int32([slot for slot, _, _, _ in chunks]),
        chunk_lengths=int32([length for _, _, length, _ in chunks]),
        chunk_last=int32([end for _, _, _, end in chunks]),
        chunk_ids=memoryview(ids.tobytes()),
        chunk_starts=int32([start for _, start, _, _ in chunks]),
        sampler_changes=sampler_changes,
        once_slots=int32(w.once),
        **scored_fields(w),
    )
