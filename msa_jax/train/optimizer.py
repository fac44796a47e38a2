"""AdamW and its learning-rate schedule, built from an `OptimizerConfig`."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from msa_jax.train.config import OptimizerConfig


def make_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """The learning rate as a function of the optimizer step.

    A linear warm-up reaches the peak at step `warmup_steps - 1` (the first step already moves),
    then "constant" stays, "wsd" stays until the last `decay_fraction` of the run and falls
    linearly, "cosine" falls at once. The fall reaches `final_scale * learning_rate` at step
    `steps`, just after the last one, and never begins before the warm-up is over.

    Args:
      config: peak, kind and lengths.
      steps: optimizer steps of the whole run.

    Returns:
      A function from the number of finished steps (an int or an int array) to a float32 scalar.
    """
    start = {
        "constant": steps,
        "wsd": max(config.warmup_steps, steps - round(config.decay_fraction * steps)),
        "cosine": config.warmup_steps,
    }[config.schedule]

    def schedule(step: jax.typing.ArrayLike) -> jax.Array:
        step = jnp.asarray(step, jnp.float32)
        warmup = jnp.minimum(1.0, (step + 1) / max(config.warmup_steps, 1))
        progress = jnp.clip((step - start) / max(steps - start, 1), 0.0, 1.0)
        if config.schedule == "cosine":
            progress = 0.5 * (1 - jnp.cos(jnp.pi * progress))
        return config.learning_rate * warmup * (1 - (1 - config.final_scale) * progress)

    return schedule


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """Global-norm clipping, then AdamW whose weight decay is decoupled and for matrices only.

    Every link of the chain is there whatever the config says, so that the optimizer state has one
    structure and a run may resume with, say, another clip.

    Args:
      config: learning rate, moments, decay and clip.
      steps: optimizer steps of the whole run, for the schedule.

    Returns:
      A transformation whose moments are float32 even where the parameters are narrower.
    """
    clip = optax.clip_by_global_norm(config.gradient_clip)
    return _at_least_float32(
        optax.chain(
            clip if config.gradient_clip > 0 else optax.identity(),
            optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.eps),
            optax.add_decayed_weights(config.weight_decay, mask=decay_mask),
            optax.scale_by_learning_rate(make_schedule(config, steps)),
        )
    )


def decay_mask(params: Any) -> Any:
    """Which parameters decay: those with two or more logical axes.

    The axis that stacking layers for `lax.scan` puts in front has no name, so a stacked gain does
    not pass for a matrix.

    Args:
      params: a tree of `nnx.Param` with `logical_axes` metadata, e.g. ("embed",) or (None,) for the
        gain of a norm, ("embed", "mlp") for a matrix.

    Returns:
      A tree with a bool for each Param.

    Raises:
      ValueError: a parameter does not say its logical axes.
    """

    def decays(path: jax.tree_util.KeyPath, param: Any) -> bool:
        if not isinstance(param, nnx.Variable) or not param.has_metadata("logical_axes"):
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            raise ValueError(
                f"parameter {name} has no logical_axes, so whether it decays is unknown: "
                'make it with nnx.Param(value, logical_axes=("embed", "mlp"))'
            )
        return len(param.get_metadata("logical_axes")) > 1

    return jax.tree_util.tree_map_with_path(
        decays, params, is_leaf=lambda node: isinstance(node, nnx.Variable)
    )


def _at_least_float32(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """`inner` run on gradients and parameters that are widened to float32 where narrower."""

    def widen(tree: Any) -> Any:
        return jax.tree.map(lambda x: x.astype(jnp.promote_types(x.dtype, jnp.float32)), tree)

    def init(params: optax.Params) -> optax.OptState:
        return inner.init(widen(params))

    def update(
        updates: optax.Updates, state: optax.OptState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, optax.OptState]:
        return inner.update(widen(updates), state, widen(params))

    return optax.GradientTransformation(init, update)
