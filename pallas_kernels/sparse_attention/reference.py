"""The main branch by its definition: softmax attention under the mask of the selected blocks."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.dense_attention.reference import masked_attention, score_bytes
from pallas_kernels.pages import gather_pages
from pallas_kernels.residuals import named
from pallas_kernels.selection import block_mask
from pallas_kernels.visibility import map_query_chunks, visible_slots


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
) -> tuple[Float[Array, "B T Hq D"], Float[Array, "B Hq T"]]:
    """Attention over the visible tokens of the selected blocks: output and log-sum-exp."""

    def attend(q, block_ids, slots, k, v, segment_ids):
        mask = support(block_ids.swapaxes(1, 2), block_size, slots, k.shape[1], segment_ids)
        o, lse = masked_attention(q, k, v, mask[:, :, None], scale)
        return o, lse.swapaxes(1, 2)

    o, lse = map_query_chunks(
        attend,
        (q, block_ids.swapaxes(1, 2)),
        (k, v, segment_ids),
        query_offset,
        bytes_per_query=score_bytes(q, k),
    )
    return named(o, lse.swapaxes(1, 2))


def sparse_attention_of_pages(
    q: Float[Array, "B T Hq D"],
    k: Float[Array, "P Hkv Bk D"],
    v: Float[Array, "P Hkv Bk D"],
    block_ids: Int[Array, "B Hkv T K"],
    segment_ids: None,
    query_offset: Int[Array, "B"] | int,
    *,
    page_table: Int[Array, "B N"],
    block_size: int,
    scale: float,
) -> tuple[Float[Array, "B T Hq D"], Float[Array, "B Hq T"]]:
    """`sparse_attention` over paged keys and values, gathered into one array each."""
    keys, values = (gather_pages(pages, page_table) for pages in (k, v))
    place = block_ids, segment_ids, query_offset
    return sparse_attention(q, keys, values, *place, block_size=block_size, scale=scale)


def support(
    block_ids: Int[Array, "B Hkv T K"],
    block_size: int,
    slots: Int[Array, "B T"],
    num_keys: int,
    segment_ids: Int[Array, "B S"] | None,
) -> Bool[Array, "B Hkv T S"]:
    """A[i, r]: the visible tokens of the blocks that group r selected for query i."""
    num_blocks = -(-num_keys // block_size)
    selected = jnp.repeat(block_mask(block_ids, num_blocks), block_size, axis=-1)[..., :num_keys]
    return selected & visible_slots(slots, num_keys, segment_ids)[:, None]
