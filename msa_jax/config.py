"""Architecture configuration: frozen dataclasses that say which field is wrong and how to mend it.

These describe a model and nothing else; what a training run adds (data, optimizer, mesh) is in
`msa_jax.train.config`. Symbols follow `docs/architecture.md`: Hq query heads, Hkv KV heads,
D head dim, Di index dim, Bk block size, K blocks kept per query and KV group.
"""

import dataclasses
from typing import Literal

from msa_jax.mixer_config import LinearConfig, Mamba2Config, MLAConfig
from msa_jax.validation import ConfigError as ConfigError
from msa_jax.validation import require, require_choice

MixerKind = Literal[
    "msa", "gqa", "mha", "sliding_window", "longformer", "bigbird", "mla", "linear", "mamba2"
]
Pooling = Literal["max", "lse", "mean"]
IndexPrecision = Literal["native", "int8"]
Selector = Literal["learned", "strided", "random", "sink_window", "oracle"]
Activation = Literal["swiglu", "swiglu_oai"]
Router = Literal["sigmoid", "softmax"]
Remat = Literal["none", "full", "save_selection", "attention", "dots"]


@dataclasses.dataclass(frozen=True)
class AttentionConfig:
    """One token mixer: MSA by default, or one of the baselines of `docs/mixers.md`.

    A dense twin is the same config with another `kind`: it ignores the fields of blocks.
    `kind="mla"`, "linear" and "mamba2" have fields of their own in the section of their name.

    Attributes:
      kind: which mixer to build. "msa" learns which blocks to attend to; "gqa" and "mha" attend to
        everything, "sliding_window" to the last tokens, "longformer" and "bigbird" to blocks of a
        fixed pattern.
      num_heads: Hq.
      num_kv_heads: Hkv, the number of groups; divides `num_heads`. `kind="mha"` takes `num_heads`
        instead: see `kv_heads`.
      head_dim: D.
      rope_dim: how many leading dims of each head rotate (partial RoPE); 0 turns RoPE off.
      rope_theta: RoPE base.
      qk_norm: per-head RMSNorm with gain (1 + w) on q and k before RoPE.
      window: `kind="sliding_window"`, 0 elsewhere: the last tokens that a query sees, its own too.
      block_size: Bk, tokens per block.
      top_k: K, blocks kept per query and group, the forced ones included.
      index_dim: Di.
      index_norm: per-head RMSNorm on index queries and keys.
      index_rope: partial RoPE on index queries and keys, `min(rope_dim, index_dim)` dims.
      num_local_blocks: the query's own block and the ones just before it that are always kept.
      num_sink_blocks: leading blocks of the document that are always kept; at least one for the
        kinds "longformer" and "bigbird" and the selector "sink_window".
      num_random_blocks: `kind="bigbird"`, 0 elsewhere: the blocks of `top_k` that are drawn.
      pooling: token scores to block score.
      index_precision: "native" selects by index queries and keys as they are, "int8" rounds them to
        8 bits first, for speed; their training does not see the rounding.
      selector: how `kind="msa"` chooses the free blocks. All but "learned" train no index branch:
        "strided" and "random" ones, "sink_window" the nearest, "oracle" those with the most dense
        attention.
      share_every: `kind="msa"`: a layer computes a selection, the next `share_every - 1` reuse it.
      detach_index_input: stop_gradient on the index branch's input (False diverges: an ablation).
      implementation: kernel implementation for all attention ops; "auto" takes the best there is.
      mla: `kind="mla"` only.
      linear: `kind="linear"` only.
      mamba2: `kind="mamba2"` only.
    """

    kind: MixerKind = "msa"
    num_heads: int = 64
    num_kv_heads: int = 4
    head_dim: int = 128
    rope_dim: int = 64
    rope_theta: float = 5e6
    qk_norm: bool = True
    window: int = 0
    block_size: int = 128
    top_k: int = 16
    index_dim: int = 128
    index_norm: bool = True
    index_rope: bool = True
    num_local_blocks: int = 1
    num_sink_blocks: int = 0
    num_random_blocks: int = 0
    pooling: Pooling = "max"
    index_precision: IndexPrecision = "native"
    selector: Selector = "learned"
    share_every: int = 1
    detach_index_input: bool = True
    implementation: str = "auto"
    mla: MLAConfig = dataclasses.field(default_factory=MLAConfig)
    linear: LinearConfig = dataclasses.field(default_factory=LinearConfig)
    mamba2: Mamba2Config = dataclasses.field(default_factory=Mamba2Config)

    def __post_init__(self):
        require_choice("attention.kind", self.kind, MixerKind)
        require_choice("attention.pooling", self.pooling, Pooling)
        require_choice("attention.index_precision", self.index_precision, IndexPrecision)
        require_choice("attention.selector", self.selector, Selector)
        positive = ("num_heads", "num_kv_heads", "head_dim", "block_size", "top_k", "index_dim")
        for name in (*positive, "share_every"):
            self._require(getattr(self, name) >= 1, name, "must be >= 1")
        self._require(
            self.num_heads % self.kv_heads == 0,
            "num_kv_heads",
            f"must divide attention.num_heads={self.num_heads}",
        )
        self._require(
            self.rope_dim % 2 == 0 and 0 <= self.rope_dim <= self.head_dim,
            "rope_dim",
            f"must be even and between 0 and attention.head_dim={self.head_dim}",
        )
        self._require(
            not self.index_rope or self.index_rope_dim % 2 == 0,
            "index_dim",
            "must be even where index_rope rotates all of it",
        )
        self._check_reach()

    def _check_reach(self):
        """That window and blocks suit the kind, and that `top_k` holds the blocks always kept."""
        for name, kind in (("window", "sliding_window"), ("num_random_blocks", "bigbird")):
            if self.kind == kind:
                self._require(getattr(self, name) >= 1, name, f'must be >= 1 for kind="{kind}"')
            else:
                mend = f'must be 0 for kind="{self.kind}"; it belongs to kind="{kind}"'
                self._require(getattr(self, name) == 0, name, mend)
        self._require(
            self.num_local_blocks >= 1,
            "num_local_blocks",
            "must be >= 1: a query always sees its own block",
        )
        pattern = self.selector if self.kind == "msa" else self.kind
        least = 1 if pattern in ("sink_window", "longformer", "bigbird") else 0
        self._require(
            self.num_sink_blocks >= least, "num_sink_blocks", f'must be >= {least} for "{pattern}"'
        )
        forced = self.num_local_blocks + self.num_sink_blocks + self.num_random_blocks
        self._require(
            forced <= self.top_k,
            "top_k",
            f"must hold the {forced} forced blocks (num_local_blocks + num_sink_blocks + "
            "num_random_blocks)",
        )

    def _require(self, condition: bool, name: str, mend: str):
        require(condition, f"attention.{name}", getattr(self, name), mend)

    @property
    def kv_heads(self) -> int:
        """Hkv of what is built: `num_kv_heads`, or for multi-head attention one per query head."""
        return self.num_heads if self.kind == "mha" else self.num_kv_heads

    @property
    def selects_blocks(self) -> bool:
        """Whether a query attends to `top_k` blocks, learned ones or those of a fixed pattern."""
        return self.kind in ("msa", "longformer", "bigbird")

    @property
    def shared_layers(self) -> int:
        """Neighbouring layers that share one selection."""
        return self.share_every if self.kind == "msa" else 1

    @property
    def dense(self) -> "AttentionConfig":
        """The same heads attending to everything; itself where they already do."""
        if self.kind in ("gqa", "mha"):
            return self
        return dataclasses.replace(self, kind="gqa", window=0, num_random_blocks=0)

    @property
    def index_rope_dim(self) -> int:
        """Dims of the index branch that rotate: `rope_dim` truncated to `index_dim`."""
        return min(self.rope_dim, self.index_dim) if self.index_rope else 0

    @property
    def mla_value_dim(self) -> int:
        """Dims of each value head of `kind="mla"`."""
        return self.mla.value_dim or self.head_dim

    @property
    def linear_value_dim(self) -> int:
        """Dims of each value head of `kind="linear"`."""
        return self.linear.value_dim or self.head_dim

    @property
    def learns_selection(self) -> bool:
        """Whether a layer of this kind has an index branch to train."""
        return self.kind == "msa" and self.selector == "learned"


