"""`sparse_attention` on a TPU: what its kernels serve, how it is cut up, its gradients."""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.mosaic_tpu import Target, current_target
from pallas_kernels.residuals import named
from pallas_kernels.sparse_attention.backward_mosaic_tpu import BackwardConfig, backward
from pallas_kernels.sparse_attention.forward_mosaic_tpu import TileConfig, forward
from pallas_kernels.sparse_attention.tile_lists import tile_lists
from pallas_kernels.tracing import in_32_bits, refuse_varying
from pallas_kernels.tuning import shape_bucket, tuned
from pallas_kernels.visibility import visible_block_ids

# Queries of the smallest tile, for decoding.
MIN_TILE = 8
# Heads of a group are rows of a tile's matrix products.
MAX_GROUP = 64


@dataclasses.dataclass(frozen=True)
class SparseAttentionConfig:
    """Tile sizes; None for the tuned ones.

    Attributes:
      forward: of the forward pass.
      backward: of the gradients.
    """

    forward: TileConfig | None = None
    backward: BackwardConfig | None = None


class _Options(NamedTuple):
    """What is known while tracing."""

    block_size: int
    scale: float
    config: SparseAttentionConfig
    target: Target


def sparse_attention(
    q: Float[Array, "B T Hq D"],
    k: Float[Array, "B S Hkv D"] | Float[Array, "P Hkv Bk D"],
    v: Float[Array, "B S Hkv D"] | Float[Array, "P Hkv Bk D"],
    block_ids: Int[Array, "B Hkv T K"],
    segment_ids: Int[Array, "B S"] | None,
    query_offset: Int[Array, "B"] | int,
    *,
    block_size: int,
    scale: float,
    page_table: Int[Array, "B N"] | None = None,
    config: SparseAttentionConfig | None = None,
) -> tuple[Float[Array, "B T Hq D"], Float[Array, "B Hq T"]]:
    """Attention over the visible tokens of the selected blocks: output and log-sum-exp.

    Args:
      q: bfloat16 or float32, of head_dim 64 or 128.
      k: keys, at most 64 query heads each; with a page table [P, Hkv, Bk, D].
      v: values.
      block_ids: any number per query.
      segment_ids: document of each key slot, 0 for padding; None for one document per row.
      query_offset: the key slot of the first query, per row or for all.
      block_size: 64 or 128.
      scale: of the scores, positive.
      page_table: the page of each block; a block without one, -1, counts as not selected. Pages
        have no gradients.
      config: tile sizes.

    Raises:
      NotImplementedError: no TPU, or arguments other than the above.
    """
    target = current_target()
    refuse_varying(q, k, v, block_ids, segment_ids, query_offset, page_table)
    groups = k.shape[2] if page_table is None else k.shape[1]
    check_served(q, k, v, groups, block_size, scale)
    options = _Options(block_size, float(scale), config or SparseAttentionConfig(), target)
    offsets = jnp.broadcast_to(jnp.asarray(query_offset, jnp.int32), q.shape[:1])
    if page_table is not None:
        return _attend_to_pages(options, q, k, v, block_ids, offsets, page_table)
    return _attention(options, q, k, v, block_ids, segment_ids, offsets)


def check_served(q, k, v, groups: int, block_size: int, scale: float) -> None:
    """Raises NotImplementedError for what the kernels are not written for."""
    dtypes = {array.dtype.name for array in (q, k, v)}
    if len(dtypes) > 1 or not dtypes <= {"bfloat16", "float32"}:
        raise NotImplementedError(
            f"the kernels take q, k and v all in bfloat16 or all in float32, not {q.dtype}, "
            f"{k.dtype} and {v.dtype}"
        )
    if q.shape[3] not in (64, 128):
        raise NotImplementedError(f"the kernels take a head_dim of 64 or 128, not {q.shape[3]}")
    if block_size not in (64, 128):
        raise NotImplementedError(f"the kernels take a block_size of 64 or 128, not {block_size}")
    if q.shape[2] // groups > MAX_GROUP:
        raise NotImplementedError(
            f"the kernels take at most {MAX_GROUP} query heads per KV head, not "
            f"{q.shape[2] // groups}"
        )
    if not scale > 0:
        raise NotImplementedError(f"the kernels take a positive scale, not {scale}")


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(options: _Options, q, k, v, block_ids, segment_ids, offsets):
    return _forward(options, q, k, v, block_ids, segment_ids, offsets)[0]


@in_32_bits
def _forward(options: _Options, q, k, v, block_ids, segment_ids, offsets):
    """Results, and what the backward pass needs."""
    ids = visible_block_ids(block_ids, segment_ids, offsets, options.block_size)
    keys, values = (by_block(array, options.block_size) for array in (k, v))
    o, lse = named(*_attend(options, q, keys, values, ids, offsets))
    return (o, lse), (q, k, v, block_ids, segment_ids, offsets, o, lse)


