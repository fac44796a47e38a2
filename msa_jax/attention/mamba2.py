"""Mamba-2: a selective state space, computed by its duality with masked attention."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from msa_jax.attention.chunks import find_documents, refuse_split_sequence, without_padding
from msa_jax.attention.mixer import MixerOutput, Mode
from msa_jax.attention.projections import refuse_packed_cache
from msa_jax.attention.short_convolution import ShortConvolution, short_convolution
from msa_jax.attention.ssd import state_space, state_space_step
from msa_jax.attention.step_size import StepSize
from msa_jax.cache import RecurrentCache
from msa_jax.config import AttentionConfig
from msa_jax.nn.norm import RMSNorm
from msa_jax.nn.param import matrix
from msa_jax.sharding import project, weight
from pallas_kernels.sharding import shard_over_batch_heads_and_queries

# Of `Mamba2._mix`: projections, parameters, then documents and cache.
_LAYOUTS = ("bqh.", "b..", "b.h", "b.h", ".h.", "h.", "..", ".", "h", "b.", "b.h.", "b..", "bh..")
_OUT_LAYOUTS = ("bqh.", "b.h.", "b..", "bh..")


class Mamba2(nnx.Module):
    """The Mamba-2 block (arXiv 2405.21060, section 7.1), without the trunk's feed-forward.

    Inputs x, b and c pass a short convolution and silu; each head's state decays by a step that
    depends on the input, takes x in and is read (`msa_jax.attention.ssd`); a skip adds x, and a
    gated norm over all heads comes before the output. b and c serve all heads. Cost per token does
    not depend on the length, nor does the cache.

    Args:
      config: its section `mamba2` is all that is read.
      d_model: width of x.
      norm_eps: of the gated norm.
      dtype: of the matmuls; states are float32 at least.
      param_dtype: of the weights.
      output_scale: factor on the output matrix's initial deviation.
      rngs: for the initial values.

    Raises:
      ConfigError: `mamba2.head_dim` does not divide the inner width.
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
        sizes, param = config.mamba2, {"param_dtype": param_dtype}
        heads, inner = sizes.num_heads(d_model), sizes.expand * d_model
        inward = {"fan_in": d_model, "dtype": param_dtype}
        x_shape, x_axes = (heads, sizes.head_dim), ("heads", None)
        self.x = matrix(rngs, (d_model, *x_shape), ("embed", *x_axes), **inward)
        self.bc = matrix(rngs, (d_model, 2 * sizes.state_dim), ("embed", None), **inward)
        self.gate = matrix(rngs, (d_model, inner), ("embed", "heads"), **inward)
        self.step = matrix(rngs, (d_model, heads), ("embed", "heads"), **inward)
        self.step_size = StepSize(heads, rngs=rngs, **param)
        options = {"width": sizes.conv_width, "bias": True, "rngs": rngs, **param}
        self.x_convolution = ShortConvolution(x_shape, x_axes, **options)
        self.bc_convolution = ShortConvolution((2 * sizes.state_dim,), (None,), **options)
        self.skip = nnx.Param(jnp.ones(heads, param_dtype), logical_axes=("heads",))
        self.norm = RMSNorm(inner, eps=norm_eps, **param)
        self.o = matrix(
            rngs,
            (inner, d_model),
            ("heads", "embed"),
            fan_in=inner,
            dtype=param_dtype,
            scale=output_scale,
        )
        self.num_heads = heads
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
        tails, state = (None, None), None
        if cache is not None:
            segment_ids = cache.segment_ids(x.shape[1])
            tails, state = cache.tails, cache.state
        rows, per_head = ("batch", "sequence", "heads"), ("batch", "sequence", "heads", None)
        inputs = project("btm,mhp->bthp", x, self.x, self.dtype, *per_head)
        bc = project("btm,mn->btn", x, self.bc, self.dtype, "batch", "sequence", None)
        gate = project("btm,mc->btc", x, self.gate, self.dtype, *rows)
        steps = self.step_size(project("btm,mh->bth", x, self.step, self.dtype, *rows))
        parameters = (
            *self.x_convolution.arrays(self.dtype),
            *self.bc_convolution.arrays(self.dtype),
            weight(self.skip, self.dtype),
        )
        mix = shard_over_batch_heads_and_queries(self._mix, _LAYOUTS, _OUT_LAYOUTS)
        y, *tails, state = mix(inputs, bc, *steps, *parameters, segment_ids, *tails, state)
        y = self.norm(y.reshape(gate.shape) * jax.nn.silu(gate))
        y = project("btc,cm->btm", y, self.o, self.dtype, "batch", "sequence", None)
        if cache is not None:
            cache = cache.advance(x.shape[1], tuple(tails), state)
        return MixerOutput(y.astype(x.dtype), cache, shared, {})

    def _mix(
        self,
        x,
        bc,
        step,
        log_decay,
        x_kernel,
        x_bias,
        bc_kernel,
        bc_bias,
        skip,
        segment_ids,
        x_tail,
        bc_tail,
        state,
    ):
        """Convolutions, state space and skip: outputs, the convolutions' tails and the state."""
        documents = find_documents(segment_ids)
        x, x_tail = short_convolution(x, x_kernel, x_bias, documents, x_tail)
        bc, bc_tail = short_convolution(bc, bc_kernel, bc_bias, documents, bc_tail)
        x = without_padding(x, documents)
        b, c = jnp.split(bc, 2, axis=-1)
        stepped = (step[..., None] * x).astype(x.dtype)
        if state is None or x.shape[1] > 1:
            options = {"segment_ids": segment_ids, "initial_state": state}
            chunk_size = self.config.mamba2.chunk_size
            y, state = state_space(stepped, b, c, log_decay, chunk_size=chunk_size, **options)
        else:
            log_decay = without_padding(log_decay, documents)
            y, state = state_space_step(state, *(a[:, 0] for a in (stepped, b, c, log_decay)))
            y = y[:, None].astype(x.dtype)
        return y + skip[:, None] * x, x_tail, bc_tail, state

    def init_cache(self, batch: int, max_length: int) -> RecurrentCache:
        """See `Mixer`; of one size whatever `max_length`."""
        sizes = self.config.mamba2
        before = sizes.conv_width - 1
        return RecurrentCache.empty(
            batch,
            tails=((before, self.num_heads, sizes.head_dim), (before, 2 * sizes.state_dim)),
            state=(self.num_heads, sizes.head_dim, sizes.state_dim),
            dtype=self.dtype,
        )
