"""`sparse_attention` on NVIDIA Hopper: what its kernels serve, which runs, how gradients are taken.

Two schemes compute the same. Union tiles load a block once for neighbouring queries: cheap where
these agree. KV-outer visits every block once: its cost does not depend on the selection. Which is
cheaper shows in how many distinct blocks the queries of a warpgroup have; that is measured on the
device, and one of the two compiled branches runs.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.mosaic_gpu import current_target
from pallas_kernels.residuals import named
from pallas_kernels.sparse_attention.backward import BackwardConfig, backward, backward_chunks
from pallas_kernels.sparse_attention.backward_mosaic_gpu import GradientConfig
from pallas_kernels.sparse_attention.chunks_mosaic_gpu import Chunks, chunk_lists
from pallas_kernels.sparse_attention.combine_mosaic_gpu import CombineConfig
from pallas_kernels.sparse_attention.kv_outer import KVOuterConfig, kv_outer
from pallas_kernels.sparse_attention.kv_outer_mosaic_gpu import TILE_ROWS, default_config
from pallas_kernels.sparse_attention.union_mosaic_gpu import (
    WARPGROUP_ROWS,
    UnionConfig,
    padded_group,
    union,
)
from pallas_kernels.sparse_attention.union_tiles import mean_union
from pallas_kernels.tracing import in_32_bits, indivisible, refuse_varying
from pallas_kernels.tuning import shape_bucket, tuned
from pallas_kernels.visibility import visible_block_ids

SCHEMES = ("auto", "union", "kv_outer")

# Of so many runs of neighbouring queries one is looked at to measure their overlap.
_SAMPLE_EVERY = 16

# Fewer queries are decoding, where gathering by key block has nothing to share.
MIN_QUERIES = 64


@dataclasses.dataclass(frozen=True)
class SparseAttentionConfig:
    """Which scheme runs, and how.

    Attributes:
      scheme: "union", "kv_outer", or "auto" for the cheaper one of each call.
      union: the union kernel's shape; None for the tuned one.
      kv_outer: the KV-outer kernels' shape; None for the tuned one.
      max_union: with "auto", union tiles run if the mean number of distinct blocks over the queries
        of a warpgroup is at most so many times the mean number of blocks of a query.
      backward: the backward pass's shape, which all schemes share; what it leaves open is tuned.
        The forward pass of a gradient is cut as it is, and takes no more memory.
    """

    scheme: str = "auto"
    union: UnionConfig | None = None
    kv_outer: KVOuterConfig | None = None
    max_union: float = 2.25
    backward: BackwardConfig = dataclasses.field(default_factory=BackwardConfig)

    def __post_init__(self):
        if self.scheme not in SCHEMES:
            raise ValueError(f"scheme={self.scheme!r}: choose one of {', '.join(SCHEMES)}")


class _Options(NamedTuple):
    """What is known while tracing; `query_offset` is None if it is an array."""

    block_size: int
    scale: float
    query_offset: int | None
    config: SparseAttentionConfig


def sparse_attention(
    q: Float[Array, "B T Hq D"],
    k: Float[Array, "B S Hkv D"],
    v: Float[Array, "B S Hkv D"],
    block_ids: Int[Array, "B Hkv T K"],
    segment_ids: Int[Array, "B S"] | None,
    query_offset: Int[Array, "B"] | int,
    *,
    block_size: int,
    scale: float,
    config: SparseAttentionConfig | None = None,
) -> tuple[Float[Array, "B T Hq D"], Float[Array, "B Hq T"]]:
    """Attention over the visible tokens of the selected blocks: output and log-sum-exp.

    Differentiable in q, k and v, by kernels that give the same bits in every run.

    Args:
      q: bfloat16 or float16, at least 64 queries of head_dim 64 or 128.
      k: keys, at most 64 query heads each.
      v: values.
      block_ids: up to 64 per query.
      segment_ids: document of each key slot, 0 for padding; None for one document per row.
      query_offset: the key slot of the first query, per row or for all.
      block_size: 64 or 128.
      scale: of the scores, positive.
      config: which kernels run; None for the cheaper ones in their tuned shapes.

    Raises:
      NotImplementedError: no Hopper GPU, or arguments other than the above.
    """
    current_target()
    refuse_varying(q, k, v, block_ids, segment_ids, query_offset)
    _check_served(q, k, v, block_ids, block_size, scale)
    known = isinstance(query_offset, int)
    config = config or SparseAttentionConfig()
    options = _Options(block_size, scale, query_offset if known else None, config)
    offset = None if known else query_offset
    return _attention(options, q, k, v, block_ids, segment_ids, offset)


def _check_served(q, k, v, block_ids, block_size: int, scale: float) -> None:
    """Raises NotImplementedError for what the kernels are not written for."""
    (_, num_queries, num_heads, head_dim), top_k = q.shape, block_ids.shape[3]
    if q.dtype not in (jnp.bfloat16, jnp.float16) or {k.dtype, v.dtype} != {q.dtype}:
        raise NotImplementedError(
            f"the kernels take q, k and v all in bfloat16 or all in float16, not {q.dtype}, "
            f"{k.dtype} and {v.dtype}"
        )
    if head_dim not in (64, 128):
        raise NotImplementedError(f"the kernels take a head_dim of 64 or 128, not {head_dim}")
    if block_size not in (64, 128):
        raise NotImplementedError(f"the kernels take a block_size of 64 or 128, not {block_size}")
    if not 1 <= top_k <= 64:
        raise NotImplementedError(f"the kernels take 1 to 64 blocks per query, not {top_k}")
    if num_heads // k.shape[2] > 64:
        raise NotImplementedError(
            f"the kernels take at most 64 query heads per KV head, not {num_heads // k.shape[2]}"
        )
    if num_queries < MIN_QUERIES:
        raise NotImplementedError(
            f"{num_queries} queries are decoding, the kernels are for {MIN_QUERIES} or more"
        )
    if not scale > 0:
        raise NotImplementedError(f"the kernels take a positive scale, not {scale}")


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
@in_32_bits
def _attention(options: _Options, q, k, v, block_ids, segment_ids, query_offset):
    block_ids, offset = _visible(options, block_ids, segment_ids, query_offset)
    return _attend(options, q, k, v, block_ids, offset)


def _visible(options: _Options, block_ids, segment_ids, query_offset):
    """The ids that each query sees and attends to, and the offset."""
    offset = query_offset if options.query_offset is None else options.query_offset
    return visible_block_ids(block_ids, segment_ids, offset, options.block_size), offset


def _attend(options: _Options, q, k, v, block_ids, offset, lists=None, **chunks):
    """Runs the cheaper scheme; KV-outer goes by `lists` of `chunks`, if it is given those."""
    config = options.config
    tiles, outer = _tuned(config, q, k, options.block_size)
    call = {"block_size": options.block_size, "scale": options.scale}

    def run_union(q, k, v, block_ids, offsets, _):
        return union(q, k, v, block_ids, offsets, config=tiles, **call)

    schemes = {
        "union": run_union,
        "kv_outer": functools.partial(kv_outer, config=outer, **chunks, **call),
    }

    @indivisible
    def run(*arguments):
        if config.scheme != "auto":
            return schemes[config.scheme](*arguments)
        per_warpgroup = WARPGROUP_ROWS // padded_group(q.shape[2] // k.shape[2])
        overlap = union_ratio(arguments[3], per_warpgroup) <= config.max_union
        return jax.lax.cond(overlap, schemes["union"], schemes["kv_outer"], *arguments)

    offsets = jnp.broadcast_to(jnp.asarray(offset, jnp.int32), q.shape[:1])
    return run(q, k, v, block_ids, offsets, lists)


def union_ratio(block_ids: Int[Array, "B Hkv T K"], queries: int) -> Float[Array, ""]:
    """Mean distinct blocks of `queries` neighbours over the mean blocks of one; from a sample.

    From 1, where neighbours agree, to `queries`, where they share nothing.
    """
    batch, groups, num_queries, top_k = block_ids.shape
    run = queries * _SAMPLE_EVERY
    if num_queries >= run:
        whole = block_ids[:, :, : num_queries // run * run]
        runs = whole.reshape(batch, groups, -1, _SAMPLE_EVERY, queries, top_k)
        block_ids = runs[:, :, :, _SAMPLE_EVERY // 2].reshape(batch, groups, -1, top_k)
    blocks = (block_ids >= 0).sum(-1, dtype=jnp.float32).mean()
    return mean_union(block_ids, queries) / jnp.maximum(blocks, 1e-6)


def _tuned(
    config: SparseAttentionConfig, q, k, block_size: int
) -> tuple[UnionConfig, KVOuterConfig]:
    """The config's kernel shapes; those left open from the tuned table."""
    head_dim, group = q.shape[3], padded_group(q.shape[2] // k.shape[2])
    place = _place_in_table(q, k, block_size)
    tiles, outer = config.union, config.kv_outer
    if tiles is None:
        tiles = tuned(
            "sparse_attention.union", UnionConfig.for_block(block_size, head_dim), **place
        )
    outer = outer or KVOuterConfig()
    if outer.attention is None:
        attention = tuned("sparse_attention.kv_outer", default_config(group), **place)
        merge = tuned("sparse_attention.combine", outer.combine, **place)
        outer = dataclasses.replace(outer, attention=attention, combine=merge)
    return tiles, outer


def _tuned_backward(found: BackwardConfig, q, k, block_size: int) -> BackwardConfig:
    """The shape of the backward pass; what is left open from the tuned table."""
    place = _place_in_table(q, k, block_size)
    gradient = found.gradient or tuned("sparse_attention.backward", GradientConfig(), **place)
    merge = found.combine or tuned("sparse_attention.combine", CombineConfig(), **place)
    return dataclasses.replace(found, gradient=gradient, combine=merge)


def _place_in_table(q, k, block_size: int) -> dict[str, str]:
    """Where the tuned table has this call's shapes."""
    num_queries, num_heads, head_dim = q.shape[1:]
    group = padded_group(num_heads // k.shape[2])
    bucket = shape_bucket(num_queries, G=group, D=head_dim, Bk=block_size)
    return {"dtype": q.dtype.name, "bucket": bucket}


@in_32_bits
def _forward(options: _Options, q, k, v, block_ids, segment_ids, query_offset):
    """Both passes go by the same lists, so that they are built once."""
    block_ids, offset = _visible(options, block_ids, segment_ids, query_offset)
    chunks = _chunks(options, q, k, block_ids.shape[3])
    lists = chunk_lists(
        block_ids,
        offset,
        chunks,
        num_blocks=-(-k.shape[1] // options.block_size),
        block_size=options.block_size,
        queries_per_tile=TILE_ROWS // padded_group(q.shape[2] // k.shape[2]),
    )
    results = named(*_attend(options, q, k, v, block_ids, offset, lists, chunks=chunks))
    return results, (q, k, v, lists, *results)


def _chunks(options: _Options, q, k, top_k: int) -> Chunks:
    """How both passes of a gradient are cut."""
    num_blocks = -(-k.shape[1] // options.block_size)
    return backward_chunks(options.config.backward, q, k.shape[2], top_k, num_blocks)


@in_32_bits
def _backward(options: _Options, residuals, cotangents):
    q, k, v, lists, o, lse = residuals
    run = functools.partial(
        backward,
        chunks=_chunks(options, q, k, lists.places.shape[-1]),
        block_size=options.block_size,
        scale=options.scale,
        config=_tuned_backward(options.config.backward, q, k, options.block_size),
    )
    return *indivisible(run)(q, k, v, lists, (o, lse), cotangents), None, None, None


_attention.defvjp(_forward, _backward)
