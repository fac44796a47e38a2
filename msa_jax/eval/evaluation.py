"""The final evaluation of a trained model on held-out text, as the report reads it.

Writes `evaluation.json` and, for a model that selects blocks, `selection.npz` into the run's
folder; `msa_jax.eval.runs` says what is in them.
"""

import dataclasses
import json
import math
import os
import pathlib

import jax
import numpy as np

from msa_jax.attention import Mode
from msa_jax.data.packing import Batch
from msa_jax.data.pipeline import validation_batches
from msa_jax.data.tokenizer import Tokenizer, load_tokenizer
from msa_jax.eval.runs import Evaluation
from msa_jax.sharding import place_batch
from msa_jax.train.config import ExperimentConfig
from msa_jax.train.evaluation import make_evaluator
from msa_jax.train.state import TrainState
from msa_jax.train.step import make_eval_step

# Widths of the position buckets double: the start of the context is where the loss moves.
_FIRST_BUCKET = 16


def evaluate(
    config: ExperimentConfig,
    state: TrainState,
    mesh: jax.sharding.Mesh,
    workdir: str | os.PathLike[str],
    *,
    num_batches: int,
) -> Evaluation:
    """Scores the model on validation batches and writes the results into `workdir`.

    Args:
      config: of the run.
      state: the trained state, living on `mesh`.
      mesh: of the state.
      workdir: the run's folder.
      num_batches: at most so many validation batches.

    Returns:
      What was written to `evaluation.json`.
    """
    folder = pathlib.Path(workdir)
    tokenizer = load_tokenizer(config.data.tokenizer)
    batches = list(
        validation_batches(
            config.data, block_size=config.attention.block_size, num_batches=num_batches
        )
    )
    evaluation = _score(config, state, mesh, batches, tokenizer)
    layers = [n for n in range(config.model.num_layers) if config.computes_selection(n)]
    if layers:
        block_ids, row = _select_one_row(config, state, mesh, batches)
        np.savez_compressed(
            folder / "selection.npz",
            layers=np.array(layers),
            block_ids=block_ids,
            segment_ids=row["segment_ids"],
        )
        text = _block_texts(row, tokenizer, config.attention.block_size)
        evaluation = dataclasses.replace(evaluation, text=text)
    path = folder / "evaluation.json"
    path.write_text(json.dumps(dataclasses.asdict(evaluation), indent=1), encoding="utf-8")
    return evaluation


def _score(
    config: ExperimentConfig,
    state: TrainState,
    mesh: jax.sharding.Mesh,
    batches: list[Batch],
    tokenizer: Tokenizer,
) -> Evaluation:
    """Losses, selection metrics and expert loads over all batches."""
    edges = position_edges(config.data.sequence_length)
    losses, counts = np.zeros(len(edges) - 1), np.zeros(len(edges) - 1)
    num_bytes = 0

    def add(batch: Batch, token_losses: np.ndarray) -> None:
        nonlocal losses, counts, num_bytes
        mask = batch["loss_mask"] > 0
        bucket = np.digitize(batch["positions"][mask], edges) - 1
        losses += np.bincount(bucket, token_losses[mask], len(losses))
        counts += np.bincount(bucket, minlength=len(counts))
        num_bytes += tokenizer.num_bytes(batch["targets"][mask])

    record = make_evaluator(config, batches, mesh, on_batch=add)(state, "sparse")
    loss, tokens = float(record.pop("loss")), int(record.pop("tokens"))
    load = np.asarray(record.pop("expert_load", np.zeros((0, 0))))
    filled = int(np.flatnonzero(counts)[-1]) + 1
    return Evaluation(
        step=int(state.step),
        tokens=tokens,
        loss=loss,
        bits_per_byte=loss * tokens / math.log(2) / num_bytes,
        position_edges=edges[: filled + 1],
        loss_by_position=list(losses[:filled] / np.maximum(counts[:filled], 1)),
        layers={name: np.asarray(value).tolist() for name, value in record.items()},
        expert_load=load.tolist(),
    )


def position_edges(sequence_length: int) -> list[int]:
    """Bounds of position buckets, each twice as wide as the one before, up to the context's end."""
    edges = [0]
    while edges[-1] < sequence_length:
        edges.append(min(max(_FIRST_BUCKET, 2 * edges[-1]), sequence_length))
    return edges


def _select_one_row(
    config: ExperimentConfig, state: TrainState, mesh: jax.sharding.Mesh, batches: list[Batch]
) -> tuple[np.ndarray, Batch]:
    """Block ids [L, Hkv, T, K] of the row that holds the longest document."""
    longest = [(batch["positions"] * (batch["segment_ids"] > 0)).max(-1) for batch in batches]
    index = int(np.argmax([row.max() for row in longest]))
    row = int(longest[index].argmax())
    mode = Mode(selections=True)
    with jax.set_mesh(mesh):
        _, aux = make_eval_step(config)(state, place_batch(batches[index], mesh), mode)
    block_ids = np.asarray(aux["block_ids"])[:, row]
    return block_ids, {name: array[row] for name, array in batches[index].items()}


def _block_texts(row: Batch, tokenizer: Tokenizer, block_size: int) -> list[str]:
    """The text of each key block."""
    tokens, real = row["tokens"], row["segment_ids"] > 0
    starts = range(0, len(tokens), block_size)
    return [tokenizer.decode(tokens[s : s + block_size][real[s : s + block_size]]) for s in starts]
