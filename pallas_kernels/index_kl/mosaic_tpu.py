"""`index_kl` on a TPU: what its kernels serve, how it is cut up, its gradients.

Selected blocks and the causal prefix differ in their lists only.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from pallas_kernels.index_kl.gradient_mosaic_tpu import index_k_gradient, index_q_gradient
from pallas_kernels.index_kl.prefix_tiles import first_visible, prefix_lists
from pallas_kernels.index_kl.tiles_mosaic_tpu import (
    INDEX_LSE,
    NOTHING,
    START,
    IndexKLConfig,
    Scales,
    Tiles,
)
from pallas_kernels.index_kl.value_mosaic_tpu import divergence, main_lse
from pallas_kernels.mosaic_tpu import LANES, LOG2E, Target, current_target
from pallas_kernels.residuals import LOG_SUM_EXP
from pallas_kernels.sparse_attention.mosaic_tpu import MIN_TILE, by_block, check_served, padded
from pallas_kernels.sparse_attention.reverse_tiles import reverse_tiles
from pallas_kernels.sparse_attention.tile_lists import tile_lists
from pallas_kernels.tracing import in_32_bits, refuse_varying
from pallas_kernels.tuning import shape_bucket, tuned
from pallas_kernels.visibility import visible_block_ids

# The block size of the dense form, whose support has none of its own.
_DENSE_BLOCK = 128
# Queries of its tiles, which all see the same blocks.
_PREFIX_QUERIES = 32


class _Options(NamedTuple):
    """What is known while tracing."""

    block_size: int
    scale: float
    index_scale: float
    config: IndexKLConfig
    target: Target


def index_kl(
    q: Float[Array, "B T Hq D"],
    k: Float[Array, "B S Hkv D"],
    index_q: Float[Array, "B T Hkv Di"],
    index_k: Float[Array, "B S Di"],
    block_ids: Int[Array, "B Hkv T K"] | None,
    segment_ids: Int[Array, "B S"] | None,
    query_offset: Int[Array, "B"] | int,
    main_lse: Float[Array, "B Hq T"] | None,
    *,
    block_size: int,
    scale: float,
    index_scale: float,
    config: IndexKLConfig | None = None,
) -> tuple[Float[Array, "B Hkv T"], Float[Array, "B Hkv T"]]:
    """KL(teacher || student) and the student's log-sum-exp per query and group, in nats.

    Only index_q and index_k have gradients, which are the same bits in every run.

    Args:
      q: bfloat16 or float32, of head_dim 64 or 128, at most 64 heads per group.
      k: main keys.
      index_q: index queries of 64 or 128 dims, in q's dtype.
      index_k: index keys.
      block_ids: the support's blocks; None for the whole causal prefix.
      segment_ids: document of each key slot, 0 for padding; None for one document per row.
      query_offset: the key slot of the first query, per row or for all.
      main_lse: log-sum-exp of the main scores over the support, as attention returns it; None to
        compute it here, at the price of one more pass over the keys.
      block_size: 64 or 128; of no matter without block ids.
      scale: of the main scores, positive.
      index_scale: of the index scores.
      config: the kernels' shape; None for the tuned one.

    Raises:
      NotImplementedError: no TPU, or arguments other than the above.
    """
    target = current_target()
    refuse_varying(q, k, index_q, index_k, block_ids, segment_ids, query_offset, main_lse)
    block_size = _DENSE_BLOCK if block_ids is None else block_size
    check_served(q, k, k, k.shape[2], block_size, scale)
    if {index_q.dtype, index_k.dtype} != {q.dtype}:
        raise NotImplementedError(
            f"the kernels take index_q and index_k in q's dtype {q.dtype}, not {index_q.dtype} and "
            f"{index_k.dtype}"
        )
    if index_q.shape[3] not in (64, 128):
        raise NotImplementedError(
            f"the kernels take an index dim of 64 or 128, not {index_q.shape[3]}"
        )
    config = config or _tuned(target, q, k, index_q, block_ids, block_size)
    options = _Options(block_size, float(scale), float(index_scale), config, target)
    offsets = jnp.broadcast_to(jnp.asarray(query_offset, jnp.int32), q.shape[:1])
    q, k, main_lse = jax.lax.stop_gradient((q, k, main_lse))
    return _align(options, index_q, index_k, q, k, block_ids, segment_ids, offsets, main_lse)


def _tuned(target: Target, q, k, index_q, block_ids, block_size: int) -> IndexKLConfig:
    """The tuned shape; by default large tiles without a selection, the smallest for decoding."""
    sizes = {"G": q.shape[2] // k.shape[2], "D": q.shape[3], "Di": index_q.shape[3]}
    bucket = shape_bucket(q.shape[1], **sizes, Bk=block_size)
    place = {"device_kind": target.chip.device_kind, "dtype": q.dtype.name, "bucket": bucket}
    kernel, queries = "index_kl.tpu", IndexKLConfig.queries
    if block_ids is None:
        kernel, queries = "index_kl.tpu_prefix", _PREFIX_QUERIES
    if q.shape[1] <= MIN_TILE:
        queries = MIN_TILE
    return tuned(kernel, IndexKLConfig(queries=queries), **place)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _align(options: _Options, *arrays):
    return _forward(options, *arrays)[0]


@in_32_bits
def _forward(options: _Options, index_q, index_k, q, k, block_ids, segment_ids, offsets, lse):
    """Results, and what the backward pass needs."""
    place = block_ids, segment_ids, offsets
    call = _call(options, q, k, index_q, index_k, *place)
    how = {"config": options.config, "target": options.target}
    if lse is None:
        values = main_lse(call.tiles, call.scales, **how)
        lse = call.by_query(values[..., : call.scales.heads])
        lse = jnp.moveaxis(lse, 3, 2).reshape(q.shape[0], q.shape[2], q.shape[1])
    values = divergence(call.with_statistics(lse), call.scales, **how)
    kl, index_lse = jnp.moveaxis(call.by_query(values[..., :2]), 3, 0)
    # Else rematerialisation runs the whole kernel again.
    index_lse = checkpoint_name(index_lse, LOG_SUM_EXP)
    return (kl, index_lse), (index_q, index_k, q, k, *place, lse, index_lse)


@in_32_bits
def _backward(options: _Options, kept, cotangents):
    """Gradients of index_q and index_k."""
    index_q, index_k, q, k, *place, lse, index_lse = kept
    d_kl, _ = cotangents  # the log-sum-exp is a constant to callers
    call = _call(options, q, k, index_q, index_k, *place)
    config, target = options.config, options.target
    # Of the student, and of the teacher, a sum over heads.
    student = d_kl * options.index_scale
    factors = student, student / call.scales.heads
    tiles = call.with_statistics(lse, index_lse, factors)
    d_index_q = index_q_gradient(tiles, call.scales, config=config, target=target)
    d_index_q = call.by_query(d_index_q).swapaxes(1, 2).astype(index_q.dtype)
    batch, groups = index_lse.shape[:2]
    owners = tiles.keys.shape[0] // groups
    slices = reverse_tiles(
        tiles.lists,
        queries=config.queries,
        tiles_per_group=tiles.lists.shape[0] // (batch * groups),
        tiles_per_row=tiles.lists.shape[0] // batch,
        num_blocks=owners // batch,
        block_size=options.block_size,
        tiles_per_slice=config.tiles_per_slice,
        cores=min(target.chip.num_cores, owners),
    )
    d_index_k = index_k_gradient(
        tiles, slices, call.scales, batch=batch, groups=groups, config=config, target=target
    )
    d_index_k = d_index_k.reshape(batch, -1, index_k.shape[2])[:, : index_k.shape[1]]
    return d_index_q, d_index_k.astype(index_k.dtype), *(None,) * 6


_align.defvjp(_forward, _backward)


@dataclasses.dataclass(frozen=True)
class _Call:
    """The arrays of a call by tile, without statistics, and how to get there and back.

    Attributes:
      tiles: statistics of START only.
      scales: of the scores.
      shape: batch rows, groups, queries, R.
    """

    tiles: Tiles
    scales: Scales
    shape: tuple[int, int, int, int]

    def by_tile(self, array: Float[Array, "B Hkv T width"]) -> Float[Array, "tiles R width"]:
        """By tile, with zeros for queries that are not there."""
        batch, groups, num_queries, queries = self.shape
        missing = self.tiles.lists.shape[0] // (batch * groups) * queries - num_queries
        array = jnp.pad(array, ((0, 0), (0, 0), (0, missing), (0, 0)))
        return array.reshape(-1, queries, array.shape[3])

    def by_query(self, array: Float[Array, "tiles R width"]) -> Float[Array, "B Hkv T width"]:
        """The other way."""
        batch, groups, num_queries, _ = self.shape
        return array.reshape(batch, groups, -1, array.shape[2])[:, :, :num_queries]

    def with_statistics(
        self,
        lse: Float[Array, "B Hq T"],
        index_lse: Float[Array, "B Hkv T"] | None = None,
        factors: tuple[Float[Array, "B Hkv T"], ...] = (),
    ) -> Tiles:
        """The tiles with natural log-sum-exps, and what the gradient is made of."""
        batch, groups, num_queries, _ = self.shape

        def log_sum_exps(array):
            # Of nothing: the probabilities that they are of become 0.
            array = jnp.where(jnp.isfinite(array), array * LOG2E, NOTHING)
            return self.by_tile(array)

        lse = log_sum_exps(jnp.moveaxis(lse.reshape(batch, groups, -1, num_queries), 2, 3))
        heads = jnp.pad(lse, ((0, 0), (0, 0), (0, INDEX_LSE - lse.shape[2])))
        others = self.tiles.statistics[..., INDEX_LSE:]
        if index_lse is not None:
            known = log_sum_exps(index_lse[..., None]), self.by_tile(jnp.stack(factors, -1))
            others = jnp.concatenate((*known, self.tiles.statistics[..., START:]), -1)
        return self.tiles._replace(statistics=jnp.concatenate((heads, others), -1))


def _call(options: _Options, q, k, index_q, index_k, block_ids, segment_ids, offsets) -> _Call:
    """Lays the arrays out by tile and by block."""
    batch, num_queries, _, _ = q.shape
    groups, queries, block_size = k.shape[2], options.config.queries, options.block_size
    multiple = queries * options.target.chip.num_cores
    q, index_q = padded(q, multiple), padded(index_q.astype(jnp.float32), multiple)
    keys, index_keys = by_block(k, block_size), by_block(index_k[:, :, None], block_size)
    num_blocks = keys.shape[0] // (batch * groups)
    index_keys = index_keys.reshape(batch, 1, num_blocks, *index_keys.shape[1:])
    index_keys = jnp.broadcast_to(index_keys, (batch, groups, *index_keys.shape[2:]))
    statistics = jnp.zeros((batch * groups * (q.shape[1] // queries), queries, LANES), jnp.float32)
    if block_ids is None:
        first = first_visible(segment_ids, offsets, q.shape[1])
        lists = prefix_lists(
            first,
            offsets,
            groups=groups,
            queries=queries,
            num_blocks=num_blocks,
            block_size=block_size,
        )
        first = jnp.broadcast_to(first[:, None], (batch, groups, first.shape[1]))
        statistics = statistics.at[..., START].set(first.reshape(-1, queries))
    else:
        lists = tile_lists(
            visible_block_ids(block_ids, segment_ids, offsets, block_size),
            offsets,
            queries=queries,
            num_tiles=q.shape[1] // queries,
            num_blocks=num_blocks,
        )
    tiles = Tiles(
        lists,
        _by_tile(q, groups, queries),
        _by_tile(index_q, groups, queries),
        statistics,
        keys,
        index_keys.reshape(-1, *index_keys.shape[3:]),
    )
    scales = Scales(
        heads=q.shape[2] // groups,
        main=options.scale * LOG2E,
        index=options.index_scale * LOG2E,
        starts=block_ids is None and segment_ids is not None,
    )
    return _Call(tiles, scales, (batch, groups, num_queries, queries))


def _by_tile(
    q: Float[Array, "B T heads D"], groups: int, queries: int
) -> Float[Array, "tiles rows D"]:
    """Of each tile the rows (head, query)."""
    batch, num_queries, heads, width = q.shape
    q = q.reshape(batch, num_queries // queries, queries, groups, heads // groups, width)
    return q.transpose(0, 3, 1, 4, 2, 5).reshape(-1, heads // groups * queries, width)
