"""Sampled query rows of both ops against an oracle, before anything is timed.

At a million tokens no reference runs in full. The selection of sampled rows is held to all of their
float32 scores, by score gap, since sums in another order flip near-ties; the output of the same
rows is held to float64 attention over the blocks that the op itself selected.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from experiments.benchmarking.cases import Case

# Limits of a bf16 kernel. Scores are compared relative to the largest of their row.
SCORE_GAP, OUTPUT_ERROR, LSE_ERROR = 1e-4, 1e-2, 5e-3


class CheckError(AssertionError):
    """An op's result is wrong; nothing of the case is timed."""


def sample_rows(case: Case) -> np.ndarray:
    """Query positions: the first and last ones, those around a block's edge, the rest at random."""
    edge = min(case.block_size, case.length - 1)
    fixed = {0, 1, edge - 1, edge, case.length - 1, max(0, case.length - edge)}
    random = np.random.default_rng(case.seed).permutation(case.length)
    rows = np.concatenate([sorted(fixed), random])
    _, first = np.unique(rows, return_index=True)
    return np.sort(rows[np.sort(first)][: case.sampled_rows])


def exact_block_scores(
    index_q: Float[Array, "B T H Di"],
    index_k: Float[Array, "B S Di"],
    rows: np.ndarray,
    block_size: int,
) -> Float[np.ndarray, "R H N"]:
    """Float32 block scores of rows of the first sequence, unscaled and unmasked.

    The blocks before a row's own one are visible as a whole; only their scores mean anything.
    """
    return np.asarray(_pool(_token_scores(sampled(index_q, rows), index_k), block_size))


# Outside of any function: compiled once, not for every kind of selection anew.


@jax.jit
def sampled(x: Float[Array, "B T *rest"], rows: Int[np.ndarray, "R"]) -> Float[Array, "R *rest"]:
    """Rows of the first sequence of queries or outputs, in float32; x[0] would copy all of it."""
    return x[0, rows].astype(jnp.float32)


@jax.jit
def _token_scores(
    queries: Float[Array, "R H Di"], index_k: Float[Array, "B S Di"]
) -> Float[Array, "R H S"]:
    keys = index_k[0].astype(jnp.float32)
    return jnp.einsum(
        "rhd,sd->rhs", queries, keys, precision="highest", preferred_element_type=jnp.float32
    )


# Apart from the product, which XLA would otherwise tune together with the maximum.
@functools.partial(jax.jit, static_argnames="block_size")
def _pool(scores: Float[Array, "R H S"], block_size: int) -> Float[Array, "R H N"]:
    scores = jnp.pad(
        scores, ((0, 0), (0, 0), (0, -scores.shape[-1] % block_size)), constant_values=-jnp.inf
    )
    return scores.reshape(*scores.shape[:2], -1, block_size).max(-1)


@jax.jit
def _gathered(x: Float[Array, "B S H D"], slots: Int[np.ndarray, "R H L"]):
    """x[0, slots[r, h], h] of all rows at once, [R, H, L, D]."""
    return x[0, slots, jnp.arange(x.shape[2])[:, None]]


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
      scores: of `exact_block_scores`.
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


def exact_choice(scores: Float[np.ndarray, "R H N"], rows: np.ndarray, case: Case) -> np.ndarray:
    """The selection that the exact scores make, ids [R, H, K]."""
    ids = np.full((*scores.shape[:2], case.top_k), -1, np.int32)
    for row, row_scores, row_ids in zip(rows, scores, ids, strict=True):
        own = row // case.block_size
        for past, out in zip(row_scores[:, :own], row_ids, strict=True):
            best = np.sort(np.argsort(-past, kind="stable")[: case.top_k - 1])
            out[: len(best) + 1] = [*best, own]
    return ids


def exact_attention(
    q: Float[Array, "B T Hq D"],
    k: Float[Array, "B S Hkv D"],
    v: Float[Array, "B S Hkv D"],
    ids: Int[np.ndarray, "R Hkv K"],
    rows: np.ndarray,
    block_size: int,
) -> tuple[Float[np.ndarray, "R Hq D"], Float[np.ndarray, "R Hq"]]:
    """Float64 attention of rows of the first sequence over their blocks, and its log-sum-exp."""
    groups, head_dim = k.shape[2:]
    slots = ids[..., None].astype(np.int64) * block_size + np.arange(block_size)
    visible = (ids[..., None] >= 0) & (slots <= rows[:, None, None, None]) & (slots < k.shape[1])
    shape = (len(rows), groups, -1)
    slots, visible = slots.reshape(shape), visible.reshape(shape)
    queries_of_rows = np.asarray(sampled(q, rows), np.float64)
    places = np.where(visible, slots, 0).astype(np.int32)
    gathered = (np.asarray(_gathered(x, places)) for x in (k, v))
    outputs, log_sums = [], []
    for row_queries, row_visible, *row in zip(queries_of_rows, visible, *gathered, strict=True):
        keys, values = (np.asarray(x, np.float64) for x in row)
        queries = row_queries.reshape(groups, -1, head_dim)
        logits = np.einsum("hgd,hsd->hgs", queries, keys) * head_dim**-0.5
        logits = np.where(row_visible[:, None], logits, -np.inf)
        top = logits.max(-1, keepdims=True)
        weights = np.exp(logits - top)
        total = weights.sum(-1, keepdims=True)
        outputs.append(np.einsum("hgs,hsd->hgd", weights / total, values).reshape(-1, head_dim))
        log_sums.append((np.log(total) + top).reshape(-1))
    return np.stack(outputs), np.stack(log_sums)


def check_output(
    o: Float[np.ndarray, "R Hq D"],
    lse: Float[np.ndarray, "R Hq"],
    expected: tuple[np.ndarray, np.ndarray],
) -> dict[str, float]:
    """Holds sampled rows of the main branch to `exact_attention`.

    Raises:
      CheckError: a row's relative error, or its log-sum-exp's, above the limits.
    """
    error = worst_row_error(o, expected[0])
    lse_error = float(np.abs(lse - expected[1]).max())
    # not <= rather than >: a NaN must not pass
    if not error <= OUTPUT_ERROR or not lse_error <= LSE_ERROR:
        raise CheckError(f"the worst row is {error:.2g} off the oracle, its lse {lse_error:.2g}")
    return {"output_error": error, "lse_error": lse_error}


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
