"""Exact results of sampled query rows, in float32 scores and float64 attention.

At a million tokens no reference runs in full. The output of a row is computed over the blocks that
the op itself selected.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from experiments.benchmarking.cases import Case


def sample_rows(case: Case) -> np.ndarray:
    """Query positions: the first and last ones, those around a block's edge, the rest at random."""
    edge = min(case.block_size, case.length - 1)
    fixed = {0, 1, edge - 1, edge, case.length - 1, max(0, case.length - edge)}
    random = np.random.default_rng(case.seed).permutation(case.length)
    rows = np.concatenate([sorted(fixed), random])
    _, first = np.unique(rows, return_index=True)
    return np.sort(rows[np.sort(first)][: case.sampled_rows])


def block_scores(
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
def gathered(x: Float[Array, "B S H D"], slots: Int[np.ndarray, "R H L"]):
    """x[0, slots[r, h], h] of all rows at once, [R, H, L, D]."""
    return x[0, slots, jnp.arange(x.shape[2])[:, None]]


def choice(scores: Float[np.ndarray, "R H N"], rows: np.ndarray, case: Case) -> np.ndarray:
    """The selection that the exact scores make, ids [R, H, K]."""
    ids = np.full((*scores.shape[:2], case.top_k), -1, np.int32)
    for row, row_scores, row_ids in zip(rows, scores, ids, strict=True):
        own = row // case.block_size
        for past, out in zip(row_scores[:, :own], row_ids, strict=True):
            best = np.sort(np.argsort(-past, kind="stable")[: case.top_k - 1])
            out[: len(best) + 1] = [*best, own]
    return ids


def attention(
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
    arrays = (np.asarray(gathered(x, places)) for x in (k, v))
    outputs, log_sums = [], []
    for row_queries, row_visible, *row in zip(queries_of_rows, visible, *arrays, strict=True):
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
