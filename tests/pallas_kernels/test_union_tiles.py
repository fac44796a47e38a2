"""Union tiles against sets built query by query."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.sparse_attention.union_tiles import list_length, mean_union, union_tiles


def random_selection(shape, num_blocks, seed=0):
    """Distinct ids in any order, with -1 strewn in; the first query of all has none."""
    batch, groups, num_queries, top_k = shape
    random = np.random.default_rng(seed)
    ids = np.argsort(random.random((batch, groups, num_queries, num_blocks)), -1)[..., :top_k]
    ids = np.where(random.random(ids.shape) < 0.3, -1, ids).astype(np.int32)
    ids[0, 0, 0] = -1
    return ids


def expected_tile(ids):
    """{block: set of the queries that selected it, as bits} of one tile's lists [R, K]."""
    members: dict[int, int] = {}
    for query, row in enumerate(ids):
        for block in row[row >= 0]:
            members[int(block)] = members.get(int(block), 0) | 1 << query
    return members


@pytest.mark.parametrize(
    ("num_queries", "top_k", "queries", "num_blocks"),
    [(24, 5, 4, 40), (25, 16, 12, 200), (7, 3, 8, 3), (9, 1, 1, 4), (62, 2, 31, 9)],
)
def test_lists_hold_each_block_once_with_its_queries(num_queries, top_k, queries, num_blocks):
    ids = random_selection((2, 3, num_queries, min(top_k, num_blocks)), num_blocks)
    lists, counts = jax.jit(union_tiles, static_argnums=(1, 2))(ids, queries, num_blocks)
    tiles = -(-num_queries // queries)
    assert lists.shape == (2, 3, tiles, 2, list_length(queries, ids.shape[-1], num_blocks))
    assert lists.shape[-1] % 32 == 0
    for batch, group, tile in np.ndindex(2, 3, tiles):
        members = expected_tile(ids[batch, group, tile * queries : (tile + 1) * queries])
        blocks, bits = np.asarray(lists[batch, group, tile])
        count = int(counts[batch, group, tile])
        assert dict(zip(blocks[:count].tolist(), bits[:count].tolist(), strict=True)) == members
        assert (np.diff(blocks[:count]) > 0).all()
        assert not blocks[count:].any()
        assert not bits[count:].any()


@pytest.mark.parametrize("queries", [1, 4, 8])
def test_mean_union_counts_distinct_blocks_of_whole_tiles(queries):
    ids = random_selection((2, 2, 26, 6), 30)
    sizes = [
        len(expected_tile(ids[batch, group, start : start + queries]))
        for batch, group in np.ndindex(2, 2)
        for start in range(0, 26 - queries + 1, queries)
    ]
    mean = mean_union(jnp.asarray(ids), queries)
    assert mean.dtype == jnp.float32
    np.testing.assert_allclose(mean, np.mean(sizes), rtol=1e-6)


@pytest.mark.parametrize("queries", [0, 32])
def test_a_tile_has_a_bit_per_query(queries):
    with pytest.raises(ValueError, match=f"queries={queries} must be 1 to 31"):
        union_tiles(jnp.zeros((1, 1, 64, 2), jnp.int32), queries, 4)
