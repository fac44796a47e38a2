"""`BlockSelection`, the pytree that carries a selection."""

import jax
import jax.numpy as jnp

from pallas_kernels import BlockSelection

SELECTION = BlockSelection(jnp.array([[[[0, 2, -1], [-1, -1, -1]]]], jnp.int32), 8)


def test_counts_and_mask():
    assert SELECTION.counts.tolist() == [[[2, 0]]]
    mask = SELECTION.block_mask(4)
    assert mask.tolist() == [[[[True, False, True, False], [False] * 4]]]


def test_is_a_pytree_with_a_static_block_size():
    leaves, structure = jax.tree.flatten(SELECTION)
    assert len(leaves) == 1
    doubled = jax.jit(lambda s: BlockSelection(s.block_ids * s.block_size, 2 * s.block_size))
    assert doubled(SELECTION).block_size == 2 * 8
    assert jax.tree.structure(doubled(SELECTION)) != structure
    (path, _), *_ = jax.tree_util.tree_flatten_with_path(SELECTION)[0]
    assert jax.tree_util.keystr(path) == ".block_ids"


def test_holds_whatever_jax_puts_into_a_tree():
    """Shapes, axes and layers of a scan, whose leaves are no [B, Hkv, T, K] arrays."""
    shapes = jax.eval_shape(lambda s: s, SELECTION)
    assert shapes.block_ids.shape == (1, 1, 2, 3)
    assert jax.tree.map(lambda _: 0, SELECTION).block_ids == 0
    layers = jax.tree.map(lambda ids: jnp.stack([ids, ids]), SELECTION)
    assert jax.vmap(lambda s: s.counts)(layers).shape == (2, 1, 1, 2)
    _, stacked = jax.lax.scan(lambda carry, _: (carry, SELECTION), 0, length=3)
    assert stacked.block_ids.shape == (3, 1, 1, 2, 3)
