"""Compiles our Triton kernels for an H100 without one, as they are launched there; a program of its own for the tests.

`python compile_kernels.py`, without TRITON_INTERPRET. Prints a line for each kernel and configuration; an error ends
it. The interpreter runs kernels but forgives what the compiler does not, like a tl.arange that is no power of two.
"""

import os
import sys
from collections.abc import Iterator
from typing import Any

from triton import cdiv, compiler
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource

from actorserve.models import (
    attention_kernels,
    float8_kernels,
    gemm_kernels,
    latent_attention,
    latent_kernels,
    layer_kernels,
    moe_gemm,
    moe_kernels,
    packed_kernels,
    panel_gemm,
    panel_kernels,
    primed_attention,
    primed_attention_kernels,
    primed_kernels,
    row_kernels,
    slot_kernels,
    stream_kernels,
    wide_gemm,
    wide_kernels,
)
from actorserve.models.gemm import GEMMS, PANELS, Choice, Tile
from actorserve.models.packed_tiles import PACKED as QUANTIZED
from actorserve.models.primed_gemm import HEAD, MOST_ROWS, Primed
from actorserve.models.row_gemm import OneRow
from actorserve.models.stream_gemm import Stream
from actorserve.models.triton_attention import DECODE, launch_for, splits_for
from actorserve.models.wide_gemm import Wide
from actorserve.perf.gemm_tiles import Case, cases
from actorserve.sampler import fused, logprob_kernels, race_kernels, rank_kernels, scan_kernels

TARGET = GPUTarget("cuda", 90, 32)
INTS = "rows_ptr length_ptr last_ptr shift_ptr done_ptr tables_ptr position_ptr ids_ptr finish_ptr limit_ptr out_ptr"
POINTERS: dict[str, str] = {
    **dict.fromkeys("logits floats best largest group_tops candidates win_weights new_weights".split(), "*fp32"),
    **dict.fromkeys("partial partial_lse lse table frequencies turns".split(), "*fp32"),
    **dict.fromkeys("ints directory totals aboves new_aboves stop_ids bias_ids eos_ids".split(), "*i64"),
    **dict.fromkeys("slots positions masks bound states best_ids drawn ids chosen".split(), "*i32"),
    **dict.fromkeys("candidate_ids wins new_wins tables rows lengths counters pages meta".split(), "*i32"),
    **dict.fromkeys("q cache out qkv gains kv delta residual weight new_residual gate_up".split(), "*bf16"),
    "marks": "*i16", "counter": "*i32", "finish": "*u8", "bias_values": "*fp32", **dict.fromkeys(INTS.split(), "*i32"),
}  # fmt: skip
LOGPROBS = POINTERS | {
    "tops": "*i64", "listed_ids": "*i64", "top_ids": "*i32",
    **dict.fromkeys("masses logprobs top_logprobs listed".split(), "*fp32"),
}  # fmt: skip
FLOATS = {"scale", "cap", "eps", "qk_eps", "factor"}
LOOSE = {"rows", "early", "square_parts", "heads", "kv_heads"}
"""Numbers that do not divide by 16."""
PACKED: dict[str, str] = {
    **dict.fromkeys("x bias out residual gain new_residual qk_gains kv".split(), "*bf16"), "w": "*i16",
    **dict.fromkeys("parts squares new_squares table scales static x_scales w_scales".split(), "*fp32"),
    "arrived": "*i32", "slots": "*i64",
}  # fmt: skip
"""Of the kernels for quantized weights."""


