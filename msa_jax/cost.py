"""What a model costs: FLOPs, parameters, caches and decode traffic, from its configuration alone.

Everything is exact integer arithmetic on Python ints, so nothing overflows at a million tokens.

Conventions, used by every function here:
  * A multiply-add is 2 FLOPs. Only matrix products count: norms, RoPE, softmax, top-k, gating
    and the embedding lookup do not.
  * `length` N is one document in tokens. A packed row costs the sum over its documents.
  * Attention counts visible (query, key) pairs: what the mask lets through, not what a kernel
    computes in its tiles.
  * Recurrent mixers count their recurrence's products with the state, not what a chunked algorithm
    computes in their place (`msa_jax.mixer_cost`). Their short convolutions count as projections.
  * Training counts each product once forward and once per needed gradient, and no recomputation,
    neither rematerialised layers nor the scores that a flash-style backward rebuilds.

Symbols are those of `docs/architecture.md`: Hq, Hkv, D, Di, Bk, K.
"""

import dataclasses
from collections.abc import Iterable
from typing import Literal, NamedTuple

from msa_jax import mixer_cost
from msa_jax.config import ArchitectureConfig, AttentionConfig, dense_twin

Phase = Literal["sparse", "warmup"]

TABLE_LENGTHS = tuple(2**n for n in range(13, 21))  # 8K .. 1M tokens


def causal_pairs(length: int) -> int:
    """Pairs (query, key) with key <= query in a document of `length` tokens."""
    return length * (length + 1) // 2


def visible_pairs(attention: AttentionConfig, length: int) -> int:
    """Exact number of (query, key) pairs that one query head of a layer attends to.

    MSA and fixed block patterns: a query in block n sees its own block up to itself and min(n, K -
    1) whole earlier blocks, whichever those are, so the count does not depend on the selection.
    Sliding window: the last `window` tokens. GQA and MHA: everything causal.

    Args:
      attention: one layer's mixer.
      length: tokens of the document.

    Raises:
      ValueError: a recurrent mixer, whose tokens look at no others.
    """
    if attention.kind in mixer_cost.RECURRENT_KINDS:
        raise ValueError(
            f"attention.kind={attention.kind!r}: a recurrent mixer has no pairs of tokens; use "
            "attention_flops"
        )
    if attention.kind == "mla":
        return causal_pairs(length)
    if attention.selects_blocks:
        block, kept = attention.block_size, attention.top_k - 1
        whole, rest = divmod(length, block)
        grown = min(whole, kept)  # blocks 0..grown-1 still see all of their predecessors
        earlier = grown * (grown - 1) // 2 + (whole - grown) * kept
        pairs = earlier * block * block + whole * causal_pairs(block)
        return pairs + rest * min(whole, kept) * block + causal_pairs(rest)
    if attention.kind == "sliding_window":
        full = min(length, attention.window)  # the tokens before these fill the window
        return causal_pairs(full) + (length - full) * attention.window
    return causal_pairs(length)


def visible_tokens(attention: AttentionConfig, length: int) -> int:
    """Tokens the last of `length` tokens attends to, itself included."""
    return visible_pairs(attention, length) - visible_pairs(attention, length - 1)


class AttentionFlops(NamedTuple):
    """Forward FLOPs of one or more attention layers over one sequence, projections excluded."""

    main: int
    index: int

    @property
    def total(self) -> int:
        """Main and index branch together."""
        return self.main + self.index

    @property
    def index_share(self) -> float:
        """The index branch's share of the total."""
        return self.index / self.total


