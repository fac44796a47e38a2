"""Dropless mixture of experts with shared experts.

Tokens are sorted by expert and each expert multiplies its own rows, however many: no capacity, so
nothing is dropped. Over the mesh, tokens and experts are split; every device gathers the
tokens of its expert group, serves the experts it holds, and scatters the partial sums back.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from msa_jax.config import Activation, MoEConfig
from msa_jax.nn.feed_forward import FeedForward, gated
from msa_jax.nn.grouped_matmul import apply_grouped
from msa_jax.nn.param import matrix
from msa_jax.sharding import RULES, axis_names, explicit_axes, weight


class SelectionBias(nnx.Variable):
    """The sigmoid router's bias for choosing: set by the balance rule, not by gradients."""


class MoEOutput(NamedTuple):
    """The layer's output, and scalars and loads to report."""

    y: Float[Array, "B T M"]
    aux: dict[str, Array]


class _Axes(NamedTuple):
    """Mesh axes in force inside the layer's `shard_map`; all empty without a mesh."""

    tokens: tuple[str, ...] = ()
    experts: tuple[str, ...] = ()
    mlp: tuple[str, ...] = ()


class _Routing(NamedTuple):
    """Chosen experts and their weights, and the scores' distribution over experts."""

    experts: Int[Array, "n k"]
    weights: Float[Array, "n k"]
    distribution: Float[Array, "n E"]


