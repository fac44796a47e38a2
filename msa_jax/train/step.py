"""One optimizer step and one evaluation step, as pure jitted functions."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array

from msa_jax.attention import Mode
from msa_jax.cost import Phase
from msa_jax.model import Transformer, plan_stages
from msa_jax.nn.moe import SelectionBias
from msa_jax.objectives import alignment_loss, balance_loss, token_losses
from msa_jax.sharding import out_spec
from msa_jax.train.config import ExperimentConfig
from msa_jax.train.optimizer import make_optimizer, make_schedule
from msa_jax.train.state import TrainState, merge_model, model_graph

type Batch = Mapping[str, Array]
type Metrics = dict[str, Array]

_MEANS = ("index_kl", "router_entropy", "balance_loss")


def make_train_step(
    config: ExperimentConfig,
) -> Callable[..., tuple[TrainState, Metrics]]:
    """The jitted `(state, batch, phase, proceed=True) -> (state, metrics)`; `phase` as of `Mode`.

    Gradients of `optimizer.accumulation_steps` micro-batches add up to those of the whole batch:
    every mean is over the whole batch's tokens. (The softmax router's balance loss is the
    exception: it is a product of means and taken per micro-batch.)

    A step whose loss or gradient is not finite leaves the state as it was, but for the step
    counter, and says so in `metrics["finite"]`, so that the state which failed can be looked at.
    So does one that is not to proceed: given the step before's `finite` as `proceed`, it may be
    started before anybody has read that. The old state's memory is reused: it cannot be read again.
    """
    graph = model_graph(config)
    optimizer = make_optimizer(config.optimizer, config.train.steps)
    schedule = make_schedule(config.optimizer, config.train.steps)
    parts = config.optimizer.accumulation_steps

    def loss_of(params, variables, batch, totals, mode):
        model = nnx.merge(graph, params, variables)
        output = model(batch["tokens"], **_places(config, batch), mode=mode)
        counts = _counts(batch)
        tokens = counts["tokens"] / totals["tokens"]
        queries = counts["queries"] / totals["queries"]
        losses = token_losses(output.logits, batch["targets"]) * batch["loss_mask"]
        language = losses.sum() / totals["tokens"]
        alignment = alignment_loss(output.aux, config.objective.kl_reduction) * queries
        balance = balance_loss(output.aux) * tokens
        metrics = _weighted(output.aux, queries) | {"loss": language, "kl_loss": alignment}
        total = language + config.objective.kl_weight * alignment
        return total + config.moe.balance_weight * balance, metrics

    @functools.partial(jax.jit, static_argnums=2, donate_argnums=0)
    def step(
        state: TrainState, batch: Batch, phase: Phase, proceed: bool | Array = True
    ) -> tuple[TrainState, Metrics]:
        mode = Mode(phase=phase, losses=True)
        totals = {name: jnp.maximum(count, 1) for name, count in _counts(batch).items()}

        def grad(micro):
            gradient_of = jax.grad(loss_of, has_aux=True)
            return gradient_of(state.params, state.variables, micro, totals, mode)

        def accumulate(sums, micro):
            return jax.tree.map(jnp.add, sums, grad(micro)), None

        if parts == 1:
            gradients, metrics = grad(batch)
        else:
            micro = _split(batch, parts)
            # Sums from zeros: from the first micro-batch's, the model would be compiled twice.
            shapes = jax.eval_shape(grad, jax.tree.map(lambda a: a[0], micro))
            sums = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype, device=a.sharding), shapes)
            (gradients, metrics), _ = jax.lax.scan(accumulate, sums, micro)

        metrics["gradient_norm"] = optax.tree.norm(gradients)
        metrics["learning_rate"] = schedule(state.step)
        metrics["tokens"] = totals["queries"]
        finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(metrics["gradient_norm"])
        metrics["finite"] = finite & proceed
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        params: Any = optax.apply_updates(state.params, updates)
        new = TrainState(
            state.step,
            params,
            balance_experts(config, state.variables, metrics),
            opt_state,
        )
        kept = jax.tree.map(lambda n, o: jnp.where(metrics["finite"], n, o), new, state)
        return TrainState(state.step + 1, kept.params, kept.variables, kept.opt_state), metrics

    return step


@functools.cache
def make_eval_step(
    config: ExperimentConfig,
) -> Callable[[TrainState, Batch, Mode], tuple[Array, Metrics]]:
    """The jitted `(state, batch, mode) -> (token losses [B, T], aux)`; computes no gradient.

    One function per config, so that the evaluation after training compiles nothing again.
    """
    graph = model_graph(config)

    @functools.partial(jax.jit, static_argnums=2)
    def step(state: TrainState, batch: Batch, mode: Mode) -> tuple[Array, Metrics]:
        model: Transformer = merge_model(graph, state)
        output = model(batch["tokens"], **_places(config, batch), mode=mode)
        return token_losses(output.logits, batch["targets"]) * batch["loss_mask"], output.aux

    return step


def balance_experts(config: ExperimentConfig, variables: nnx.State, metrics: Metrics) -> nnx.State:
    """Moves every selection bias a fixed step toward equal load (auxiliary-loss-free balancing)."""
    rate = config.moe.bias_update_rate
    if "expert_load" not in metrics or config.moe.router != "sigmoid" or rate == 0:
        return variables
    load = metrics["expert_load"]
    updates = rate * jnp.sign(load.mean(-1, keepdims=True) - load)
    # Layers of a stage lie side by side: repeats outside, places in the group inside.
    by_place: dict[tuple[Any, ...], Array] = {}
    first = 0
    for index, stage in enumerate(plan_stages(config)):
        places = [place for place, kind in enumerate(stage.kinds) if kind.has_experts]
        count = stage.repeats * len(places)
        group = updates[first : first + count]
        group = group.reshape(stage.repeats, len(places), config.moe.num_experts)
        for order, place in enumerate(places):
            by_place["stages", index, place] = group[:, order]
        first += count

    def move(path, variable):
        if not isinstance(variable, SelectionBias):
            return variable
        return variable.replace(variable.get_value() + by_place[path[:3]])

    flat = nnx.to_flat_state(variables)
    return nnx.from_flat_state([(path, move(path, variable)) for path, variable in flat])


def _places(config: ExperimentConfig, batch: Batch) -> dict[str, Array | None]:
    """Where tokens stand. Joined rows are one document each: what pads the last is behind it."""
    segment_ids = None if config.data.join_documents else batch["segment_ids"]
    return {"positions": batch["positions"], "segment_ids": segment_ids}


def _counts(batch: Batch) -> dict[str, Array]:
    """What the means are over: predicted tokens, and tokens that are not padding."""
    return {
        "tokens": batch["loss_mask"].sum().astype(jnp.float32),
        "queries": (batch["segment_ids"] > 0).sum().astype(jnp.float32),
    }


def _weighted(aux: Metrics, weight: Array) -> Metrics:
    """A micro-batch's share of the reports: means are weighted, counts add up as they are."""
    return {name: value * weight if name in _MEANS else value for name, value in aux.items()}


def _split(batch: Batch, parts: int) -> dict[str, Array]:
    """[B, T] to [parts, B / parts, T]; every micro-batch takes rows from every device."""

    def split(rows):
        shape = (rows.shape[0] // parts, parts, rows.shape[1])
        return jax.lax.reshape(
            rows, shape, out_sharding=out_spec("batch", None, "sequence")
        ).swapaxes(0, 1)

    return jax.tree.map(split, dict(batch))
