"""The modules as Flax Linen modules, for models that are not written in NNX.

Parameters arrive as plain arrays in the collection "params", so `nn.scan`, `nn.remat`, optax masks
and checkpoints see nothing unusual. A key gives other initial values than the NNX module's.
"""

from flax import linen, nnx

from msa_jax.attention import GQAttention as _GQAttention
from msa_jax.attention import MSAttention as _MSAttention
from msa_jax.config import AttentionConfig, MoEConfig
from msa_jax.nn.moe import MoE as _MoE


def MSAttention(
    config: AttentionConfig, d_model: int, *, name: str | None = None, **options
) -> linen.Module:
    """`msa_jax.MSAttention` as a Linen module; `options` and the call are the NNX module's."""
    return _as_linen(_MSAttention, config, d_model, name=name, **options)


def GQAttention(
    config: AttentionConfig, d_model: int, *, name: str | None = None, **options
) -> linen.Module:
    """`msa_jax.GQAttention` as a Linen module; `options` and the call are the NNX module's."""
    return _as_linen(_GQAttention, config, d_model, name=name, **options)


def MoE(config: MoEConfig, d_model: int, *, name: str | None = None, **options) -> linen.Module:
    """`msa_jax.MoE` as a Linen module; the selection bias is in a collection of its own."""
    return _as_linen(_MoE, config, d_model, name=name, **options)


def _as_linen(cls: type[nnx.Module], *args, name: str | None, **options) -> linen.Module:
    return nnx.bridge.ToLinen(
        cls, args=args, kwargs=options, metadata_fn=lambda variable: variable.get_value(), name=name
    )
