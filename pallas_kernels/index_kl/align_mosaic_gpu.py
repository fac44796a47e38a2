"""Value of the KL and the gradients of its index scores and index queries, in one go, on Hopper.

The teacher costs more than all the rest together, so that it is made once: what a query's
divergence will be multiplied with is known beforehand.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from pallas_kernels.index_kl.tiles import TILE_QUERIES, Tiles
from pallas_kernels.index_kl.tiles_mosaic_gpu import (
    TEACHER_SHIFT,
    Ending,
    Scales,
    Tile,
    TileConfig,
    TileInputs,
    Worker,
    index_scores,
    load_rows,
    run_tiles,
    visible_keys,
)
from pallas_kernels.mosaic_gpu import by_rows, matmul

# What is known of each query: the base-2 log-sum-exp of its index scores, and the weight of its
# divergence times the scale of its index scores.
STUDENT_LSE, WEIGHT = range(2)

# 0 log 0 is 0, so that any finite logarithm will do for a teacher of 0.
_LEAST = 2.0**-126


class Alignment(NamedTuple):
    """What tiles make of teacher t and student s; 0 in rows of nobody.

    Attributes:
      divergence: per query and block, sum of t (log t - log s) over the block's keys, in base 2;
        rows of nobody may hold anything.
      gradients: of the index scores, WEIGHT * (s - t), in the inputs' dtype.
      index_q: their product with the index keys.
    """

    divergence: Float[Array, "M 64"]
    gradients: Float[Array, "M 64 Bk"]
    index_q: Float[Array, "M 64 W"]


def align_tiles(
    inputs: TileInputs,
    factors: Float[Array, "R factors 64"],
    tiles: Tiles,
    scales: Scales,
    config: TileConfig,
) -> Alignment:
    """Value and gradients of each tile.

    Args:
      inputs: see there.
      factors: by row, STUDENT_LSE and WEIGHT.
      tiles: see there.
      scales: see there.
      config: the kernel's shape.
    """
    dtype, width = inputs.index_k.dtype, inputs.index_k.shape[-1]
    shape = len(tiles.tiles), TILE_QUERIES
    out = (
        jax.ShapeDtypeStruct(shape, jnp.float32),
        jax.ShapeDtypeStruct((*shape, scales.block_size), dtype),
        jax.ShapeDtypeStruct((*shape, width), dtype),
    )
    ending = Ending("index_kl_alignment", _write, True, out)
    return Alignment(*run_tiles(ending, inputs, tiles, scales, config, factors))


def _write(worker: Worker, tile: Tile, slot, teacher):
    """Ends a tile."""
    smem, this = worker.smem, worker.number
    to_divergence, to_gradients, to_index_q = (ref.at[tile.number] for ref in worker.results)
    shape = TILE_QUERIES, worker.statics.scales.block_size

    def factor(column):
        return by_rows(load_rows(worker.refs.factors.at[tile.row_tile, column]), shape)

    visible = visible_keys(worker, tile)
    teacher = teacher * (2.0**-TEACHER_SHIFT / worker.statics.scales.num_heads)
    teacher = jnp.where(visible, teacher, 0.0)
    log_student = index_scores(worker, slot) - factor(STUDENT_LSE)
    terms = teacher * (jnp.log2(jnp.maximum(teacher, _LEAST)) - log_student)
    smem.per_query.at[this][...] = terms.sum(axis=1)
    # No probability exceeds 1; keys behind the query, hidden here, might overflow.
    student = jnp.exp2(jnp.where(visible, jnp.minimum(log_student, 0.0), -jnp.inf))
    # The tile's probabilities are no longer needed.
    gradients = smem.staging[1].at[this]
    gradients[...] = ((student - teacher) * factor(WEIGHT)).astype(gradients.dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(smem.per_query.at[this], to_divergence)
    plgpu.copy_smem_to_gmem(gradients, to_gradients)
    queries = smem.q.at[this, slot]
    queries[...] = matmul(gradients, smem.index_k.at[this], queries.shape).astype(queries.dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(queries, to_index_q)
    # All of these are written again, and the slot is loaded again, when the copies have read them.
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    plgpu.barrier_arrive(smem.q_empty.at[this, slot])
    plgpu.barrier_arrive(smem.index_empty.at[this])