def build(
    kernel: Any, warps: int, pdl: bool = False, pointers: dict[str, str] = POINTERS, stages: int = 3,
    aligned: bool = False, **constants: Any,
) -> str:  # fmt: skip
    """Compile one configuration; names decide the types of arguments. `aligned`: pointers and sizes divide by 16, as
    they do there. Returns its PTX."""
    names = kernel.arg_names
    types = {n: pointers.get(n) or ("fp32" if n in FLOATS else "i32") for n in names if n not in constants}
    signature = {n: "constexpr" if n in constants else types[n] for n in names}
    values = {(names.index(n),): value for n, value in constants.items()}
    whole = {n for n in types if aligned and types[n] != "fp32" and n not in LOOSE}
    attributes = {(names.index(n),): [["tt.divisibility", 16]] for n in whole}
    options = {"num_warps": warps, "num_stages": stages, **({"launch_pdl": True} if pdl else {})}
    source = GluonASTSource if kernel.is_gluon() else compiler.ASTSource
    made = source(kernel, signature, values, attributes)
    compiled = compiler.compile(made, target=TARGET, options=options)
    print(kernel.__name__, constants, flush=True)
    return str(compiled.asm["ptx"])


def sampler() -> Iterator[None]:
    """Every kernel of the fused sampler."""
    base = {"BLOCK": fused.BLOCK, "GROUPS": fused.GROUPS, "FAST": True}
    for edited, constrained, random, ranked in ((0, 0, 1, 0), (1, 0, 0, 0), (0, 1, 1, 1), (1, 1, 1, 0)):
        flags = {"EDITED": edited, "CONSTRAINED": constrained, "RANDOM": random, "RANKED": ranked, "MASKED": edited}
        yield build(scan_kernels.scan, fused.WARPS, **base, **{n: bool(f) for n, f in flags.items()})
    yield build(scan_kernels.edit_few, 4, BLOCK=128)
    for splits in (1, 16, 64):
        flags = dict.fromkeys(("FILTERING", "EDITED", "CONSTRAINED", "MASKED"), splits > 1)
        yield build(scan_kernels.finish_rows, 1, SPLITS=splits, STOPS=128, **flags)
    size = {"BLOCK": fused.BLOCK, "SPLITS": 16}
    groups = {"FEW": fused.FEW, "MOST": fused.MOST, "GROUPS": fused.GROUPS, "FAST": True}
    yield build(rank_kernels.settle_ranked, fused.WARPS, **size, **groups)
    yield build(race_kernels.race_pass, fused.WARPS, FAST=True, **size)
    for first in (True, False):
        yield build(race_kernels.mass_pass, fused.WARPS, FIRST=first, **size)
    yield build(race_kernels.settle_raced, fused.WARPS, FAST=True, **size)
    for top, named in ((0, 0), (8, 8), (32, 64)):
        numbers = {"TOP": top, "COLUMN": 16, "BLOCK": fused.BLOCK}
        yield build(logprob_kernels.top_pass, fused.WARPS, pointers=LOGPROBS, **numbers)
        yield build(logprob_kernels.settle_logprobs, 4, pointers=LOGPROBS, TOP=top, NAMED=named, SPLITS=16)


