"""Gated DeltaNet: linear attention whose state decays by a gate and learns by the delta rule."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from msa_jax.attention.chunks import (
    find_documents,
    refuse_split_sequence,
    wide,
    without_padding,
)
from msa_jax.attention.delta_rule import delta_rule, delta_rule_step
from msa_jax.attention.mixer import MixerOutput, Mode
from msa_jax.attention.projections import refuse_packed_cache
from msa_jax.attention.short_convolution import ShortConvolution, short_convolution
from msa_jax.attention.step_size import StepSize
from msa_jax.cache import RecurrentCache
from msa_jax.config import AttentionConfig
from msa_jax.nn.norm import RMSNorm
from msa_jax.nn.param import matrix
from msa_jax.sharding import project
from pallas_kernels.sharding import shard_over_batch_heads_and_queries


class GatedDeltaNet(nnx.Module):
    """Gated DeltaNet (arXiv 2412.06464), the mixer of `attention.kind="linear"`.

    Queries, keys and values pass a short convolution and silu, queries and keys are brought to
    length 1; each head's state follows the gated delta rule (`msa_jax.attention.delta_rule`); its
    output is normed and gated. Cost per token does not depend on the length, nor does the cache.

    Args:
      config: heads, dims and the section `linear`; softmax and index-branch fields are ignored.
      d_model: width of x.
      norm_eps: of the output norm.
      dtype: of the matmuls; states are float32 at least.
      param_dtype: of the weights.
      output_scale: factor on the output matrix's initial deviation.
      rngs: for the initial values.
    """

    def __init__(
        self,
        config: AttentionConfig,
        d_model: int,
        *,
        norm_eps: float = 1e-6,
        dtype: str = "float32",
        param_dtype: str = "float32",
        output_scale: float = 1.0,
        rngs: nnx.Rngs,
    ):
        heads, key_dim, value_dim = config.num_heads, config.head_dim, config.linear_value_dim
        channels, axes = 2 * key_dim + value_dim, ("embed", "heads", None)
        inward = {"fan_in": d_model, "dtype": param_dtype}
        self.qkv = matrix(rngs, (d_model, heads, channels), axes, **inward)
        self.gate = matrix(rngs, (d_model, heads, value_dim), axes, **inward)
        self.beta = matrix(rngs, (d_model, heads), axes[:2], **inward)
        self.step = matrix(rngs, (d_model, heads), axes[:2], **inward)
        self.step_size = StepSize(heads, param_dtype=param_dtype, rngs=rngs)
        width = config.linear.conv_width
        self.convolution = ShortConvolution(
            (heads, channels), axes[1:], width, bias=False, param_dtype=param_dtype, rngs=rngs
        )
        self.norm = RMSNorm(value_dim, eps=norm_eps, param_dtype=param_dtype)
        self.o = matrix(
            rngs,
            (heads, value_dim, d_model),
            ("heads", None, "embed"),
            fan_in=heads * value_dim,
            dtype=param_dtype,
            scale=output_scale,
        )
        self.config = config
        self.dtype = dtype

    def __call__(
        self,
        x: Float[Array, "B T M"],
        *,
        positions: Int[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        cache: RecurrentCache | None = None,
        shared: Any = None,
        mode: Mode = Mode(),
    ) -> MixerOutput:
        """See `Mixer`; has no use for positions, and reports nothing."""
        refuse_packed_cache(segment_ids, cache)
        refuse_split_sequence(self.config.kind)
        tail, state = None, None
        if cache is not None:
            segment_ids = cache.segment_ids(x.shape[1])
            (tail,), state = cache.tails, cache.state
        rows, per_head = ("batch", "sequence", "heads"), ("batch", "sequence", "heads", None)
        qkv = project("btm,mhc->bthc", x, self.qkv, self.dtype, *per_head)
        gate = project("btm,mhv->bthv", x, self.gate, self.dtype, *per_head)
        beta = project("btm,mh->bth", x, self.beta, self.dtype, *rows)
        _, log_decay = self.step_size(project("btm,mh->bth", x, self.step, self.dtype, *rows))
        kernel, _ = self.convolution.arrays(self.dtype)
        mix = shard_over_batch_heads_and_queries(
            self._mix, ("bqh.", "b.h", "b.h", ".h.", "b.", "b.h.", "bh.."), ("bqh.", "b.h.", "bh..")
        )
        o, tail, state = mix(qkv, log_decay, beta, kernel, segment_ids, tail, state)
        o = self.norm(o) * jax.nn.silu(gate)
        y = project("bthv,hvm->btm", o, self.o, self.dtype, "batch", "sequence", None)
        if cache is not None:
            cache = cache.advance(x.shape[1], (tail,), state)
        return MixerOutput(y.astype(x.dtype), cache, shared, {})

    def _mix(self, qkv, log_decay, beta, kernel, segment_ids, tail, state):
        """Convolution and delta rule: outputs, the convolution's tail and the state."""
        documents = find_documents(segment_ids)
        qkv, tail = short_convolution(qkv, kernel, None, documents, tail)
        key_dim = self.config.head_dim
        q, k, v = jnp.split(qkv, [key_dim, 2 * key_dim], axis=-1)
        q, k = _unit(q) / math.sqrt(key_dim), _unit(k)
        beta = jax.nn.sigmoid(beta.astype(log_decay.dtype))
        if state is None or qkv.shape[1] > 1:
            options = {"segment_ids": segment_ids, "initial_state": state}
            chunk_size = self.config.linear.chunk_size
            o, state = delta_rule(q, k, v, log_decay, beta, chunk_size=chunk_size, **options)
            return o, tail, state
        log_decay, beta = (without_padding(a, documents) for a in (log_decay, beta))
        o, state = delta_rule_step(state, *(a[:, 0] for a in (q, k, v, log_decay, beta)))
        return o[:, None].astype(q.dtype), tail, state

    def init_cache(self, batch: int, max_length: int) -> RecurrentCache:
        """See `Mixer`; of one size whatever `max_length`."""
        config = self.config
        channels = 2 * config.head_dim + config.linear_value_dim
        return RecurrentCache.empty(
            batch,
            tails=((config.linear.conv_width - 1, config.num_heads, channels),),
            state=(config.num_heads, config.head_dim, config.linear_value_dim),
            dtype=self.dtype,
        )


def _unit(x: Float[Array, "*batch K"]) -> Float[Array, "*batch K"]:
    """x scaled to length 1; what is next to 0 stays there."""
    values = x.astype(wide(x))
    squares = (values * values).sum(-1, keepdims=True)
    return (values * jax.lax.rsqrt(squares + 1e-6)).astype(x.dtype)
