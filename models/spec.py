"""Spec: one frozen description of a decoder. families.py makes it from a config.json; all model code reads only this.

A family is data: what distinguishes Llama from Gemma or Command-R is a value here, never an `if model_type`. Values
that no part implements yet are refused by `decoder.check_supported`, never ignored.
Invariant: a Spec is complete; None or () means "the model does not have it", not "look elsewhere".
"""

from dataclasses import dataclass
from typing import Literal

Act = Literal["silu", "gelu", "gelu_tanh"]
"""An activation function; gelu_tanh is GELU's tanh approximation."""


@dataclass(frozen=True, slots=True)
class Norm:
    """A normalisation over the last dimension."""

    kind: Literal["rms", "layer"] = "rms"
    eps: float = 1e-6
    offset: float = 0.0
    """Added to the stored weight (Gemma stores weight - 1)."""
    bias: bool = False


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """How rotary frequencies are stretched beyond the trained context (rope.py has the formulas)."""

    kind: Literal["linear", "llama3", "yarn", "longrope"]
    factor: float
    """Context extension, > 1 stretches."""
    original_max_position: int = 0
    """Trained context in tokens (llama3, yarn)."""
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    """llama3: wavelengths above original / low are divided by `factor`, below original / high kept."""
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    """yarn: rotations over the trained context between which frequencies are blended."""
    truncate: bool = True
    """yarn: round the blend's borders to whole dimensions."""
    attention_factor: float = 1.0
    """Multiplies cos and sin (yarn, longrope); already resolved from mscale."""
    factors: tuple[float, ...] = ()
    """longrope: by what each pair's frequency is divided; those of the context that is served."""


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary position embedding (Su et al. 2021)."""

    theta: float
    dim: int
    """Rotated leading part of each head, in elements; even, <= head_dim."""
    interleaved: bool = False
    """Pairs are (2i, 2i+1) instead of (i, i + dim/2)."""
    scaling: RopeScaling | None = None
    sections: tuple[int, int, int] | None = None
    """A token of an image has three positions, its frame's, row's and column's: so many pairs turn by each (M-RoPE,
    Qwen2-VL, 2024, section 2.1). They are dim / 2 together."""


@dataclass(frozen=True, slots=True)
class Mla:
    """Multi-head latent attention (DeepSeek-V2, 2024, section 2.1); widths in elements.

    We run its absorbed form: what is cached, and attended to by all query heads, is one row of kv_rank + rope a token.
    So a Spec with it has kv_heads = 1 and head_dim = kv_rank + rope.
    """

    q_rank: int | None
    """Width of the queries' latent; None: they are projected at once."""
    kv_rank: int
    """Width of the latent that keys and values are made of."""
    nope: int
    rope: int
    """Parts of a query and key head, without and with rope."""
    v: int
    """Width of a value head."""
    eps: float = 1e-6
    """Of the latents' RMS norms."""


@dataclass(frozen=True, slots=True)
class Moe:
    """Mixture of experts in the MLP's place."""

    experts: int
    top_k: int
    inter: int
    """Hidden width of one expert."""
    layers: tuple[bool, ...]
    """[layers] which layers are sparse."""
    scoring: Literal["softmax", "sigmoid"] = "softmax"
    """How the router's logits become weights."""
    score_bias: bool = False
    """A learned bias of each expert is added to its score for the choice, not for its weight (DeepSeek-V3)."""
    renorm: bool = True
    """The chosen experts' weights are divided by their sum."""
    groups: int = 1
    top_groups: int = 1
    """The experts are in `groups` of equal size, and only those of the `top_groups` best ones can be chosen."""
    group_best: int = 1
    """A group is as good as the sum of its so many best scores."""
    routed_scale: float = 1.0
    """Factor of the chosen experts' weights."""
    shared_inter: int = 0
    """Width of the expert that every token visits; 0: none."""
    shared_gate: bool = False
    """What the shared expert says is multiplied with the sigmoid of a learned gate."""
    router_softcap: float | None = None
    """logits = cap * tanh(logits / cap)."""


