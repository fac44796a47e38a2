"""Holds what the ops gave for sampled query rows to the exact results, before anything is timed.

A selection is held to its scores by gap, since sums in another order flip near-ties.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

# Limits of a bf16 kernel. Scores are compared relative to the largest of their row.
SCORE_GAP, OUTPUT_ERROR, LSE_ERROR, GRADIENT_ERROR = 1e-4, 1e-2, 5e-3, 2e-2


class CheckError(AssertionError):
    """An op's result is wrong; nothing of the case is timed."""


def check_selection(
    ids: Int[np.ndarray, "R H K"],
    scores: Float[np.ndarray, "R H N"],
    rows: np.ndarray,
    block_size: int,
    *,
    exact: bool,
) -> dict[str, float]:
    """Holds a selection with one forced local block to its scores.

    Args:
      ids: selected blocks of the sampled rows.
      scores: of `exact_rows.block_scores`.
      rows: their positions.
      block_size: Bk.
      exact: whether the gap must be that of rounding; an 8-bit index only has its recall reported.

    Returns:
      The recall of the exact selection's past blocks, and the largest score gap: how far the worst
      block chosen lies below the worst of the exact choice, relative to the row's largest score.

    Raises:
      CheckError: ids out of order, missing or in the future; or a gap too large.
    """
    recalls, gaps = [], [0.0]
    for row, row_ids, row_scores in zip(rows, ids, scores, strict=True):
        own = row // block_size
        count = min(ids.shape[-1], own + 1)
        for group, (chosen, past) in enumerate(zip(row_ids, row_scores[:, :own], strict=True)):
            _check_form(chosen, count, own, f"query {row}, group {group}")
            if count == 1:
                continue
            best = np.argsort(-past, kind="stable")[: count - 1]
            recalls.append(len(np.intersect1d(best, chosen)) / (count - 1))
            gap = past[best].min() - past[chosen[: count - 1]].min()
            gaps.append(float(gap / np.abs(past).max()))
    if exact and not max(gaps) <= SCORE_GAP:
        raise CheckError(f"a selected block scores {max(gaps):.2g} below the exact choice")
    recall = float(np.mean(recalls)) if recalls else 1.0
    return {"selection_recall": recall, "selection_gap": max(gaps)}


def _check_form(chosen: np.ndarray, count: int, own: int, where: str) -> None:
    valid, tail = chosen[:count], chosen[count:]
    if not (np.diff(valid) > 0).all() or valid[0] < 0 or valid[-1] != own or (tail != -1).any():
        raise CheckError(
            f"{where} selected {chosen.tolist()}: want {count} ascending ids, {own} the last, -1s"
        )


def check_output(
    o: Float[np.ndarray, "R Hq D"],
    lse: Float[np.ndarray, "R Hq"],
    expected: tuple[np.ndarray, np.ndarray],
) -> dict[str, float]:
    """Holds sampled rows of the main branch to `exact_rows.attention`.

    Raises:
      CheckError: a row's relative error, or its log-sum-exp's, above the limits.
    """
    error = worst_row_error(o, expected[0])
    lse_error = float(np.abs(lse - expected[1]).max())
    # not <= rather than >: a NaN must not pass
    if not error <= OUTPUT_ERROR or not lse_error <= LSE_ERROR:
        raise CheckError(f"the worst row is {error:.2g} off the oracle, its lse {lse_error:.2g}")
    return {"output_error": error, "lse_error": lse_error}


def check_gradients(pairs: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> dict[str, float]:
    """Holds sampled gradients, and the KL itself, to `exact_gradients`.

    Args:
      pairs: found and expected values by name.

    Returns:
      The relative errors, `<name>_error`.

    Raises:
      CheckError: one above the limit.
    """
    errors = {name: overall_error(*pair) for name, pair in pairs.items()}
    wrong = {name: error for name, error in errors.items() if not error <= GRADIENT_ERROR}
    if wrong:
        listed = ", ".join(f"{name} {error:.2g}" for name, error in wrong.items())
        raise CheckError(f"off the exact gradients: {listed}")
    return {f"{name}_error": error for name, error in errors.items()}


def worst_row_error(o: np.ndarray, expected: np.ndarray) -> float:
    """The largest ||o - expected|| / ||expected|| of a row, heads together."""
    rows = (len(o), -1)
    difference = np.linalg.norm((np.asarray(o, np.float64) - expected).reshape(rows), axis=1)
    return float((difference / np.linalg.norm(expected.reshape(rows), axis=1)).max())


def overall_error(o: np.ndarray, expected: np.ndarray) -> float:
    """||o - expected|| / ||expected|| over all rows."""
    return float(np.linalg.norm(np.asarray(o, np.float64) - expected) / np.linalg.norm(expected))


@jax.jit
def digest(o: Float[Array, "B T Hq D"]) -> Array:
    """A hash of every bit of an output, where two copies of it would not fit."""
    dtype = jnp.dtype(f"uint{8 * o.dtype.itemsize}")
    bits = jax.lax.bitcast_convert_type(o, dtype).astype(jnp.uint32)
    place = (
        jax.lax.broadcasted_iota(jnp.uint32, o.shape, 1) * jnp.uint32(2654435761)
        + jax.lax.broadcasted_iota(jnp.uint32, o.shape, 2) * jnp.uint32(40503)
        + jax.lax.broadcasted_iota(jnp.uint32, o.shape, 3) * jnp.uint32(2246822519)
    )
    return ((bits + 1) * (place | 1)).sum(dtype=jnp.uint32)
