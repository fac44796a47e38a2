"""Value of the KL on a TPU: the divergence and both log-sum-exps, tile by tile.

The teacher is a mean over heads of probabilities, so that the heads' log-sum-exps must be known
before: a pass over the main scores makes them where they are not given.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.index_kl.tiles_mosaic_tpu import (
    IndexKLConfig,
    Scales,
    Tiles,
    first_slots,
    head_lse,
    over_tiles,
    pieces,
    teacher,
)
from pallas_kernels.mosaic_tpu import HIDDEN, LANES, LOG2E, Target, product

# A teacher's probability below is 0: its logarithm is not taken.
_TINY = 2.0**-126


def main_lse(
    tiles: Tiles, scales: Scales, *, config: IndexKLConfig, target: Target
) -> Float[Array, "tiles R 128"]:
    """The natural log-sum-exp of the main scores, head by head along the lanes; -inf for nothing.

    Args:
      tiles: the call; of the statistics only START is read.
      scales: of the scores.
      config: the kernel's shape.
      target: what the kernel is traced for.
    """
    rows = tiles.q.shape[1], LANES
    (lse,) = over_tiles(
        functools.partial(_main_lse, scales, config),
        tiles,
        (tiles.keys,),
        results=(LANES,),
        sums=(rows, rows),
        config=config,
        target=target,
        name="index_kl_main_lse",
    )
    return lse


def _main_lse(scales, config, q_ref, _, statistics, lse_ref, top, total, __, ring):
    q, (keys,) = q_ref[0], ring.buffers
    start = first_slots(statistics[0], scales)
    shape = scales.heads, config.queries, LANES
    top[...] = jnp.full(top.shape, HIDDEN, jnp.float32)
    total[...] = jnp.zeros(total.shape, jnp.float32)

    def compute(step, slot, count):
        for at, seen in pieces(ring, config, step, count, start):
            s = (product(q, keys[slot, at], 1) * scales.main).reshape(shape)
            _add(top, total, jnp.where(seen, s, HIDDEN).reshape(top.shape))

    ring.run(config.blocks_per_part, compute)
    lse = _log_sum_exp(top, total).reshape(*shape[:2], 1)
    lane = jax.lax.broadcasted_iota(jnp.int32, shape[1:], 1)
    placed = jnp.zeros(shape[1:], jnp.float32)
    for h in range(scales.heads):
        placed = jnp.where(lane == h, lse[h] / LOG2E, placed)
    lse_ref[0] = placed


def divergence(
    tiles: Tiles, scales: Scales, *, config: IndexKLConfig, target: Target
) -> Float[Array, "tiles R 128"]:
    """At lane 0 the divergence, at 1 the student's natural log-sum-exp; 0 and -inf for nothing.

    Args:
      tiles: the call, with the heads' log-sum-exps.
      scales: of the scores.
      config: the kernel's shape.
      target: what the kernel is traced for.
    """
    rows = config.queries, LANES
    (values,) = over_tiles(
        functools.partial(_divergence, scales, config),
        tiles,
        (tiles.keys, tiles.index_keys),
        results=(LANES,),
        sums=(rows,) * 4,
        config=config,
        target=target,
        name="index_kl_divergence",
    )
    return values


def _divergence(
    scales, config, q_ref, index_q_ref, statistics, value_ref, top, total, mass, terms, _, ring
):
    """Each lane sums up its own keys; terms are those of t log t - t s."""
    keys, index_keys = ring.buffers
    q, index_q = q_ref[0], index_q_ref[0].astype(index_keys.dtype)
    lse = head_lse(statistics[0], scales.heads)
    start = first_slots(statistics[0], scales)
    top[...] = jnp.full(top.shape, HIDDEN, jnp.float32)
    for ref in (total, mass, terms):
        ref[...] = jnp.zeros(ref.shape, jnp.float32)

    def compute(step, slot, count):
        for at, seen in pieces(ring, config, step, count, start):
            t = teacher(q, keys[slot, at], lse, scales.main) * (1 / scales.heads)
            t = jnp.where(seen, t, 0)
            s = product(index_q, index_keys[slot, at], 1) * scales.index
            s = jnp.where(seen, s, HIDDEN)
            mass[...] += t
            terms[...] += jnp.where(t > _TINY, t * (jnp.log2(t) - s), 0)
            _add(top, total, s)

    ring.run(config.blocks_per_part, compute)
    index_lse = _log_sum_exp(top, total)
    # The teacher sums up to 1 but for rounding: with its sum, a factor of all weights cancels.
    kl = terms[...].sum(-1, keepdims=True) + mass[...].sum(-1, keepdims=True) * index_lse
    kl = jnp.where(index_lse > HIDDEN, kl, 0)
    lane = jax.lax.broadcasted_iota(jnp.int32, value_ref.shape[1:], 1)
    value_ref[0] = jnp.where(lane == 0, kl, index_lse) / LOG2E


def _add(top, total, s) -> None:
    """Scores join the running softmax of their lanes."""
    before = top[...]
    highest = jnp.maximum(before, s)
    top[...] = highest
    total[...] = total[...] * jnp.exp2(before - highest) + jnp.exp2(s - highest)


def _log_sum_exp(top, total):
    """Over all lanes, [rows, 1]; -inf where nothing was seen."""
    highest = top[...].max(-1, keepdims=True)
    # Lanes that saw nothing have a weight of 0 unless none did.
    weight = (total[...] * jnp.exp2(top[...] - highest)).sum(-1, keepdims=True)
    seen = highest > HIDDEN
    return jnp.where(seen, highest + jnp.log2(jnp.where(seen, weight, 1)), -jnp.inf)
