"""Gradients of the index scores, and of the index queries through them, on Hopper."""

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from pallas_kernels.index_kl.tiles import TILE_QUERIES, Tiles
from pallas_kernels.index_kl.tiles_mosaic_gpu import (
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

# What the gradient needs of each query.
STUDENT_LSE, STUDENT_FACTOR, TEACHER_FACTOR = range(3)


def score_gradients(
    inputs: TileInputs,
    factors: Float[Array, "R factors 64"],
    tiles: Tiles,
    scales: Scales,
    config: TileConfig,
) -> tuple[Float[Array, "M 64 Bk"], Float[Array, "M 64 W"]]:
    """Gradients of each tile's index scores, and of its index queries through these.

    Args:
      inputs: see there.
      factors: by row: STUDENT_LSE the base-2 log-sum-exp of the index scores, and what student and
        teacher are multiplied with. The teacher has not been divided by 2^TEACHER_SHIFT * G.
      tiles: see there.
      scales: see there.
      config: the kernel's shape.

    Returns:
      STUDENT_FACTOR * student - TEACHER_FACTOR * teacher and its product with the index keys, in
      their dtype; 0 in rows of nobody.
    """
    dtype, width = inputs.index_k.dtype, inputs.index_k.shape[-1]
    shape = len(tiles.tiles), TILE_QUERIES
    out = (
        jax.ShapeDtypeStruct((*shape, scales.block_size), dtype),
        jax.ShapeDtypeStruct((*shape, width), dtype),
    )
    ending = Ending("index_kl_gradients", _write_gradients, dtype, out)
    gradients, partial = run_tiles(ending, inputs, tiles, scales, config, factors)
    return gradients, partial


def _write_gradients(worker: Worker, tile: Tile, slot, teacher):
    """Ends a tile."""
    smem, this = worker.smem, worker.number
    shape = TILE_QUERIES, worker.statics.scales.block_size

    def factor(column):
        return by_rows(load_rows(worker.refs.factors.at[tile.row_tile, column]), shape)

    # No more than teacher and index scores at a time, for registers are few.
    teacher = teacher * factor(TEACHER_FACTOR)
    scores = index_scores(worker, slot)
    # No probability exceeds 1; keys behind the query, masked below, might overflow.
    student = jnp.exp2(jnp.minimum(scores - factor(STUDENT_LSE), 0.0))
    gradient = student * factor(STUDENT_FACTOR) - teacher
    gradient = jnp.where(visible_keys(worker, tile), gradient, 0.0)
    # Probabilities are of the gradients' dtype here, and this tile's are no longer needed.
    gradients = smem.probabilities.at[this]
    gradients[...] = gradient.astype(gradients.dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(gradients, worker.results[0].at[tile.number])
    queries = smem.q.at[this, slot]
    queries[...] = matmul(gradients, smem.index_k.at[this], queries.shape).astype(queries.dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(queries, worker.results[1].at[tile.number])
    # Probabilities are written again, and the slot is loaded again, when the copies have read them.
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    plgpu.barrier_arrive(smem.q_empty.at[this, slot])
    plgpu.barrier_arrive(smem.index_empty.at[this])