def eq12_flops(attention: AttentionConfig, length: int) -> AttentionFlops:
    """One layer's forward FLOPs by Eq. 12 of the paper (arXiv 2606.13392), as published.

    Dense 2 Hq D N^2; MSA Hkv Di N^2 + 4 Hq D N K Bk. It counts half of N^2 as causal and gives
    every query its full K Bk tokens, so it overcounts queries near the start and the local block.

    Raises:
      ValueError: a mixer that Eq. 12 does not cover.
    """
    heads = attention.num_heads * attention.head_dim
    if attention.kind == "msa":
        budget = attention.top_k * attention.block_size
        index = attention.kv_heads * attention.index_dim * length**2
        return AttentionFlops(4 * heads * length * budget, index)
    if attention.dense != attention:
        raise ValueError(
            f"attention.kind={attention.kind!r}: Eq. 12 is about MSA and full attention; "
            "use attention_flops for the exact count"
        )
    return AttentionFlops(2 * heads * length**2, 0)


def attention_flops(
    attention: AttentionConfig,
    length: int,
    *,
    computes_selection: bool = True,
    d_model: int | None = None,
) -> AttentionFlops:
    """One layer's exact forward FLOPs over a document of `length` tokens.

    The main branch has two products over its visible pairs. The index branch scores every causal
    pair with Hkv heads of Di dims. The "oracle" selector scores with the main heads instead; the
    other selectors and the kinds with a fixed pattern score nothing. Recurrent mixers: see
    `mixer_cost.mixer_flops`.

    Args:
      attention: the layer's mixer.
      length: tokens of the document.
      computes_selection: False for a layer that reuses an earlier selection (`share_every`).
      d_model: width of the model, which `kind="mamba2"` needs.

    Raises:
      ValueError: `kind="mamba2"` without `d_model`.
    """
    if attention.kind in mixer_cost.KINDS:
        return AttentionFlops(mixer_cost.mixer_flops(attention, length, d_model), 0)
    heads = attention.num_heads * attention.head_dim
    per_pair = 0
    if attention.kind == "msa" and computes_selection:
        learned = 2 * attention.kv_heads * attention.index_dim
        per_pair = {"learned": learned, "oracle": 2 * heads}.get(attention.selector, 0)
    main = 4 * heads * visible_pairs(attention, length)
    return AttentionFlops(main, per_pair * causal_pairs(length))


@dataclasses.dataclass(frozen=True)
class ModelFlops:
    """FLOPs of a whole model over one document, by part.

    Attributes:
      projections: q, k, v and output projections, or what a mixer has in their place.
      attention: scores and values of the main branch, or a recurrence.
      index_projections: index query and key projections.
      index_scores: the index branch's scores (in training, the KL's gradient too).
      feed_forward: dense feed-forwards, router, shared experts and the chosen routed experts.
      head: logits of every token.
    """

    projections: int
    attention: int
    index_projections: int
    index_scores: int
    feed_forward: int
    head: int

    @property
    def total(self) -> int:
        """All parts together."""
        return sum(dataclasses.astuple(self))

    @property
    def attention_share(self) -> float:
        """Share of the parts that are attention proper: main-branch and index-branch pairs."""
        return (self.attention + self.index_scores) / self.total


def model_flops(config: ArchitectureConfig, length: int) -> ModelFlops:
    """Forward FLOPs of the whole model over one document of `length` tokens (sparse phase)."""
    pairs = [_layer_pairs(config, layer, length) for layer in range(config.model.num_layers)]
    parameters = parameter_count(config)
    # A weight matrix is one multiply-add per entry and token; norm gains are not matrices.
    per_token = 2 * length
    return ModelFlops(
        projections=per_token * parameters.attention,
        attention=sum(flops.main for flops in pairs),
        index_projections=per_token * parameters.index,
        index_scores=sum(flops.index for flops in pairs),
        feed_forward=per_token * parameters.active_feed_forward,
        head=per_token * config.model.d_model * config.model.vocab_size,
    )