def attention() -> Iterator[None]:
    """Decode at every launch of the table, with many parts and few, and prefill; without TESTS_THOROUGH
    one without parts for a head's size."""
    shape = {"K": 4, "G": 7, "PAGE": 16, "WINDOW": False, "SOFTCAP": False, "PRECISION": "tf32"}
    seen = set()
    for head_dim, launches in DECODE.items():
        for most, launch in launches:
            all_of_them = "TESTS_THOROUGH" in os.environ or most == launches[-1][0]
            for problems in (1, 3 * most) if all_of_them else (1,):
                splits = splits_for(problems, launch)
                if (head_dim, launch, splits) in seen:
                    continue
                seen.add((head_dim, launch, splits))
                yield build(
                    attention_kernels.decode, launch.warps, pdl=True, HAS_ROWS=True, GP=16, D=head_dim, DP=head_dim,
                    BLOCK=launch.block, SPLITS=splits, STAGES=launch.stages, AHEAD=launch.ahead, PDL=True,
                    ROTATE=problems > 1 or not all_of_them, **shape,
                )  # fmt: skip
    types = POINTERS | {"blocks": swizzled(primed_attention.PAGE, primed_attention.WIDTH)}
    own = {"K": 2, "G": 7, "GP": primed_attention.GROUP, "PAGE": primed_attention.PAGE}
    for head_dim, way in primed_attention.SHAPES.items():
        sizes = {"PARTS": head_dim // primed_attention.WIDTH, "CHUNK": way.chunk, "BUFFERS": way.buffers}
        yield build(
            primed_attention_kernels.attend_kernel, 4, way.pdl, types, LOOP=not way.pdl, PDL=way.pdl,
            ROTATE=not way.pdl, **own, **sizes,
        )  # fmt: skip
    for window, cap in ((False, False), (True, True)):
        yield build(
            attention_kernels.prefill, 4, D=128, DP=128, M=64, BLOCK=64, STAGES=2,
            **shape | {"WINDOW": window, "SOFTCAP": cap},
        )  # fmt: skip
    shape["PRECISION"] = "tf32x3"
    for of_keys in ("*fp32", "*fp16"):
        wide = POINTERS | {"q": "*fp32", "out": "*fp32", "cache": of_keys}
        launch = launch_for(128, 1 << 20, itemsize=4)
        yield build(
            attention_kernels.decode, launch.warps, pointers=wide, HAS_ROWS=True, GP=16, D=128, DP=128, SPLITS=1,
            BLOCK=launch.block, STAGES=launch.stages, AHEAD=0, PDL=False, ROTATE=False, **shape,
        )  # fmt: skip
        yield build(attention_kernels.prefill, 8, pointers=wide, D=128, DP=128, M=64, BLOCK=32, STAGES=2, **shape)


def latents() -> Iterator[None]:
    """Attention over DeepSeek's latents: decode in one and in many parts, prefill."""
    shape = {"D": 512, "DP": 512, "E": 64, "EP": 64, "PAGE": 16, "HEADS": 16, "STAGES": 2, "PRECISION": "tf32"}
    for most, queries, splits in ((1, 1, 1), (1, 1, latent_attention.MOST_SPLITS), (64, 4, 1)):
        yield build(
            latent_kernels.latent, 4 if queries == 1 else 8, M=most, QUERIES=queries, SPLITS=splits, BLOCK=32, **shape
        )


def layers() -> Iterator[None]:
    """What is between the GEMMs, and the slot arrays."""
    for axes in (False, True):
        yield build(layer_kernels.rotation_kernel, 4, BLOCK=256, AXES=axes)
    for pdl in (False, True):
        yield build(layer_kernels.norm_kernel, 8, pdl, ADD=True, PARTS=1, BLOCK=4096, PDL=pdl)
        yield build(layer_kernels.act_mul_kernel, 4, pdl, ACT="silu", BLOCK=1024, PDL=pdl)
    parts = POINTERS | {"delta": "*fp32"}
    yield build(layer_kernels.norm_kernel, 8, pointers=parts, ADD=True, PARTS=2, BLOCK=4096, PDL=False)
    wide = {"x": "*fp32", "parts": "*i16", "sums": "*fp32", "bias": "*fp32", "out": "*fp32"}
    yield build(layer_kernels.split_kernel, 4, pointers=wide, BLOCK=1024, PARTS=3)
    yield build(layer_kernels.join_kernel, 4, pointers=wide, BIAS=True, BLOCK=1024, PARTS=3)
    for interleaved, norm in ((False, False), (True, True)):
        yield build(
            layer_kernels.rope_kernel, 1, D=128, DIM=128, HALF=64, REST=0, HEADS=4, BLOCKS=9, SKIP_QUERIES=False,
            INTERLEAVED=interleaved, NORM=norm, ROTATE=True, KV_LIMIT=0, PDL=False,
        )  # fmt: skip
    yield build(slot_kernels._prepare, 4, PAGE=16, BLOCK=256)
    yield build(slot_kernels._advance, 4, NO_TOKEN=-1, LENGTH=2, BLOCK=256)


def gemms() -> Iterator[None]:
    """Every tile of GEMMS with what follows its product; without TESTS_THOROUGH one of each epilogue and kernel."""
    seen = set()
    for case in (case for model in ("qwen2-0.5b", "qwen2-7b") for case in cases(model)):
        for most, tile in GEMMS.get((case.outputs, case.inputs), ()):
            kind = (case.follows, type(tile))
            if tile is not None and ("TESTS_THOROUGH" in os.environ or kind not in seen):
                seen.add(kind)
                yield one_product(case, tile, most)


def one_product(case: Case, tile: Choice, rows: int) -> None:
    """What multiplies so many rows; with a Primed also what it leaves to others."""
    if isinstance(tile, Primed):
        one_primed(case, tile)
        tile = tile.plain
    if isinstance(tile, Tile):
        one_gemm(case, tile)
    else:
        one_stream(case, tile, rows)


def one_gemm(case: Case, tile: Tile) -> None:
    """A tile as gemm.linear launches it with PDL."""
    width = tile.outputs // (2 if case.follows == "gated" else 1)
    share = cdiv(cdiv(case.inputs, tile.depth), tile.split)
    constants: dict[str, Any] = {
        "BM": tile.rows, "BN": width, "BK": tile.depth, "SPLIT": tile.split, "SWAP": tile.swap, "TMA": tile.tma,
        "EVEN": case.inputs % tile.depth == 0, "AHEAD": min(tile.ahead, share), "LOOP": share > tile.ahead,
        "STAGES": tile.stages if tile.rows == 1 else None, "FETCH": tile.fetch,
        **({} if tile.split > 1 else {"parts": None}), **epilogue_of(case),
    }  # fmt: skip
    types = PACKED | {"w": "*bf16", **({"out": "*fp32"} if case.follows == "logits" else {})}
    if tile.tma:
        types |= blocks(tile.rows, width, tile.depth)
    else:
        constants |= dict.fromkeys(("x_blocks", "w_blocks"))
    build(gemm_kernels.linear_kernel, tile.warps, True, types, tile.stages, **constants)


def one_stream(case: Case, stream: Stream, rows: int) -> None:
    """A configuration as stream_gemm.multiply launches it for so many rows, with PDL."""
    constants = stream.constants(case.outputs, case.inputs, rows, case.follows == "gated")
    constants |= epilogue_of(case) | {"WAIT": True} | ({} if constants["REST"] else {"parts": None})
    types = PACKED | {"w": "*bf16", **({"out": "*fp32"} if case.follows == "logits" else {})}
    types |= blocks(stream.rows, constants["BN"], stream.depth)
    build(stream_kernels.stream_kernel, stream.warps, True, types, stream.stages, **constants)


def one_primed(case: Case, primed: Primed) -> None:
    """A configuration as primed_gemm.multiply launches it, with PDL."""
    constants: dict[str, Any] = {"BK": primed.depth, "STEPS": case.inputs // primed.depth, "PDL": True}
    if primed.weights == 0:
        own = {name: epilogue_of(case)[name] for name in ("SQUARES", "ADD", "BIAS")}
        constants |= own | ({} if own["BIAS"] else {"bias": None}) | {"BM": primed.rows}
        head = (1, HEAD // 16, 2, 8, primed.depth) if case.follows == "heads" else (HEAD, primed.depth)
        types = {"x_blocks": swizzled(primed.rows, primed.depth), "w_blocks": swizzled(*head), "slots": "*i32"}
        build(primed_kernels.whole_kernel, 4, True, PACKED | types, **constants)
        return
    width = primed.outputs // (2 if case.follows == "gated" else 1)
    types = {"x_blocks": swizzled(MOST_ROWS, primed.depth), "w_blocks": swizzled(width, primed.depth)}
    constants |= {"BM": MOST_ROWS, "BN": width, "WEIGHTS": primed.weights, "INPUTS": primed.inputs}
    if primed.split > 1:
        build(primed_kernels.split_kernel, 4, True, PACKED | types, SPLIT=primed.split, **constants)
    else:
        build(primed_kernels.gated_kernel, 4, True, PACKED | types, SQUARES=32, ACT="silu", **constants)


def panels() -> Iterator[None]:
    """Every panel of PANELS."""
    for panel in dict.fromkeys(panel for choices in PANELS.values() for _, panel in choices if panel is not None):
        (main, rest), depth = panel.widths, panel_gemm.DEPTH
        types = {"x_blocks": swizzled(panel_gemm.ROWS, depth), "w_blocks": swizzled(2, main, depth), "out": "*bf16"}
        yield build(
            panel_kernels.panel_kernel, panel_gemm.WARPS, True, types | {"rest_blocks": swizzled(2, rest, depth)},
            BM=panel_gemm.ROWS, BN=main, RN=rest, BK=depth, STAGES=panel.stages, ACT="silu",
        )  # fmt: skip


def swizzled(*block: int) -> str:
    """The type of a descriptor of primed_gemm.blocks_of."""
    layout = gl.NVMMASharedLayout.get_default_for(list(block), gl.bfloat16)
    return f"tensordesc<bf16[{','.join(map(str, block))}],{layout!r}>"


def blocks(rows: int, outputs: int, depth: int) -> dict[str, str]:
    """The types of descriptors."""
    return {name: f"tensordesc<bf16[{size}, {depth}]>" for name, size in (("x_blocks", rows), ("w_blocks", outputs))}


def epilogue_of(case: Case) -> dict[str, Any]:
    """The constants that say what follows a product."""
    heads, add, gated = (case.follows == name for name in ("heads", "add", "gated"))
    constants: dict[str, Any] = {
        "BIAS": heads, "SQUARES": 0 if add else 64, "ACT": "silu" if gated else "", "ADD": add, "HEADS": heads,
        "D": case.head_dim if heads else 0, "QK_NORM": False, "ROTATE": heads, "INTERLEAVED": False, "KV_LIMIT": 0,
        "PDL": True, "qk_gains": None, "qk_eps": 0.0,
    }  # fmt: skip
    if not heads:
        constants |= dict.fromkeys(("bias", "table", "slots", "kv")) | {"kv_stride": 0, "heads": 0, "kv_heads": 0}
    if not add:
        constants |= dict.fromkeys(("residual", "gain", "new_residual", "new_squares")) | {"scale": 1.0}
    return constants


def quantized() -> Iterator[None]:
    """GEMMs with quantized weights, each kind and each epilogue, and the kernels for many rows."""
    no_heads = dict.fromkeys(("qk_gains", "table", "slots", "kv"))
    no_heads |= {"qk_eps": 0.0, "kv_stride": 0, "heads": 0, "kv_heads": 0, "HEADS": False, "D": 0, "ROTATE": False}
    no_add: dict[str, Any] = dict.fromkeys(("residual", "gain", "new_residual", "new_squares"))
    no_add |= {"scale": 1.0, "ADD": False}
    plain = {"QK_NORM": False, "INTERLEAVED": False, "KV_LIMIT": 0, "BF16": True, "ASM": True, "EVEN": True}
    plain |= {"CHUNK": 32, "ROWS": 16, "AHEAD": 8, "WHOLE": 0, "SLICES": 1}
    heads = {"HEADS": True, "D": 128, "ROTATE": True, "BIAS": True, "qk_gains": None}
    tile = {"BM": 16, "BN": 128, "BK": 32, "SPLIT": 4, "STAGES": 4, "ACT": "", "PDL": True, "SQUARES": 32}
    cases: list[dict[str, Any]] = [
        no_add | heads | {"KIND": "int4", "GROUP": 128, "BM": 8, "BN": 32, "SLICES": 4, "SPLIT": 1, "parts": None},
        no_heads | no_add | {"KIND": "int4", "GROUP": 32, "ACT": "silu", "BN": 64, "SPLIT": 1, "parts": None},
        no_heads | no_add | {"KIND": "int8", "GROUP": 0, "BK": 64, "BM": 64, "PDL": False, "EVEN": False},
        no_heads | {"KIND": "int4", "GROUP": 128, "ADD": True, "SQUARES": 0, "squares": None},
        no_heads | no_add | {"KIND": "fp8", "GROUP": 0, "BM": 8, "BN": 32, "BK": 64, "SLICES": 4},
        no_add | heads | {"KIND": "int4", "GROUP": 128},
        no_heads | no_add | {"KIND": "fp8", "GROUP": 0, "BK": 64, "ACT": "silu", "BN": 64},
    ]
    thorough = "TESTS_THOROUGH" in os.environ
    for case in cases if thorough else cases[:3]:
        own = plain | tile | ({} if case.get("BIAS") else {"BIAS": False, "bias": None}) | case
        types = PACKED | {"meta": "*i32" if own["KIND"] == "int4" else "*fp32"}
        aligned = own["SLICES"] > 1
        ptx = build(packed_kernels.packed_kernel, 8 if own["BM"] > 32 else 4, own["PDL"], types, 4, aligned, **own)
        if own["SLICES"] > 1:  # compilers move loads, and there the order counts
            assert "cp.async.cg" in ptx, "words are not asked for before the wait"
            assert ptx.count("ld.global.v4") == (4 if own["KIND"] == "int4" else 2) * own["BK"] // 32, "x is"
        yield
    for kind, group in (("int4", 128), ("int8", 0))[: 2 if thorough else 1]:
        types = PACKED | {"meta": "*i32" if kind == "int4" else "*fp32"}
        yield build(
            packed_kernels.unpack_kernel, 4, False, types, KIND=kind, GROUP=group, CHUNK=32, ROWS=16, BF16=True, BN=64
        )
    types = PACKED | {"out": "*fp8e4nv"}
    for group, block in ((0, 4096), (128, 2048))[: 2 if thorough else 1]:
        own = {
            "GROUP": group,
            "BLOCK": block,
            "STATIC": False,
            "static": None,
            "ACT": "" if group else "silu",
            "PDL": True,
        }
        yield build(float8_kernels.quantise_rows_kernel, 8, False, types, **own)
    own = {"GROUP": 0, "BLOCK": 4096, "STATIC": False, "static": None, "PDL": True}
    yield build(float8_kernels.norm_quantise_kernel, 8, True, types | {"delta": "*bf16", "weight": "*bf16"}, **own)
    types = PACKED | {"x": "*fp8e4nv", "w": "*fp8e4nv"}
    own = no_heads | no_add | tile | {"BM": 64, "BN": 64, "BK": 128, "SPLIT": 4, "WHOLE": 264, "ACT": "silu"}
    own |= {"QK_NORM": False, "INTERLEAVED": False, "KV_LIMIT": 0, "BIAS": False, "bias": None, "SQUARES": 0}
    for group in (0, 128)[: 2 if thorough else 1]:
        yield build(float8_kernels.float8_kernel, 4, True, types, 4, GROUP=group, squares=None, EVEN=True, **own)
    own = {"BM": 128, "BN": 128, "BIAS": False, "bias": None, "STAGES": 4}
    yield build(float8_kernels.blockwise_kernel, 8, False, types, 4, **own)


def rows() -> Iterator[None]:
    """Every OneRow of the table with what follows its product; without TESTS_THOROUGH one of each kind and epilogue."""
    follows = {(case.outputs, case.inputs): case for case in cases("qwen2-7b")}
    seen = set()
    for (kind, outputs, inputs), choices in QUANTIZED.items():
        case, choice = follows[outputs, inputs], choices[0][1]
        if isinstance(choice, OneRow) and ("TESTS_THOROUGH" in os.environ or (kind, case.follows) not in seen):
            seen.add((kind, case.follows))
            yield one_row(case, kind, choice)


def shared_blocks(element: str, shape: list[int], swizzle: int, bits: int) -> str:
    """The type of a descriptor that says how blocks lie in shared memory."""
    layout = gl.NVMMASharedLayout(swizzle, bits, rank=len(shape))
    return f"tensordesc<{element}[{','.join(map(str, shape))}],{layout!r}>"


def one_row(case: Case, kind: str, choice: OneRow) -> None:
    """A configuration as row_gemm.multiply launches it, with PDL."""
    constants = choice.constants(case.outputs, case.inputs, case.follows == "gated")
    four, width = kind == "int4", constants["BN"]
    types = PACKED | {
        "w_blocks": shared_blocks("fp8e4nv", [width, choice.depth], 128, 8),
        "meta": "*fp32",
        "slots": "*i32",
    }
    if four:
        groups = choice.depth // 128
        types["w_blocks"] = shared_blocks("i8", [groups, width // 16, 16, 64], 64, 8)
        types["meta"] = shared_blocks("i32", [groups, width], 0, 32)
    constants |= epilogue_of(case) | {"FOUR": four}
    own = {n: value for n, value in constants.items() if n in row_kernels.row_kernel.arg_names}
    build(row_kernels.row_kernel, 4, True, types, aligned=True, **own)


def wides() -> Iterator[None]:
    """Every Wide of the table."""
    for (_, outputs, inputs), choices in QUANTIZED.items():
        for choice in (choice for _, choice in choices if isinstance(choice, Wide)):
            half = wide_gemm.STEP // 2
            types = PACKED | {
                "x_blocks": shared_blocks("bf16", [2, choice.rows, half], 128, 16),
                "w_blocks": shared_blocks("i16", [2, 2, 2, 4, half], 128, 16),
                "meta_blocks": shared_blocks("i32", [1, 2, wide_gemm.PAIRS], 0, 32),
            }
            constants = choice.constants(outputs, inputs) | {"SQUARES": 64, "ACT": "silu", "PDL": True}
            yield build(wide_kernels.wide_kernel, 4, True, types, aligned=True, **constants)


def experts() -> Iterator[None]:
    """A router, who is whose, both products and their sum."""
    names = {**dict.fromkeys("x w out y shared gate".split(), "*bf16"), "cap": "fp32"}
    names |= {**dict.fromkeys("ids queues counts".split(), "*i32"), "scale": "fp32"}
    names |= dict.fromkeys("router bias weights".split(), "*fp32")
    flags = {"SOFTMAX": True, "BIAS": False, "bias": None, "RENORM": True, "CAP": False}
    yield build(moe_kernels.route_kernel, 8, False, names, E=64, K=8, BK=128, **flags)
    yield build(moe_kernels.queue_kernel, 4, False, names, BLOCK=512)
    for act, tile in (("silu", moe_gemm.GATE_UP), ("", moe_gemm.DOWN)):
        own = {"BN": tile.outputs, "BK": tile.depth, "STAGES": tile.stages, "ACT": act, "OF_TOKENS": bool(act)}
        yield build(moe_kernels.experts_kernel, tile.warps, False, names, tile.stages, BM=16, EVEN=True, **own)
    yield build(moe_kernels.mix_kernel, 4, False, names, BLOCK=1024, SHARED=True, GATE=True)


PARTS = {
    part.__name__: part
    for part in (sampler, attention, latents, layers, gemms, panels, quantized, rows, wides, experts)
}

if __name__ == "__main__":
    for name in sys.argv[1:] or PARTS:
        for _ in PARTS[name]():
            pass
