"""actorserve: an LLM serving engine built from actors.

This file runs in every process of the engine, so it imports nothing heavy: the public names are
resolved on first use (PEP 562).
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .config import EngineConfig as EngineConfig
    from .engine import Engine as Engine
    from .outputs import Classification as Classification
    from .outputs import Delta as Delta
    from .outputs import Embedding as Embedding
    from .outputs import Output as Output
    from .sampler.params import SamplingParams as SamplingParams

__version__ = "0.1.0"
__all__ = [
    "Classification", "Delta", "Embedding", "Engine", "EngineConfig", "Output", "SamplingParams", "__version__",
]  # fmt: skip

_HOMES = {
    "Classification": ".outputs",
    "Delta": ".outputs",
    "Embedding": ".outputs",
    "Engine": ".engine",
    "EngineConfig": ".config",
    "Output": ".outputs",
    "SamplingParams": ".sampler.params",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        from importlib import import_module

        return getattr(import_module(_HOMES[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
