"""How the passes that go by key block are cut: chunks of queries, of some KV groups at a time.

A query has a partial result per block that it picked; chunks bound the room that those take. The
reverse lists of all chunks are built at once, before the loop over chunks: many small sorts, with
some twenty small kernels each, would take several times as long.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from pallas_kernels.sparse_attention.reverse_index import ReverseIndex, ReverseLists, reverse_lists


class Chunks(NamedTuple):
    """The cut of a call, known while tracing.

    Attributes:
      number: of chunks along the queries.
      length: queries per chunk.
      row: queries per row of the reverse index, which divides that.
      parts: of the KV groups; a chunk has the queries of one part.
    """

    number: int
    length: int
    row: int
    parts: int

    def starts(self) -> Int[Array, "C"]:
        """The first query of each chunk; the parts of the groups follow each other."""
        return jnp.repeat(jnp.arange(self.number, dtype=jnp.int32) * self.length, self.parts)

    def first_groups(self, groups: int) -> Int[Array, "C"]:
        """The first KV group of each chunk."""
        part = jnp.arange(self.parts, dtype=jnp.int32) * (groups // self.parts)
        return jnp.tile(part, self.number)


def chunk_lists(
    block_ids: Int[Array, "B Hkv T K"],
    query_offset: Int[Array, "B"] | int,
    chunks: Chunks,
    *,
    num_blocks: int,
    block_size: int,
    queries_per_tile: int,
) -> ReverseLists:
    """The reverse lists of all chunks.

    Args:
      block_ids: each visible to its query, none twice, -1 for nobody.
      query_offset: the key slot of the first query.
      chunks: the cut.
      num_blocks: per batch row.
      block_size: slots per block.
      queries_per_tile: of the kernels.
    """
    batch, groups, num_queries, top_k = block_ids.shape
    behind = chunks.number * chunks.length - num_queries
    block_ids = jnp.pad(block_ids, ((0, 0), (0, 0), (0, behind), (0, 0)), constant_values=-1)
    cut = block_ids.reshape(
        batch, chunks.parts, groups // chunks.parts, chunks.number, chunks.length, top_k
    )
    cut = cut.transpose(3, 1, 0, 2, 4, 5).reshape(-1, batch, *cut.shape[2:3], *cut.shape[4:])
    offsets = jnp.broadcast_to(jnp.asarray(query_offset, jnp.int32), (batch,))
    starts = chunks.starts()[:, None]
    return reverse_lists(
        cut,
        starts + jnp.arange(batch, dtype=jnp.int32) * num_queries,
        starts + offsets,
        chunks.first_groups(groups),
        num_blocks=num_blocks,
        block_size=block_size,
        queries_per_row=chunks.row,
        queries_per_tile=queries_per_tile,
    )


class Chunk(NamedTuple):
    """One of the chunks: its first query, its first KV group, and its reverse index."""

    start: Int[Array, ""]
    first_group: Int[Array, ""]
    index: ReverseIndex


def for_each_chunk(
    run: Callable[[Chunk], Any], chunks: Chunks, groups: int, index: ReverseIndex
) -> Any:
    """Calls `run` for one chunk after the other; returns its results, stacked.

    Args:
      run: function of a `Chunk`.
      chunks: the cut.
      groups: KV groups in all.
      index: of all chunks.
    """
    each = Chunk(chunks.starts(), chunks.first_groups(groups), index)
    if chunks.number * chunks.parts == 1:
        result = run(jax.tree.map(lambda array: array[0], each))
        return jax.tree.map(lambda array: array[None], result)
    return jax.lax.map(run, each)
