"""What the KL's value needs of each query and block, on Hopper."""

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from pallas_kernels.index_kl.tiles import TILE_QUERIES, Tiles
from pallas_kernels.index_kl.tiles_mosaic_gpu import (
    NUM_TERMS,
    TEACHER_SHIFT,
    Ending,
    Scales,
    Tile,
    TileConfig,
    TileInputs,
    Worker,
    index_scores,
    run_tiles,
    visible_keys,
)
from pallas_kernels.mosaic_gpu import by_rows

# The terms of a query and block.
LSE, DIVERGENCE, MASS = range(NUM_TERMS)


def block_terms(
    inputs: TileInputs, tiles: Tiles, scales: Scales, config: TileConfig
) -> Float[Array, "M terms 64"]:
    """What each tile's queries and block contribute to the value, in base 2.

    Returns:
      Over the block's visible keys j, with teacher t and index scores x: LSE the log-sum-exp of x,
      DIVERGENCE the sum of t (log t - x + LSE), MASS the sum of t. Rows of nobody may hold
      anything.
    """
    out = jax.ShapeDtypeStruct((len(tiles.tiles), NUM_TERMS, TILE_QUERIES), jnp.float32)
    # float16 is the finer one for numbers of a known size.
    ending = Ending("index_kl_terms", _write_terms, jnp.float16, (out,))
    (terms,) = run_tiles(ending, inputs, tiles, scales, config)
    return terms


def _write_terms(worker: Worker, tile: Tile, slot, teacher):
    """Ends a tile."""
    smem, this = worker.smem, worker.number
    scores = index_scores(worker, slot)
    plgpu.barrier_arrive(smem.q_empty.at[this, slot])
    plgpu.barrier_arrive(smem.index_empty.at[this])
    shape = TILE_QUERIES, worker.statics.scales.block_size
    visible = visible_keys(worker, tile)
    scores = jnp.where(visible, scores, -jnp.inf)
    teacher = teacher * (2.0**-TEACHER_SHIFT / worker.statics.scales.num_heads)
    teacher = jnp.where(visible, teacher, 0.0)
    peak = scores.max(axis=1)
    shift = jnp.where(peak == -jnp.inf, 0.0, peak)
    lse = shift + jnp.log2(jnp.exp2(scores - by_rows(shift, shape)).sum(axis=1))
    terms = teacher * (jnp.log2(teacher) - scores + by_rows(lse, shape))
    # A teacher that is NaN shows in its mass.
    divergence = jnp.where(teacher > 0.0, terms, 0.0).sum(axis=1)
    # The copy of the tile before has read them.
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    for term, value in ((LSE, lse), (DIVERGENCE, divergence), (MASS, teacher.sum(axis=1))):
        smem.terms.at[this, term][...] = value
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(smem.terms.at[this], worker.results[0].at[tile.number])