def training_flops(
    config: ArchitectureConfig, length: int, *, phase: Phase = "sparse"
) -> ModelFlops:
    """FLOPs of one training step over one document: forward, backward and KL.

    Ordinary products count three times their forward cost (two gradients). The index branch
    differs: its input is detached, so its projections have one gradient instead of two; and the
    KL, whose scores the forward already has, adds two gradient products over its support only,
    which is the selected pairs in the sparse phase and every causal pair in warm-up. The teacher
    is the main branch's own softmax and costs nothing more.

    Args:
      config: the model; one without index branch is three times `model_flops`.
      length: tokens of the document.
      phase: "sparse", or "warmup" (main branch dense, KL over the whole causal prefix).
    """
    forward = model_flops(config, length)
    attention = forward.attention
    kl_gradient = 0
    for layer in range(config.model.num_layers):
        mixer = config.attention_of(layer)
        if phase == "warmup" and mixer.kind == "msa":
            dense = attention_flops(mixer.dense, length)
            attention += dense.main - attention_flops(mixer, length).main
        if mixer.learns_selection and config.computes_selection(layer):
            support = causal_pairs(length) if phase == "warmup" else visible_pairs(mixer, length)
            kl_gradient += 2 * 2 * mixer.kv_heads * mixer.index_dim * support
    return ModelFlops(
        projections=3 * forward.projections,
        attention=3 * attention,
        index_projections=(2 if config.attention.detach_index_input else 3)
        * forward.index_projections,
        index_scores=forward.index_scores + kl_gradient,
        feed_forward=3 * forward.feed_forward,
        head=3 * forward.head,
    )


class TrainingFlopsPerToken(NamedTuple):
    """Mean training FLOPs of one token, under the two conventions that MFU is quoted in.

    `sparse` is the work this model needs. `dense_equivalent` is the work its dense twin needs for
    the same tokens: an MFU from it compares training speed across the two and may exceed 1.
    """

    sparse: float
    dense_equivalent: float


def training_flops_per_token(
    config: ArchitectureConfig, length: int, *, phase: Phase = "sparse"
) -> TrainingFlopsPerToken:
    """Mean training FLOPs per token of a document of `length` tokens; see `training_flops`."""
    own = training_flops(config, length, phase=phase).total
    return TrainingFlopsPerToken(
        own / length, training_flops(dense_twin(config), length).total / length
    )


def _layer_pairs(config: ArchitectureConfig, layer: int, length: int) -> AttentionFlops:
    return attention_flops(
        config.attention_of(layer),
        length,
        computes_selection=config.computes_selection(layer),
        d_model=config.model.d_model,
    )


@dataclasses.dataclass(frozen=True)
class ParameterCount:
    """Trainable parameters by part, all layers together.

    Attributes:
      embedding: token embedding.
      head: output head; 0 where it is tied to the embedding.
      attention: q, k, v and output projections, or what a mixer has in their place.
      index: index query and key projections.
      norms: every RMSNorm gain, and a mixer's other vectors.
      dense_feed_forward: feed-forwards of the layers without experts.
      router: router matrices (the sigmoid router's selection bias is no trained parameter).
      shared_experts: experts that every token visits.
      routed_experts: all routed experts.
      active_routed_experts: the routed experts that one token visits.
    """

    embedding: int
    head: int
    attention: int
    index: int
    norms: int
    dense_feed_forward: int
    router: int
    shared_experts: int
    routed_experts: int
    active_routed_experts: int

    @property
    def total(self) -> int:
        """All parameters."""
        return self.active - self.active_routed_experts + self.routed_experts

    @property
    def active_feed_forward(self) -> int:
        """Feed-forward parameters that one token uses, router included."""
        return (
            self.dense_feed_forward + self.router + self.shared_experts + self.active_routed_experts
        )

    @property
    def active_non_embedding(self) -> int:
        """Parameters that one token uses, embedding and output head left out."""
        return self.attention + self.index + self.norms + self.active_feed_forward

    @property
    def active(self) -> int:
        """Parameters that one token uses, the whole embedding and output head counted."""
        return self.active_non_embedding + self.embedding + self.head


