"""`BlockSelection`: which key blocks each query of each KV group attends to."""

import dataclasses
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int


@dataclasses.dataclass(frozen=True)
class BlockSelection:
    """Blocks kept per query and KV group, a pytree with a static block size.

    Attributes:
      block_ids: ids of key blocks, valid ones ascending, then -1. Block n holds key slots
        n * block_size to (n + 1) * block_size - 1. Ascending order makes the query's own block the
        last valid entry.
      block_size: tokens per block.
    """

    block_ids: Int[Array, "B Hkv T K"]
    block_size: int

    @property
    def counts(self) -> Int[Array, "B Hkv T"]:
        """Number of valid blocks."""
        return (self.block_ids >= 0).sum(-1, dtype=jnp.int32)

    def block_mask(self, num_blocks: int) -> Bool[Array, "B Hkv T N"]:
        """True where block n is selected."""
        return block_mask(self.block_ids, num_blocks)


def _flatten(selection: BlockSelection):
    return ((jax.tree_util.GetAttrKey("block_ids"), selection.block_ids),), selection.block_size


def _unflatten(block_size: int, leaves: Iterable[Any]) -> BlockSelection:
    # Past __init__: jax puts shapes, shardings, axes and stacked layers into a tree's leaves.
    selection = object.__new__(BlockSelection)
    for name, value in zip(("block_ids", "block_size"), (*leaves, block_size), strict=True):
        object.__setattr__(selection, name, value)
    return selection


jax.tree_util.register_pytree_with_keys(BlockSelection, _flatten, _unflatten)


def block_mask(block_ids: Int[Array, "*batch K"], num_blocks: int) -> Bool[Array, "*batch N"]:
    """Membership of blocks 0..num_blocks-1 in lists of ids; -1 is nobody."""
    blocks = jnp.arange(num_blocks, dtype=block_ids.dtype)
    return (block_ids[..., :, None] == blocks).any(-2)