@dataclasses.dataclass(frozen=True)
class MoEConfig:
    """Mixture-of-experts feed-forward; `num_experts=0` makes every layer dense.

    Attributes:
      num_experts: routed experts per layer.
      top_k: routed experts per token.
      num_shared_experts: experts that every token visits, fused into one feed-forward.
      expert_dim: inner width of one expert.
      router: "sigmoid" chooses by score + a learned-free selection bias and weighs by the
        renormalised scores; "softmax" renormalises the chosen probabilities and has a balance loss.
      routed_scale: factor on the routed experts' output.
      balance_weight: weight of the softmax router's load-balance loss.
      bias_update_rate: step of the sigmoid router's selection bias toward equal load; 0 freezes it.
    """

    num_experts: int = 128
    top_k: int = 4
    num_shared_experts: int = 1
    expert_dim: int = 3072
    router: Router = "sigmoid"
    routed_scale: float = 2.0
    balance_weight: float = 0.01
    bias_update_rate: float = 0.001

    def __post_init__(self):
        require_choice("moe.router", self.router, Router)
        require(
            self.num_experts >= 0, "moe.num_experts", self.num_experts, "must be >= 0 (0: dense)"
        )
        if self.num_experts == 0:
            return
        require(
            1 <= self.top_k <= self.num_experts,
            "moe.top_k",
            self.top_k,
            f"must be between 1 and moe.num_experts={self.num_experts}",
        )
        require(self.expert_dim >= 1, "moe.expert_dim", self.expert_dim, "must be >= 1")
        require(
            self.num_shared_experts >= 0,
            "moe.num_shared_experts",
            self.num_shared_experts,
            "must be >= 0",
        )
        for name in ("balance_weight", "bias_update_rate"):
            require(getattr(self, name) >= 0, f"moe.{name}", getattr(self, name), "must be >= 0")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The trunk: a pre-norm decoder-only transformer.

    Attributes:
      vocab_size: token ids are below it.
      d_model: residual width.
      num_layers: decoder layers.
      num_dense_layers: leading layers whose feed-forward is dense (all of them without experts).
      num_full_attention_layers: leading layers with dense attention whatever `attention.kind` says.
      ffn_dim: inner width of the dense feed-forward.
      activation: "swiglu", or "swiglu_oai" with its clamps and (up + 1) gate.
      norm_eps: epsilon of every RMSNorm.
      tie_embeddings: the output head is the embedding transposed.
      compute_dtype: activations and matmul inputs.
      param_dtype: parameters and optimizer state.
      scan_layers: `lax.scan` over equal layers; False unrolls (same numbers, for debugging).
      remat: which activations the backward pass recomputes, see `msa_jax.model.remat_policy`.
    """

    vocab_size: int = 256
    d_model: int = 2048
    num_layers: int = 16
    num_dense_layers: int = 0
    num_full_attention_layers: int = 0
    ffn_dim: int = 8192
    activation: Activation = "swiglu"
    norm_eps: float = 1e-6
    tie_embeddings: bool = False
    compute_dtype: str = "bfloat16"
    param_dtype: str = "float32"
    scan_layers: bool = True
    remat: Remat = "none"

    def __post_init__(self):
        require_choice("model.activation", self.activation, Activation)
        require_choice("model.remat", self.remat, Remat)
        for name in ("vocab_size", "d_model", "num_layers", "ffn_dim"):
            require(getattr(self, name) >= 1, f"model.{name}", getattr(self, name), "must be >= 1")
        for name in ("num_dense_layers", "num_full_attention_layers"):
            require(
                0 <= getattr(self, name) <= self.num_layers,
                f"model.{name}",
                getattr(self, name),
                f"must be between 0 and model.num_layers={self.num_layers}",
            )
        for name in ("compute_dtype", "param_dtype"):
            dtypes = ("bfloat16", "float16", "float32", "float64")
            require(
                getattr(self, name) in dtypes,
                f"model.{name}",
                getattr(self, name),
                f"choose one of {', '.join(dtypes)}",
            )


@dataclasses.dataclass(frozen=True)
class ArchitectureConfig:
    """Everything that determines a model's function and parameters."""

    model: ModelConfig = ModelConfig()
    attention: AttentionConfig = AttentionConfig()
    moe: MoEConfig = MoEConfig()

    def attention_of(self, layer: int) -> AttentionConfig:
        """The mixer of one layer: dense attention in the leading full-attention layers."""
        full = layer < self.model.num_full_attention_layers
        return self.attention.dense if full else self.attention

    def has_experts(self, layer: int) -> bool:
        """Whether this layer's feed-forward is a mixture of experts."""
        return self.moe.num_experts > 0 and layer >= self.model.num_dense_layers

    def computes_selection(self, layer: int) -> bool:
        """Whether this layer selects its own blocks (the others reuse the last selection)."""
        first = self.model.num_full_attention_layers
        mixer = self.attention_of(layer)
        return mixer.selects_blocks and (layer - first) % mixer.shared_layers == 0


def dense_twin[T: ArchitectureConfig](config: T) -> T:
    """The same model with its heads attending to everything and nothing else changed.

    `attention.kind` is "gqa", or stays "mha".
    """
    return dataclasses.replace(config, attention=config.attention.dense)
