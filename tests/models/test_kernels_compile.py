"""Our Triton kernels compile for an H100, in the configurations in which they are launched there (no GPU is needed)."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

PROGRAM = Path(__file__).parent.parent / "support" / "compile_kernels.py"


KERNELS = {
    "scan", "finish_rows", "settle_ranked", "settle_raced", "decode", "prefill", "latent", "rope_kernel",
    "linear_kernel", "whole_kernel", "gated_kernel", "split_kernel", "panel_kernel", "stream_kernel", "attend_kernel",
    "packed_kernel", "unpack_kernel", "quantise_rows_kernel", "blockwise_kernel", "row_kernel", "wide_kernel",
    "norm_quantise_kernel", "float8_kernel", "route_kernel", "queue_kernel", "experts_kernel", "mix_kernel",
}  # fmt: skip
"""What the program compiles, at least."""


def run(code: str, cache: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(cache)}
    return subprocess.run([sys.executable, "-c", code, *arguments], env=environment, capture_output=True, text=True)


def test_all_compile(tmp_path: Path) -> None:
    done = run(f"import runpy; runpy.run_path({str(PROGRAM)!r}, run_name='__main__')", tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert {line.split()[0] for line in done.stdout.splitlines()} >= KERNELS


def test_what_the_interpreter_forgives_is_noticed(tmp_path: Path) -> None:
    code = f"""
import runpy
kernels = runpy.run_path({str(PROGRAM)!r})
kernels["DECODE"].clear()
kernels["build"](kernels["scan_kernels"].finish_rows, 1, SPLITS=6, STOPS=128, FILTERING=False, EDITED=False,
                 CONSTRAINED=False)
"""
    done = run(code, tmp_path)
    assert done.returncode and "power of 2" in done.stderr


def test_float8_inputs_that_are_not_numbers_stay_so(tmp_path: Path) -> None:
    """Or a request would go on with numbers that mean nothing. The interpreter's float8 has no NaN."""
    code = f"""
import runpy
kernels = runpy.run_path({str(PROGRAM)!r})
types = kernels["PACKED"] | {{"out": "*fp8e4nv"}}
ptx = kernels["build"](kernels["float8_kernels"].quantise_rows_kernel, 4, False, types, GROUP=0, BLOCK=512,
                       STATIC=False, static=None, ACT="", PDL=False)
cuts = [line.split()[0] for line in ptx.splitlines() if line.strip().startswith("min.")]
assert cuts and all(cut.startswith("min.NaN.") for cut in cuts), cuts
"""
    done = run(code, tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
