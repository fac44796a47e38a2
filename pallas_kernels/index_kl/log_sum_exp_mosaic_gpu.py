"""The student's log-sum-exp over each block, on Hopper: without it no probability is known."""

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
    run_tiles,
    visible_keys,
)
from pallas_kernels.mosaic_gpu import by_rows


def block_log_sum_exp(
    inputs: TileInputs, tiles: Tiles, scales: Scales, config: TileConfig
) -> Float[Array, "M 64"]:
    """Log-sum-exp of each query's index scores over the visible keys of its block, in base 2.

    -inf where it sees none; rows of nobody may hold anything.
    """
    out = jax.ShapeDtypeStruct((len(tiles.tiles), TILE_QUERIES), jnp.float32)
    ending = Ending("index_kl_log_sum_exp", _write, False, (out,))
    (lse,) = run_tiles(ending, inputs, tiles, scales, config)
    return lse


def _write(worker: Worker, tile: Tile, slot, _):
    """Ends a tile."""
    smem, this = worker.smem, worker.number
    scores = index_scores(worker, slot)
    plgpu.barrier_arrive(smem.q_empty.at[this, slot])
    plgpu.barrier_arrive(smem.index_empty.at[this])
    shape = TILE_QUERIES, worker.statics.scales.block_size
    scores = jnp.where(visible_keys(worker, tile), scores, -jnp.inf)
    peak = scores.max(axis=1)
    shift = jnp.where(peak == -jnp.inf, 0.0, peak)
    total = jnp.exp2(scores - by_rows(shift, shape)).sum(axis=1)
    # The copy of the tile before has read them.
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    smem.per_query.at[this][...] = shift + jnp.log2(total)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(smem.per_query.at[this], worker.results[0].at[tile.number])