def parameter_count(config: ArchitectureConfig) -> ParameterCount:
    """Parameters of the model that `msa_jax.Transformer(config)` builds, counted analytically."""
    model, moe = config.model, config.moe
    layers = range(model.num_layers)
    mixers = [config.attention_of(layer) for layer in layers]
    indexed = [
        mixer
        for layer, mixer in zip(layers, mixers, strict=True)
        if mixer.learns_selection and config.computes_selection(layer)
    ]
    moe_layers = sum(config.has_experts(layer) for layer in layers)
    expert = 3 * model.d_model * moe.expert_dim  # gate, up, down
    mixer_parts = [_mixer_parameters(mixer, model.d_model) for mixer in mixers]
    gains = sum(2 * model.d_model + part.vectors for part in mixer_parts) + model.d_model
    gains += sum(2 * mixer.index_dim * mixer.index_norm for mixer in indexed)
    return ParameterCount(
        embedding=model.vocab_size * model.d_model,
        head=0 if model.tie_embeddings else model.vocab_size * model.d_model,
        attention=sum(part.matrices for part in mixer_parts),
        index=sum(model.d_model * (mixer.kv_heads + 1) * mixer.index_dim for mixer in indexed),
        norms=gains,
        dense_feed_forward=(model.num_layers - moe_layers) * 3 * model.d_model * model.ffn_dim,
        router=moe_layers * model.d_model * moe.num_experts,
        shared_experts=moe_layers * moe.num_shared_experts * expert,
        routed_experts=moe_layers * moe.num_experts * expert,
        active_routed_experts=moe_layers * moe.top_k * expert,
    )


def _mixer_parameters(mixer: AttentionConfig, d_model: int) -> mixer_cost.MixerParameters:
    """Of one layer, without its index branch."""
    if mixer.kind in mixer_cost.KINDS:
        return mixer_cost.mixer_parameters(mixer, d_model)
    matrices = 2 * d_model * (mixer.num_heads + mixer.kv_heads) * mixer.head_dim
    return mixer_cost.MixerParameters(matrices, 2 * mixer.head_dim * mixer.qk_norm)


def decode_bytes(
    attention: AttentionConfig,
    length: int,
    *,
    computes_selection: bool = True,
    dtype_bytes: int = 2,
    d_model: int | None = None,
) -> int:
    """Bytes of cache that one layer reads to decode the last of `length` tokens, batch 1.

    Keys and values of the tokens that the token sees, and every key that a selection scores: index
    keys, or for the "oracle" selector the main ones. A group reads only its own KV head, so groups
    that select different blocks read no more than groups that agree. Latent and recurrent mixers
    read all that they keep.

    Args:
      attention: the layer's mixer.
      length: tokens in the cache, the new one included.
      computes_selection: False for a layer that reuses an earlier selection (`share_every`).
      dtype_bytes: bytes of one cached number; states have 4.
      d_model: width of the model, which `kind="mamba2"` needs.

    Raises:
      ValueError: `kind="mamba2"` without `d_model`.
    """
    if attention.kind in mixer_cost.KINDS:
        return mixer_cost.mixer_cache_bytes(attention, length, d_model, dtype_bytes=dtype_bytes)
    keys = attention.kv_heads * attention.head_dim
    scored = 0
    if attention.kind == "msa" and computes_selection:
        scored = {"learned": attention.index_dim, "oracle": keys}.get(attention.selector, 0)
    return dtype_bytes * (2 * keys * visible_tokens(attention, length) + scored * length)