class MoE(nnx.Module):
    """Routed experts plus shared ones that every token visits.

    The sigmoid router chooses by score + `selection_bias` and weighs by the renormalised scores of
    the chosen; the softmax router weighs by renormalised probabilities and reports a balance loss.
    Both multiply the routed sum by `routed_scale`. Routing is computed in float32.

    Args:
      config: sizes and router.
      d_model: width of x.
      activation: of the experts.
      dtype: of the matmuls.
      param_dtype: of the weights.
      output_scale: factor on the output matrices' initial deviation.
      rngs: for the initial values.
    """

    def __init__(
        self,
        config: MoEConfig,
        d_model: int,
        *,
        activation: Activation = "swiglu",
        dtype: str = "float32",
        param_dtype: str = "float32",
        output_scale: float = 1.0,
        rngs: nnx.Rngs,
    ):
        experts, inner = config.num_experts, config.expert_dim
        inward = {"fan_in": d_model, "dtype": param_dtype}
        self.router = matrix(rngs, (d_model, experts), ("embed", None), **inward)
        self.selection_bias = SelectionBias(jnp.zeros(experts, jnp.float32), logical_axes=(None,))
        axes = ("experts", "embed", "mlp")
        self.gate = matrix(rngs, (experts, d_model, inner), axes, **inward)
        self.up = matrix(rngs, (experts, d_model, inner), axes, **inward)
        self.down = matrix(
            rngs,
            (experts, inner, d_model),
            ("experts", "mlp", "embed"),
            fan_in=inner,
            dtype=param_dtype,
            scale=output_scale,
        )
        shared_dim = inner * config.num_shared_experts
        options = {"activation": activation, "dtype": dtype, "param_dtype": param_dtype}
        self.shared = (
            FeedForward(d_model, shared_dim, output_scale=output_scale, rngs=rngs, **options)
            if shared_dim
            else None
        )
        self.config = config
        self.activation: Activation = activation
        self.dtype = dtype

    def __call__(
        self, x: Float[Array, "B T M"], segment_ids: Int[Array, "B T"] | None = None
    ) -> MoEOutput:
        """The layer's output; padding tokens (segment 0) visit no routed expert.

        `aux`: `expert_load` [E] (tokens per expert), `router_entropy` (mean over tokens, nats),
        `dropped_tokens` (assignments no expert served) and, with the softmax router,
        `balance_loss`.
        """
        real = jnp.ones(x.shape[:2], bool) if segment_ids is None else segment_ids > 0
        arrays = (
            x,
            real,
            weight(self.router, jnp.promote_types(x.dtype, jnp.float32)),
            self.selection_bias[...],
            weight(self.gate, self.dtype),
            weight(self.up, self.dtype),
            weight(self.down, self.dtype),
        )
        mesh_axes = explicit_axes()
        if mesh_axes:
            y, aux = self._sharded(arrays, mesh_axes)
        else:
            y, aux = self._local(*arrays, axes=_Axes())
        if self.shared is not None:
            y = y + self.shared(x)
        return MoEOutput(y, aux)

    def _sharded(self, arrays, mesh_axes):
        """`_local` on every device's rows and experts."""
        batch, sequence, experts, mlp = RULES.spec(
            "batch", "sequence", "experts", "mlp", mesh_axes=mesh_axes
        )
        inward, outward = PartitionSpec(experts, None, mlp), PartitionSpec(experts, mlp, None)
        rows, whole = PartitionSpec(batch, sequence, None), PartitionSpec()
        tokens = axis_names(batch) + axis_names(sequence)
        axes = _Axes(tokens, axis_names(experts), axis_names(mlp))
        in_specs = (rows, PartitionSpec(batch, sequence), whole, whole, inward, inward, outward)
        return jax.shard_map(
            lambda *local: self._local(*local, axes=axes),
            in_specs=in_specs,
            out_specs=(rows, whole),
        )(*map(jax.reshard, arrays, in_specs))

    def _local(self, x, real, router, bias, gate, up, down, *, axes: _Axes):
        """Routes this device's tokens, serves its experts."""
        shape, top_k = x.shape, self.config.top_k
        tokens, real = x.reshape(-1, shape[-1]), real.reshape(-1)
        routing = self._route(tokens, router, bias)
        aux = _report(routing, real, self.config, axes)
        # Padding goes to an expert that nobody holds.
        experts = jnp.where(real[:, None], routing.experts, self.config.num_experts)
        parts = (tokens, experts, routing.weights)
        for name in axes.experts:
            parts = jax.tree.map(lambda a, n=name: jax.lax.all_gather(a, n, tiled=True), parts)
        tokens, experts, weights = parts
        held = len(gate)
        first = jax.lax.axis_index(axes.experts) * held if axes.experts else 0
        experts = experts.reshape(-1) - first
        experts = jnp.where((experts >= 0) & (experts < held), experts, held)
        order = jnp.argsort(experts, stable=True)
        group_sizes = jnp.bincount(experts, length=held + 1)[:held].astype(jnp.int32)
        served = _sum_over(group_sizes.sum(), axes.tokens)
        aux["dropped_tokens"] = aux["expert_load"].sum() - served.astype(jnp.float32)

        def ffn(rows, matmul):
            return matmul(gated(matmul(rows, gate), matmul(rows, up), self.activation), down)

        y = apply_grouped(ffn, tokens.astype(self.dtype)[order // top_k], group_sizes)
        y = y[jnp.argsort(order)].reshape(-1, top_k, shape[-1])
        y = jnp.einsum("nkm,nk->nm", y, weights.astype(y.dtype))
        y = _sum_over(y, axes.mlp)
        for name in reversed(axes.experts):
            y = jax.lax.psum_scatter(y, name, tiled=True)
        return y.reshape(shape).astype(x.dtype), aux

    def _route(
        self, tokens: Float[Array, "n M"], router: Float[Array, "M E"], bias: Float[Array, "E"]
    ) -> _Routing:
        logits = tokens.astype(router.dtype) @ router
        if self.config.router == "sigmoid":
            scores = jax.nn.sigmoid(logits)
            preference = scores + bias
        else:
            scores = preference = jax.nn.softmax(logits)
        _, experts = jax.lax.top_k(jax.lax.stop_gradient(preference), self.config.top_k)
        chosen = jnp.take_along_axis(scores, experts, axis=-1)
        weights = self.config.routed_scale * chosen / chosen.sum(-1, keepdims=True)
        return _Routing(experts, weights, scores / scores.sum(-1, keepdims=True))


def _report(
    routing: _Routing, real: Bool[Array, "n"], config: MoEConfig, axes: _Axes
) -> dict[str, Array]:
    """Load, entropy and balance loss over the tokens of all devices."""
    one_hot = jax.nn.one_hot(routing.experts, config.num_experts, dtype=jnp.float32).sum(1)
    load = _sum_over((one_hot * real[:, None]).sum(0), axes.tokens)
    count = jnp.maximum(_sum_over(real.sum(dtype=jnp.float32), axes.tokens), 1)
    p = routing.distribution
    entropy = -(p * jnp.log(jnp.maximum(p, 1e-30))).sum(-1)
    aux = {
        "expert_load": load,
        "router_entropy": _sum_over((entropy * real).sum(), axes.tokens) / count,
    }
    if config.router == "softmax":
        share = _sum_over((p * real[:, None]).sum(0), axes.tokens) / count
        aux["balance_loss"] = config.num_experts * (load / (count * config.top_k) * share).sum()
    return aux


def _sum_over(x: Array, axes: tuple[str, ...]) -> Array:
    return jax.lax.psum(x, axes) if axes else x
