"""Scoring a model on a fixed set of validation batches, during training and after it."""

from collections.abc import Callable, Sequence

import jax
import numpy as np

from msa_jax.attention import Mode
from msa_jax.cost import Phase
from msa_jax.data.packing import Batch
from msa_jax.sharding import place_batch
from msa_jax.train.config import ExperimentConfig
from msa_jax.train.state import TrainState
from msa_jax.train.step import make_eval_step

# Reports that count something; all others are means.
_COUNTS = frozenset({"expert_load", "dropped_tokens"})

type Record = dict[str, float | np.ndarray]


def make_evaluator(
    config: ExperimentConfig,
    batches: Sequence[Batch],
    mesh: jax.sharding.Mesh,
    *,
    on_batch: Callable[[Batch, np.ndarray], None] | None = None,
) -> Callable[[TrainState, Phase], Record]:
    """Returns `evaluate(state, phase)`, which compiles once for each phase.

    Args:
      config: of the model.
      batches: what to evaluate on, at least one.
      mesh: that the state is on.
      on_batch: is told of every batch and its token losses [B, T], nats, 0 without a target.

    Returns:
      A function to a record: `loss`, the mean over targets in nats; `tokens`, how many there are;
      and what the layers report, the means over batches weighted by their tokens.
    """
    eval_step = make_eval_step(config)

    def evaluate(state: TrainState, phase: Phase) -> Record:
        mode = Mode(phase=phase, diagnostics=True)
        total, targets, queries = 0.0, 0, 0
        reports: dict[str, np.ndarray] = {}
        for batch in batches:
            with jax.set_mesh(mesh):
                device_losses, aux = eval_step(state, place_batch(batch, mesh), mode)
            losses = np.asarray(device_losses, np.float64)
            if on_batch is not None:
                on_batch(batch, losses)
            total += float(losses.sum())
            targets += int(batch["loss_mask"].sum())
            real = int((batch["segment_ids"] > 0).sum())
            queries += real
            for name, value in jax.device_get(aux).items():
                weight = 1 if name in _COUNTS else real
                reports[name] = reports.get(name, 0) + weight * np.asarray(value, np.float64)
        means = {
            name: value if name in _COUNTS else value / queries for name, value in reports.items()
        }
        return {"loss": total / targets, "tokens": targets, **means}

    return evaluate
