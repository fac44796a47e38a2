"""The tiles of every key block against a walk over all picks."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest
from op_cases import ascending_picks, compiled

from pallas_kernels.sparse_attention.reverse_tiles import DISTANCE, reverse_tiles
from pallas_kernels.sparse_attention.tile_lists import COUNT, MEMBERS, PAGE, SCALARS, tile_lists

BATCH, GROUPS, NUM_QUERIES, NUM_BLOCKS, BLOCK_SIZE = 2, 3, 37, 5, 16
# Six tiles of eight queries; of the last one no query exists.
QUERIES, NUM_TILES, PER_SLICE = 8, 6, 4
OFFSETS = np.array([3, 20], np.int32)


def few(rng, most):
    return rng.integers(most + 1)


def nobody(rng, most):
    return 0


def everything(rng, most):
    return most


def picks(how_many, top_k=2):
    ids = ascending_picks((BATCH, GROUPS, NUM_QUERIES, top_k), NUM_BLOCKS, how_many)
    ids[0, 0, :, 0] = -1
    return ids


@functools.partial(compiled, static_argnames=("cores", "heads_together"))
def build(ids, cores, heads_together):
    offsets = jnp.asarray(OFFSETS)
    lists = tile_lists(ids, offsets, queries=QUERIES, num_tiles=NUM_TILES, num_blocks=NUM_BLOCKS)
    return reverse_tiles(
        lists,
        queries=QUERIES,
        tiles_per_group=NUM_TILES,
        tiles_per_row=NUM_TILES * (GROUPS if heads_together else 1),
        num_blocks=NUM_BLOCKS,
        block_size=BLOCK_SIZE,
        tiles_per_slice=PER_SLICE,
        cores=cores,
    )


def expected_tiles(ids, heads_together):
    """{owner: {tile: (distance, members)}}."""
    owners = {}
    for b, g, t, slot in np.ndindex(ids.shape):
        block = ids[b, g, t, slot]
        if block >= 0:
            row = b if heads_together else b * GROUPS + g
            tile = (b * GROUPS + g) * NUM_TILES + t // QUERIES
            distance = OFFSETS[b] + t // QUERIES * QUERIES - block * BLOCK_SIZE
            tiles = owners.setdefault(row * NUM_BLOCKS + block, {})
            members = tiles.get(tile, (distance, 0))[1] | 1 << t % QUERIES
            tiles[tile] = distance, members
    return owners


@pytest.mark.parametrize("heads_together", [False, True])
@pytest.mark.parametrize("cores", [1, 2, 4])
@pytest.mark.parametrize("how_many", [few, nobody, everything])
def test_every_block_has_its_tiles_in_order(how_many, cores, heads_together):
    ids = picks(how_many)
    built = build(ids, cores=cores, heads_together=heads_together)
    lists, owners, first_slices = map(np.asarray, built)
    num_owners = BATCH * NUM_BLOCKS * (1 if heads_together else GROUPS)
    expected = expected_tiles(ids, heads_together)
    counts = lists[:, SCALARS, COUNT]
    position = 0
    for core in range(cores):
        assert first_slices[core] == position
        for owner in range(core, num_owners, cores):
            tiles = expected.get(owner, {})
            slices = max(1, -(-len(tiles) // PER_SLICE))
            mine = slice(position, position + slices)
            assert (owners[mine] == owner).all()
            assert (counts[mine][:-1] == PER_SLICE).all()
            entries = [
                lists[i][:, entry]
                for i in range(position, position + slices)
                for entry in range(counts[i])
            ]
            found = [(e[PAGE], (e[DISTANCE], e[MEMBERS])) for e in entries]
            assert found == sorted(tiles.items())
            position += slices
    assert first_slices[cores] == position <= len(lists)
    assert (counts[position:] == 0).all()
    assert (owners[position:] == owners[position - 1]).all()
    behind = np.arange(PER_SLICE) >= counts[:, None]
    assert not lists[:, MEMBERS][behind].any()


def test_some_lists_are_cut_and_some_are_empty():
    """Else the test above would not see either."""
    sizes = [len(tiles) for tiles in expected_tiles(picks(few), False).values()]
    assert max(sizes) > PER_SLICE
    assert len(expected_tiles(picks(few), False)) < BATCH * GROUPS * NUM_BLOCKS


def test_no_more_slices_than_there_is_room_for():
    """Each owner's last slice holds one tile: as many slices as there can be."""
    ids = np.full((1, 1, 40, 3), -1, np.int32)
    ids[0, 0] = [0, 1, 2]

    @compiled
    def build(ids):
        offset = jnp.zeros(1, jnp.int32)
        lists = tile_lists(ids, offset, queries=QUERIES, num_tiles=5, num_blocks=3)
        sizes = {"num_blocks": 3, "block_size": BLOCK_SIZE, "tiles_per_slice": PER_SLICE}
        sizes |= {"queries": QUERIES, "tiles_per_group": 5}
        return reverse_tiles(lists, tiles_per_row=5, cores=1, **sizes)

    built = build(ids)
    assert built.first_slices.tolist() == [0, 6]
    assert len(built.owners) >= 6
