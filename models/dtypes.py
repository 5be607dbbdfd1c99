"""Which dtype a model computes in: what --dtype says, its checkpoint, and what the device multiplies fast.

Used by weights.py and `actorserve doctor`. Weights may have fewer bits than hidden states have: checkpoints of 16 bits
beneath float32, on a CPU (cpu_ops.py) and on a GPU (split_linear.py).
"""

from pathlib import Path
from typing import Any, Final

import torch

from ..errors import StartupError
from .cpu_kernels import cpu_kernels_or_none
from .spec import Spec

DTYPES: Final = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def pick_dtype(name: str, facts: dict[str, Any], device: torch.device, sparse: bool = False) -> torch.dtype:
    """Resolve `EngineConfig.dtype`. auto: the checkpoint's on a GPU; on a CPU what it multiplies fastest.

    That is float32 by our kernels, which take weights of 16 bits as they are, bfloat16 with matrix instructions (AMX).
    Where ours do not multiply, experts (`sparse`) or no compiler, it is bfloat16 if the CPU has instructions for that.
    bfloat16 is for ours, too: of the inputs and weights of products, between which all is float32.
    """
    ours = device.type == "cpu" and not sparse and cpu_kernels_or_none() is not None
    if ours and name in ("auto", "bfloat16"):
        return torch.float32
    if name != "auto":
        return DTYPES[name]
    if device.type != "cpu":
        return own_dtype(facts) or torch.bfloat16
    features = cpu_features()
    return torch.bfloat16 if features & {"amx_bf16", "avx512_bf16"} else torch.float32


def computes_on_cpu_kernels(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a model runs on our C kernels."""
    return device.type == "cpu" and dtype == torch.float32 and cpu_kernels_or_none() is not None


def own_dtype(facts: dict[str, Any]) -> torch.dtype | None:
    """The dtype that config.json names."""
    return DTYPES.get(str(facts.get("dtype") or facts.get("torch_dtype")))


def check_dtype(spec: Spec, device: torch.device, dtype: torch.dtype) -> None:
    """Raise StartupError where torch's grouped GEMM, which experts run on, would wait for the host at each call."""
    if spec.moe is not None and device.type == "cuda" and dtype != torch.bfloat16:
        raise StartupError("a model with experts runs on a GPU in bfloat16 only; take --dtype bfloat16")


def cpu_features() -> set[str]:
    """What the CPU can do, in Linux' words; nothing where that is not known."""
    try:
        return set(Path("/proc/cpuinfo").read_text().split("flags", 1)[1].split("\n", 1)[0].split())
    except (OSError, IndexError):
        return set()
