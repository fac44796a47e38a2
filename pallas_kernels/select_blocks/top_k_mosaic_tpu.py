"""Exact top-k on TPU over block scores in VMEM: blocks on sublanes, rows on lanes.

K rounds over the blocks that a tile sees, 8 of them (a *group*) per register. Every sublane keeps
the best block it meets, the first among equals; the best of the 8 sublanes is the round's block,
the lowest id among equals, and the next round takes it out while it goes by.
"""

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.mosaic_tpu import SUBLANES
from pallas_kernels.select_blocks.scores_mosaic_tpu import SPOILT

# Behind every block id.
ABSENT = jnp.iinfo(jnp.int32).max


def mark_candidates(
    scores_ref,
    own,
    first,
    begin,
    end,
    *,
    key_scales_ref,
    query_scales,
    scale: float,
    num_local_blocks: int,
    num_sink_blocks: int,
    unroll: int,
) -> None:
    """Rewrites scores in place: +inf for forced blocks, -inf for those not to be chosen.

    Args:
      scores_ref: [N, rows] float32 maxima of the products.
      own: [1, rows] each row's own block, -1 for rows that select nothing.
      first: [1, rows] the first block that it sees; None for 0.
      begin: the first group of 8 blocks.
      end: the end of the groups.
      key_scales_ref: [N, 1] of 8-bit keys, or None.
      query_scales: [1, rows] of 8-bit queries, or None.
      scale: of the products.
      num_local_blocks: blocks forced up to the own one.
      num_sink_blocks: blocks forced from the first one on.
      unroll: groups at once.
    """
    sublane = lax.broadcasted_iota(jnp.int32, (SUBLANES, own.shape[1]), 0)
    local = own - num_local_blocks
    sink = num_sink_blocks if first is None else first + num_sink_blocks

    def mark(group):
        rows = _rows(group)
        score = scores_ref[rows, :]
        score = jnp.where(score == SPOILT, -jnp.inf, score)
        if key_scales_ref is not None:
            score = score * key_scales_ref[rows, :] * query_scales
            score = jnp.where(jnp.isnan(score), -jnp.inf, score)  # of a NaN among keys or queries
        score = score * scale
        block = sublane + group * SUBLANES
        score = jnp.minimum(score, jnp.finfo(jnp.float32).max)  # an overflow is not forced
        score = jnp.where((block > local) | (block < sink), jnp.inf, score)
        seen = block <= own
        if first is not None:
            seen &= block >= first
        scores_ref[rows, :] = jnp.where(seen, score, -jnp.inf)

    _each_group(begin, end, unroll, lambda group, _: mark(group), None)


def choose(scores_ref, chosen_ref, begin, end, *, unroll: int) -> None:
    """Writes the ids of the best blocks, best first, then `ABSENT`; takes their scores out.

    Args:
      scores_ref: [N, rows] as `mark_candidates` leaves it.
      chosen_ref: [K, rows] int32.
      begin: the first group of 8 blocks.
      end: the end of the groups.
      unroll: groups at once.
    """
    shape = (SUBLANES, scores_ref.shape[1])
    sublane = lax.broadcasted_iota(jnp.int32, shape, 0)

    def choose_one(rank, taken):
        def look(group, best):
            best_score, best_group = best
            rows = _rows(group)
            score = jnp.where(taken == group, -jnp.inf, scores_ref[rows, :])
            scores_ref[rows, :] = score
            better = score > best_score
            return jnp.where(better, score, best_score), jnp.where(better, group, best_group)

        nothing = jnp.full(shape, -jnp.inf, jnp.float32), jnp.zeros(shape, jnp.int32)
        score, group = _each_group(begin, end, unroll, look, nothing)
        block = group * SUBLANES + sublane
        highest = score.max(0, keepdims=True)
        candidates = jnp.where((score == highest) & (score > -jnp.inf), block, ABSENT)
        best = candidates.min(0, keepdims=True)
        chosen_ref[pl.ds(rank, 1), :] = best
        return jnp.where(block == best, group, -1)

    lax.fori_loop(0, chosen_ref.shape[0], choose_one, jnp.full(shape, -1, jnp.int32))


def write_ascending(chosen_ref, ids_ref) -> None:
    """Sorts [K, rows] ids along K into another buffer; -1 for `ABSENT`."""

    def write_next(rank, last):
        chosen = chosen_ref[...]
        lowest = jnp.where(chosen > last, chosen, ABSENT).min(0, keepdims=True)
        ids_ref[pl.ds(rank, 1), :] = jnp.where(lowest == ABSENT, -1, lowest)
        return lowest

    nothing = jnp.full((1, chosen_ref.shape[1]), -1, jnp.int32)
    lax.fori_loop(0, chosen_ref.shape[0], write_next, nothing)


def _rows(group):
    return pl.ds(pl.multiple_of(group * SUBLANES, SUBLANES), SUBLANES)


def _each_group(begin, end, unroll: int, body, carry):
    """A loop over groups, `unroll` at once: those beyond the end are there and never chosen."""

    def step(number, carry):
        for i in range(unroll):
            carry = body(begin + number * unroll + i, carry)
        return carry

    return lax.fori_loop(0, pl.cdiv(end - begin, unroll), step, carry)
