"""A Mixture-of-Experts Transformer in float64 over a whole prompt, written as its papers have it: no cache, no batch.

The reference of families that transformers has no code for: Grok-1 and the first DeepSeek. Weights are by our names.
"""

from typing import Any

import torch
from torch import Tensor

Weights = dict[str, Tensor]


def rms(x: Tensor, weight: Tensor, eps: float = 1e-5) -> Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight


def rotated(x: Tensor, theta: float = 10000.0) -> Tensor:
    """x [tokens, heads, head_dim]"""
    half = x.shape[-1] // 2
    angle = torch.arange(len(x), dtype=torch.float64)[:, None] * theta ** (
        -torch.arange(half, dtype=torch.float64) / half
    )
    turned = (
        torch.view_as_complex(torch.stack((x[..., :half], x[..., half:]), -1))
        * torch.polar(torch.ones_like(angle), angle)[:, None]
    )
    return torch.cat((turned.real, turned.imag), -1)


def capped(x: Tensor, cap: float | None) -> Tensor:
    return x if cap is None else torch.tanh(x / cap) * cap


def attention(x: Tensor, w: Weights, heads: int, kv_heads: int, scale: float, cap: float | None) -> Tensor:
    q, k, v = (x @ w[f"self_attn.{name}_proj.weight"].T for name in "qkv")
    q, k, v = (y.view(len(x), n, -1) for y, n in ((q, heads), (k, kv_heads), (v, kv_heads)))
    k, v = rotated(k).repeat_interleave(heads // kv_heads, 1), v.repeat_interleave(heads // kv_heads, 1)
    scores = capped(torch.einsum("qhd,khd->hqk", rotated(q), k) * scale, cap)
    future = torch.ones(len(x), len(x), dtype=torch.bool).triu(1)
    attended = torch.einsum("hqk,khd->qhd", scores.masked_fill(future, -torch.inf).softmax(-1), v)
    return attended.flatten(1) @ w["self_attn.o_proj.weight"].T


def mlp(x: Tensor, w: Weights, prefix: str, act: Any) -> Tensor:
    gate, up, down = (w[f"{prefix}{name}_proj.weight"] for name in ("gate", "up", "down"))
    return (act(x @ gate.T) * (x @ up.T)) @ down.T


def experts(x: Tensor, w: Weights, top_k: int, act: Any, cap: float | None, shared: bool) -> Tensor:
    scores = capped(x @ w["mlp.gate.weight"].T, cap).softmax(-1)
    out = mlp(x, w, "mlp.shared_experts.", act) if shared else torch.zeros_like(x)
    for token in range(len(x)):
        for expert in scores[token].argsort(descending=True)[:top_k].tolist():
            one = mlp(x[token : token + 1], w, f"mlp.experts.{expert}.", act)
            out[token] += scores[token, expert] * one[0]
    return out
