"""Paged keys: a row's blocks lie in pages anywhere in one pool, and a table says where.

A page holds one block. Pages of the main branch are head-major, [P, Hkv, Bk, D], because a query
reads a block of its own group alone: one head's part of a page is then one contiguous copy.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

type Pages = Float[Array, "P Bk Di"] | Float[Array, "P Hkv Bk D"]


def check_pages(
    page_table: Array, block_size: int, segment_ids: Array | None, **pages: Array
) -> None:
    """Raises ValueError unless page_table is [B, N] and each of `pages` holds a block per page.

    Args:
      page_table: integers; their values are not looked at.
      block_size: Bk.
      segment_ids: refused: a row of pages is one document.
      **pages: "index_k" [P, Bk, Di], or "k" and "v" [P, Hkv, Bk, D].
    """
    if segment_ids is not None:
        raise ValueError(
            "segment_ids together with page_table: a row of pages is one document; leave "
            "segment_ids out and give every document a row of its own"
        )
    if page_table.ndim != 2 or not jnp.issubdtype(page_table.dtype, jnp.integer):
        raise ValueError(
            f"page_table is {page_table.dtype}{page_table.shape}, it must be integers [B, N]: the "
            "page of each block of each row, -1 where there is none"
        )
    for name, array in pages.items():
        letters = ("P", "Bk", "Di") if name == "index_k" else ("P", "Hkv", "Bk", "D")
        if array.ndim != len(letters) or array.shape[-2] != block_size:
            raise ValueError(
                f"{name} is {array.shape}, with page_table it must be [{', '.join(letters)}], "
                f"Bk = block_size = {block_size}: a page holds one block"
            )


def contiguous_shape(pages: Array, page_table: Array) -> jax.ShapeDtypeStruct:
    """Shape and dtype of the array that the pages stand for: [B, S, Di] or [B, S, Hkv, D]."""
    batch, num_blocks = page_table.shape
    *heads, block_size, dim = pages.shape[1:]
    return jax.ShapeDtypeStruct((batch, num_blocks * block_size, *heads, dim), pages.dtype)


def gather_pages(
    pages: Pages, page_table: Int[Array, "B N"]
) -> Float[Array, "B S Di"] | Float[Array, "B S Hkv D"]:
    """The array that the pages stand for; 0 in blocks without a page."""
    shape = contiguous_shape(pages, page_table).shape
    blocks = pages.at[page_table].get(mode="clip")
    used = jnp.expand_dims(page_table >= 0, tuple(range(2, blocks.ndim)))
    # No product hides what another row keeps in the page that -1 happens to read: it may be a NaN.
    blocks = jnp.where(used, blocks, 0)
    return jnp.moveaxis(blocks, -2, 2).reshape(shape)
