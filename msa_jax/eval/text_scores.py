"""How a model does on text: perplexity by position, and how good its selection of blocks is."""

import math
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Int

from msa_jax.attention import Mode
from msa_jax.attention.diagnostics import SELECTION_METRICS, selection_overlap
from msa_jax.eval.evaluation import position_edges
from msa_jax.eval.scoring import score_tokens
from msa_jax.eval.subject import CannotMeasure, Subject
from msa_jax.model import Transformer

# Selection is measured on a part of the text, as it takes a dense pass.
_SELECTION_SHARE = 4


def perplexity(subject: Subject, text: str, length: int) -> dict[str, Any]:
    """Losses of a text's tokens, each predicted once, in windows of `length`.

    Returns:
      `tokens`: how many were scored; `loss`: mean, nats per token; `perplexity`: its exponential;
      `bits_per_byte`; `position_edges` [P + 1] and `loss_by_position` [P]: by place in the window,
      in buckets each twice as wide as the one before.

    Raises:
      CannotMeasure: the text is shorter than a window.
    """
    by_place, windows, num_bytes = np.zeros(length), 0, 0
    for tokens, targets in _batches(subject, text, length):
        scores = score_tokens(subject.model, tokens, targets)
        by_place -= np.asarray(scores.log_probs, np.float64).sum(0)
        windows += len(tokens)
        num_bytes += subject.tokenizer.num_bytes(targets.ravel())
    loss = by_place.sum() / (windows * length)
    edges = position_edges(length)
    widths = np.diff(edges)
    return {
        "tokens": windows * length,
        "loss": float(loss),
        "perplexity": math.exp(min(loss, 700)),
        "bits_per_byte": float(by_place.sum() / math.log(2) / num_bytes),
        "position_edges": edges,
        "loss_by_position": (np.add.reduceat(by_place, edges[:-1]) / widths / windows).tolist(),
    }


def selection_quality(subject: Subject, text: str, length: int) -> dict[str, Any]:
    """Selection metrics of every layer that selects, on windows of a text.

    Returns:
      `layers` [L]: their numbers; by name of `selection_metrics` the layers' means [L];
      `stability` [L], if there is an earlier checkpoint: `selection_overlap` with its selection,
      and `stability_step`, which one that is.

    Raises:
      CannotMeasure: the model selects no blocks, no query has more than it keeps, or the text is
        shorter than a window.
    """
    run = subject.run
    layers = [layer for layer in range(run.model.num_layers) if run.computes_selection(layer)]
    if not layers:
        raise CannotMeasure(f"a {run.attention.kind} model selects no blocks")
    if length <= run.attention.block_size * run.attention.top_k:
        raise CannotMeasure(
            f"attention.top_k={run.attention.top_k} blocks of {run.attention.block_size} tokens "
            "are all that there is"
        )
    budget = max(1, subject.settings.tokens // _SELECTION_SHARE // length)
    sums: dict[str, np.ndarray] = {}
    windows = 0
    for tokens, _ in _batches(subject, text, length, most=budget):
        report, block_ids = _selection(subject.model, tokens)
        if subject.earlier_model is not None:
            _, other = _selection(subject.earlier_model, tokens)
            report |= {"stability": _overlap_by_layer(block_ids, other)}
        for name, value in report.items():
            sums[name] = sums.get(name, 0) + len(tokens) * np.asarray(value, np.float64)
        windows += len(tokens)
    means = {name: (value / windows).tolist() for name, value in sums.items()}
    return {"layers": layers, "stability_step": subject.earlier_step, **means}


def _batches(
    subject: Subject, text: str, length: int, *, most: int | None = None
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Tokens and targets [B, length] of the text's windows."""
    stream = subject.stream(text)
    tokens, targets = (rows[:most] for rows in stream.windows(length))
    if not len(tokens):
        raise CannotMeasure(f"the text has only {len(stream.tokens) - 1} tokens to predict")
    size = subject.settings.batch_size(length, len(tokens))
    for start in range(0, len(tokens), size):
        yield tokens[start : start + size], targets[start : start + size]


@jax.jit
def _selection(
    model: Transformer, tokens: Int[Array, "B T"]
) -> tuple[dict[str, Array], Int[Array, "L B Hkv T K"]]:
    """What the layers report of their selection [L], and its block ids."""
    mode = Mode(diagnostics=True, selections=True)
    _, _, aux = model.hidden_states(tokens, mode=mode)
    return {name: aux[name] for name in SELECTION_METRICS}, aux["block_ids"]


@jax.jit
def _overlap_by_layer(
    block_ids: Int[Array, "L B Hkv T K"], other: Int[Array, "L B Hkv T K"]
) -> Array:
    return jax.lax.map(lambda pair: selection_overlap(*pair), (block_ids, other))