@dataclass(frozen=True, slots=True)
class Score:
    """A classification head in the place of the language model's: from one hidden state to a logit for each label."""

    labels: int
    bias: bool = False
    dense: Literal["tanh", "relu"] | None = None
    """logits = labels(act(dense(x))), hidden to hidden with a bias; None: labels(x)."""


@dataclass(frozen=True, slots=True)
class Spec:
    """A transformer of one stack of layers: a decoder, or with `causal` False an encoder.

    Widths in elements, lengths in tokens.
    """

    vocab: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    inter: int

    norm: Norm = Norm()
    qk_norm: Norm | None = None
    """Normalises each query and key head before rope."""
    qk_norm_shape: Literal["dim", "head", "all"] = "dim"
    """dim: over head_dim, one weight [head_dim]; head: a weight for each head; all: over all heads at once."""

    rope: Rope | None = None
    local_rope: Rope | None = None
    """Rope of the layers with a window, where it differs (Gemma 3)."""
    nope_layers: tuple[bool, ...] = ()
    """[layers] layers without rope; (): none."""
    learned_positions: int = 0
    """Rows of a learned position table added to the embedding (GPT-2)."""
    token_types: int = 0
    """Rows of a table of which the first is added to every embedding (BERT: all tokens are of the first segment)."""
    embed_norm: bool = False
    """Embeddings are normalised before the first layer."""

    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False

    scale: float | None = None
    """Factor of the attention scores; None: head_dim ** -0.5."""
    attn_softcap: float | None = None
    """scores = cap * tanh(scores / cap)."""
    clip_qkv: float | None = None
    """Queries, keys and values are clamped to -clip .. clip."""
    windows: tuple[int | None, ...] = ()
    """[layers] a token sees itself and window - 1 tokens before it; None: all. (): no layer has a window."""
    causal: bool = True
    """False: every token sees all others of its prompt, which must come in one chunk."""

    act: Act = "silu"
    gated: bool = True
    """mlp = down(act(gate(x)) * up(x)), else down(act(up(x)))."""
    layout: Literal["pre", "parallel", "sandwich", "post", "post_sum"] = "pre"
    """Where the norms sit around attention and MLP: before each; before both, which run side by side; before and after
    each; after each; after each one's sum with its input, and then none at the end (the first transformers, BERT)."""

    embed_scale: float = 1.0
    residual_scale: float = 1.0
    """Multiplies what attention and MLP add to the residual stream (Granite)."""
    logit_scale: float = 1.0
    logit_softcap: float | None = None
    tied: bool = False
    """lm_head is the embedding table."""
    lm_head: bool = True
    """False: the model ends in hidden states, for embeddings or `score`."""
    score: Score | None = None

    moe: Moe | None = None
    mla: Mla | None = None

    @property
    def attention_scale(self) -> float:
        return self.head_dim**-0.5 if self.scale is None else self.scale

    @property
    def group(self) -> int:
        """Query heads per KV head."""
        return self.heads // self.kv_heads

    @property
    def kv_parts(self) -> int:
        """Rows that a token's KV is cached as: key and value, or the latent that is both."""
        return 2 if self.mla is None else 1

    @property
    def value_dim(self) -> int:
        """Width of what attention returns for each head: with MLA a sum of latents."""
        return self.head_dim if self.mla is None else self.mla.kv_rank

    def sparse(self, layer: int) -> bool:
        """Whether this layer has experts."""
        return self.moe is not None and self.moe.layers[layer]

    def window(self, layer: int) -> int | None:
        return self.windows[layer] if self.windows else None

    def rotates(self, layer: int) -> bool:
        """Whether this layer applies rope."""
        return self.rope is not None and not (self.nope_layers and self.nope_layers[layer])