@in_32_bits
def _attend_to_pages(options: _Options, q, k, v, block_ids, offsets, page_table):
    ids = visible_block_ids(block_ids, None, offsets, options.block_size)
    rows = jnp.arange(len(ids))[:, None, None, None]
    ids = jnp.where(page_table[rows, jnp.maximum(ids, 0)] >= 0, ids, -1)
    keys, values = (array.reshape(-1, *array.shape[2:]) for array in (k, v))
    return _attend(options, q, keys, values, ids, offsets, page_table)


def _attend(options: _Options, q, keys, values, ids, offsets, page_table=None):
    """Output and log-sum-exp from blocks of keys and values, one head each."""
    (batch, num_queries, heads, head_dim), groups = q.shape, ids.shape[1]
    config = options.config.forward or _tuned(options, q, groups, "forward", TileConfig())
    tile = config.queries * options.target.chip.num_cores
    queries = by_group(padded(q, tile), groups)
    pages = len(keys) // (batch * groups) if page_table is None else page_table.shape[1]
    lists = tile_lists(
        ids,
        offsets,
        queries=config.queries,
        num_tiles=queries.shape[2] // config.queries,
        num_blocks=pages,
        page_table=page_table,
    )
    o, lse = forward(
        queries, keys, values, lists, scale=options.scale, config=config, target=options.target
    )
    o = o.reshape(batch, heads, -1, head_dim).swapaxes(1, 2)[:, :num_queries]
    return o, lse.reshape(batch, heads, -1)[:, :, :num_queries]


@in_32_bits
def _backward(options: _Options, kept, cotangents):
    q, k, v, block_ids, segment_ids, offsets, o, lse = kept
    do, d_lse = cotangents
    block_size = options.block_size
    config = options.config.backward or _tuned(options, q, k.shape[2], "backward", BackwardConfig())
    ids = visible_block_ids(block_ids, segment_ids, offsets, block_size)
    delta = jnp.einsum("bthd,bthd->bht", o, do, preferred_element_type=jnp.float32) - d_lse
    keys, values = (by_block(array, block_size) for array in (k, v))
    dq, dk, dv = backward(
        q,
        keys,
        values,
        ids,
        offsets,
        lse,
        do,
        delta,
        scale=options.scale,
        config=config,
        target=options.target,
    )
    dk, dv = (_from_blocks(array, k) for array in (dk, dv))
    return dq, dk, dv, None, None, None


_attention.defvjp(_forward, _backward)


def by_group(q: Float[Array, "B T Hq D"], groups: int) -> Float[Array, "rows G T D"]:
    """Per batch row and group the heads of all queries: a head's queries lie side by side."""
    batch, num_queries, heads, head_dim = q.shape
    return q.swapaxes(1, 2).reshape(batch * groups, heads // groups, num_queries, head_dim)


def by_block(k: Float[Array, "B S Hkv D"], block_size: int) -> Float[Array, "pages Bk D"]:
    """Blocks of one head each, by batch row, then head: what one copy fetches."""
    k = padded(k, block_size)
    return k.swapaxes(1, 2).reshape(-1, block_size, k.shape[3])


def _from_blocks(
    blocks: Float[Array, "pages Bk D"], like: Float[Array, "B S Hkv D"]
) -> Float[Array, "B S Hkv D"]:
    """What `by_block` took apart."""
    batch, num_keys, groups, head_dim = like.shape
    return blocks.reshape(batch, groups, -1, head_dim).swapaxes(1, 2)[:, :num_keys]


def padded(array: Array, multiple: int) -> Array:
    """Zeros behind axis 1 up to a multiple."""
    widths = [(0, 0), (0, -array.shape[1] % multiple)] + [(0, 0)] * (array.ndim - 2)
    return jnp.pad(array, widths)


def _tuned[Config](options: _Options, q, groups: int, which: str, default: Config) -> Config:
    """The tuned tile sizes of a pass, "forward" or "backward"; while decoding the smallest tile."""
    if q.shape[1] <= MIN_TILE:
        return dataclasses.replace(default, queries=MIN_TILE)  # pyrefly: ignore
    bucket = shape_bucket(q.shape[1], G=q.shape[2] // groups, D=q.shape[3], Bk=options.block_size)
    kind = options.target.chip.device_kind
    place = {"device_kind": kind, "dtype": q.dtype.name, "bucket": bucket}
    return tuned(f"sparse_attention.tpu_{which}", default, **place)