def kv_cache_bytes(config: ArchitectureConfig, length: int, *, dtype_bytes: int = 2) -> int:
    """Bytes of keys and values of all layers for one sequence of `length` tokens.

    Every kind keeps all tokens, a sliding window and fixed patterns too: `KVCache` is contiguous.
    Or of the latents or states that a mixer keeps in their place.
    """

    def layer_bytes(mixer: AttentionConfig) -> int:
        if mixer.kind in mixer_cost.KINDS:
            width = config.model.d_model
            return mixer_cost.mixer_cache_bytes(mixer, length, width, dtype_bytes=dtype_bytes)
        return dtype_bytes * 2 * mixer.kv_heads * mixer.head_dim * length

    return sum(layer_bytes(config.attention_of(n)) for n in range(config.model.num_layers))


def index_cache_bytes(config: ArchitectureConfig, length: int, *, dtype_bytes: int = 2) -> int:
    """Bytes of index keys of all layers for one sequence of `length` tokens."""
    per_token = sum(
        config.attention_of(layer).index_dim
        for layer in range(config.model.num_layers)
        if config.attention_of(layer).learns_selection and config.computes_selection(layer)
    )
    return dtype_bytes * per_token * length


class ComputeRow(NamedTuple):
    """What one context length costs an MSA model and its dense twin.

    Attributes:
      length: tokens of context.
      dense_tflops: attention of all layers of the dense twin, one forward pass, 1e12 FLOPs.
      msa_tflops: the same for the MSA model, index branch included.
      ratio: dense_tflops / msa_tflops, exact.
      eq12_ratio: the same for one MSA layer by the paper's Eq. 12.
      index_share: the index branch's share of msa_tflops.
      dense_attention_share: attention's share of the whole dense twin's forward FLOPs.
      msa_attention_share: attention's share of the whole MSA model's forward FLOPs.
      kv_cache_gb: keys and values of one sequence, bf16, 1e9 bytes.
      index_cache_gb: index keys on top of that, bf16, 1e9 bytes.
      decode_ratio: cache bytes read per decoded token, dense / MSA, over all layers.
    """

    length: int
    dense_tflops: float
    msa_tflops: float
    ratio: float
    eq12_ratio: float
    index_share: float
    dense_attention_share: float
    msa_attention_share: float
    kv_cache_gb: float
    index_cache_gb: float
    decode_ratio: float


def compute_table(
    config: ArchitectureConfig, lengths: Iterable[int] = TABLE_LENGTHS
) -> list[ComputeRow]:
    """Compute and memory of an MSA model against its dense twin, one row per context length.

    Raises:
      ValueError: `config` is not an MSA model.
    """
    if config.attention.kind != "msa":
        raise ValueError(
            f"attention.kind={config.attention.kind!r}: the table compares an MSA model with its "
            'dense twin; pass the config with attention.kind="msa"'
        )
    return [_compute_row(config, dense_twin(config), length) for length in lengths]


def _compute_row(config: ArchitectureConfig, twin: ArchitectureConfig, length: int) -> ComputeRow:
    sparse, dense = model_flops(config, length), model_flops(twin, length)
    msa = AttentionFlops(sparse.attention, sparse.index_scores)
    read = [_model_decode_bytes(c, length) for c in (twin, config)]
    eq12 = [eq12_flops(c.attention, length).total for c in (twin, config)]
    return ComputeRow(
        length=length,
        dense_tflops=dense.attention / 1e12,
        msa_tflops=msa.total / 1e12,
        ratio=dense.attention / msa.total,
        eq12_ratio=eq12[0] / eq12[1],
        index_share=msa.index_share,
        dense_attention_share=dense.attention_share,
        msa_attention_share=sparse.attention_share,
        kv_cache_gb=kv_cache_bytes(config, length) / 1e9,
        index_cache_gb=index_cache_bytes(config, length) / 1e9,
        decode_ratio=read[0] / read[1],
    )


def _model_decode_bytes(config: ArchitectureConfig, length: int) -> int:
    return sum(
        decode_bytes(
            config.attention_of(layer),
            length,
            computes_selection=config.computes_selection(layer),
            d_model=config.model.d_model,
        )
        for layer in range(config.model.num_layers)
    )
