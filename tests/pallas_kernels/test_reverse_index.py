"""The reverse index against its definition: every pick once, in order, padded and cut up."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from op_cases import compiled

from pallas_kernels.sparse_attention import reverse_index as module
from pallas_kernels.sparse_attention.reverse_index import (
    FIRST_TILE,
    GROUP,
    KEY_BLOCK,
    NUM_PARTS,
    NUM_TILES,
    OWN_QUERY,
    SLOT,
    max_split_slices,
    reverse_index,
    reverse_lists,
    row_length,
    slices_of,
)

BATCH, GROUPS, NUM_QUERIES, TOP_K = 2, 2, 16, 3
BLOCK_SIZE, NUM_BLOCKS = 8, 6
ROW, PER_TILE, PER_SLICE = 8, 4, 2
# The second batch row's queries start behind five others in the flattened queries, and in slot 11.
FIRST_QUERY, FIRST_SLOT = np.array([0, 21], np.int32), np.array([3, 11], np.int32)


def random_picks(rng):
    ids = np.full((BATCH, GROUPS, NUM_QUERIES, TOP_K), -1, np.int32)
    for index in np.ndindex(ids.shape[:3]):
        count = rng.integers(TOP_K + 1)
        ids[index][:count] = np.sort(rng.choice(NUM_BLOCKS, count, replace=False))
    return ids


def same_for_all(rng):
    return np.broadcast_to(np.array([0, 3, -1], np.int32), (BATCH, GROUPS, NUM_QUERIES, TOP_K))


def no_overlap(rng):
    ids = np.full((BATCH, GROUPS, NUM_QUERIES, TOP_K), -1, np.int32)
    for t in range(NUM_BLOCKS):
        ids[:, :, t, 0] = t
    return ids


def nobody(rng):
    return np.full((BATCH, GROUPS, NUM_QUERIES, TOP_K), -1, np.int32)


def holes(rng):
    """-1 between valid ids, as blocks of other documents leave them."""
    ids = random_picks(rng)
    return np.where(rng.random(ids.shape) < 0.4, -1, ids)


def picks_by_list(ids):
    """{(batch row, group, row of queries, block): [(query, slot)]}, by going over all of them."""
    lists = {}
    for b, g, t, slot in np.ndindex(ids.shape):
        if ids[b, g, t, slot] >= 0:
            lists.setdefault((b, g, t // ROW, ids[b, g, t, slot]), []).append((t, slot))
    return lists


def build(ids, per_tile=PER_TILE, per_slice=PER_SLICE):
    """Compiled afresh, since the number of keys is no argument."""
    return compiled(functools.partial(_build, per_tile=per_tile, per_slice=per_slice))(ids)


def _build(ids, per_tile, per_slice):
    return reverse_index(
        jnp.asarray(ids),
        jnp.asarray(FIRST_QUERY),
        jnp.asarray(FIRST_SLOT),
        num_blocks=NUM_BLOCKS,
        block_size=BLOCK_SIZE,
        queries_per_row=ROW,
        queries_per_tile=per_tile,
        tiles_per_slice=per_slice,
    )


build_once = functools.partial(compiled, static_argnames=("per_tile", "per_slice"))(_build)


@pytest.mark.parametrize("per_tile", [1, PER_TILE, 8])
@pytest.mark.parametrize("picks", [random_picks, same_for_all, no_overlap, nobody, holes])
def test_lists_hold_every_pick_once_in_order(picks, per_tile):
    ids = picks(np.random.default_rng(0))
    index, lists = build_once(ids, per_tile=per_tile, per_slice=PER_SLICE), picks_by_list(ids)
    index = jax.tree.map(np.asarray, index)
    np.testing.assert_array_equal(index.places >= 0, ids >= 0)
    taken = index.places[ids >= 0]
    assert len(np.unique(taken)) == len(taken)
    assert index.queries.size % per_tile == 0
    next_tile = 0
    for key in sorted(lists):
        b, g, _, _ = key
        for rank, (t, slot) in enumerate(lists[key]):
            place = index.places[b, g, t, slot]
            assert place == next_tile * per_tile + rank
            assert index.queries[place] == FIRST_QUERY[b] + t
        next_tile += -(-len(lists[key]) // per_tile)
    # What nobody takes reads a row that exists.
    free = np.setdiff1d(np.arange(index.queries.size), taken)
    assert (index.queries[free] == 0).all()


@pytest.mark.parametrize("per_slice", [1, PER_SLICE, 100])
@pytest.mark.parametrize("picks", [random_picks, same_for_all, no_overlap, nobody, holes])
def test_slices_cover_every_tile_of_every_list_once(picks, per_slice):
    ids = picks(np.random.default_rng(1))
    index, lists = build_once(ids, per_tile=1, per_slice=per_slice), picks_by_list(ids)
    slices = np.asarray(index.slices)[: index.num_slices[0]]
    assert len(index.slices) >= len(slices)
    assert ((slices[:, NUM_TILES] >= 1) & (slices[:, NUM_TILES] <= per_slice)).all()
    next_tile, position = 0, 0
    for key in sorted(lists):
        b, g, _, block = key
        end = next_tile + len(lists[key])
        while next_tile < end:
            row = slices[position]
            assert row[GROUP] == g
            assert row[KEY_BLOCK] == b * NUM_BLOCKS + block
            assert row[FIRST_TILE] == next_tile
            slot_of_first_query = FIRST_SLOT[b] - FIRST_QUERY[b]
            assert row[OWN_QUERY] + slot_of_first_query == block * BLOCK_SIZE
            next_tile += row[NUM_TILES]
            position += 1
        assert next_tile == end, "no slice holds tiles of two lists"
    assert position == len(slices)


@pytest.mark.parametrize("per_slice", [1, PER_SLICE, 100])
@pytest.mark.parametrize("picks", [random_picks, same_for_all, no_overlap, nobody, holes])
def test_slices_of_split_lists_have_slots_of_their_own(picks, per_slice):
    ids = picks(np.random.default_rng(1))
    index, lists = build_once(ids, per_tile=1, per_slice=per_slice), picks_by_list(ids)
    expected_slots, expected_parts, next_slot = [], [], 0
    for key in sorted(lists):
        parts = -(-len(lists[key]) // per_slice)
        split = parts > 1
        expected_slots += list(range(next_slot, next_slot + parts)) if split else [-1]
        expected_parts += [parts if split else 0] + [0] * (parts - 1)
        next_slot += parts if split else 0
    slices, count = np.asarray(index.slices), index.num_slices[0]
    np.testing.assert_array_equal(slices[:count, SLOT], expected_slots)
    np.testing.assert_array_equal(slices[:count, NUM_PARTS], expected_parts)
    # A slice that is not in use belongs to no list.
    assert (slices[count:, NUM_PARTS] == 0).all()
    num_tiles = sum(map(len, lists.values()))
    assert next_slot <= max_split_slices(num_tiles, per_slice)


def chunked(ids, per_slice, thread_blocks=1):
    """Chunks of one row of one group each: the groups of a row of queries follow each other."""
    cut = ids.reshape(BATCH, GROUPS, 1, NUM_QUERIES // ROW, ROW, TOP_K)
    cut = cut.transpose(3, 1, 0, 2, 4, 5).reshape(-1, BATCH, 1, ROW, TOP_K)
    starts = np.repeat(np.arange(NUM_QUERIES // ROW, dtype=np.int32) * ROW, GROUPS)[:, None]
    sizes = {"num_blocks": NUM_BLOCKS, "block_size": BLOCK_SIZE, "queries_per_row": ROW}

    def build(ids):
        first_group = jnp.arange(len(ids), dtype=jnp.int32) % GROUPS
        place = jnp.asarray(starts + FIRST_QUERY), jnp.asarray(starts + FIRST_SLOT), first_group
        lists = reverse_lists(ids, *place, queries_per_tile=PER_TILE, **sizes)
        tiles = {"queries_per_tile": PER_TILE, "tiles_per_slice": per_slice}
        return slices_of(lists, **tiles, thread_blocks=thread_blocks)

    return cut, jax.tree.map(np.asarray, compiled(build)(jnp.asarray(cut)))


@pytest.mark.parametrize("picks", [random_picks, same_for_all, nobody, holes])
def test_chunks_are_built_as_if_each_were_alone(picks):
    cut, found = chunked(picks(np.random.default_rng(3)), PER_SLICE)
    for number, ids in enumerate(cut):
        start = number // GROUPS * ROW
        alone = compiled(
            functools.partial(
                reverse_index,
                num_blocks=NUM_BLOCKS,
                block_size=BLOCK_SIZE,
                queries_per_row=ROW,
                queries_per_tile=PER_TILE,
                tiles_per_slice=PER_SLICE,
            )
        )(jnp.asarray(ids), jnp.asarray(FIRST_QUERY + start), jnp.asarray(FIRST_SLOT + start))
        count = int(alone.num_slices[0])
        slices = np.array(alone.slices[:count])
        slices[:, GROUP] += number % GROUPS
        np.testing.assert_array_equal(found.queries[number], alone.queries)
        np.testing.assert_array_equal(found.places[number], alone.places)
        np.testing.assert_array_equal(found.num_slices[number], alone.num_slices)
        np.testing.assert_array_equal(found.slices[number, :count], slices)


def test_thread_blocks_get_about_as_many_tiles():
    """Of 24 lists with 1 to 24 queries, a tile each."""
    blocks, turns = 24, 5
    ids = np.where(np.arange(blocks)[:, None] >= np.arange(blocks), np.arange(blocks), -1)
    build = functools.partial(
        reverse_lists, num_blocks=blocks, block_size=1, queries_per_row=32, queries_per_tile=1
    )
    zeros = jnp.zeros((1, 1), jnp.int32)
    ids = np.pad(ids.astype(np.int32), ((0, 8), (0, 0)), constant_values=-1)

    def tiles_of(thread_blocks):
        lists = build(jnp.asarray(ids)[None, None, None], zeros, zeros, zeros[0])
        index = slices_of(
            lists, queries_per_tile=1, tiles_per_slice=32, thread_blocks=thread_blocks
        )
        return index.slices[0, : index.num_slices[0, 0]]

    plain, dealt = (np.asarray(tiles_of(number)) for number in (1, turns))
    rows = [tuple(row) for row in plain]
    assert sorted(rows) == sorted(tuple(row) for row in dealt)
    loads = [
        [slices[first::turns, NUM_TILES].sum() for first in range(turns)]
        for slices in (plain, dealt)
    ]
    assert np.ptp(loads[1]) <= 4 < np.ptp(loads[0])


def test_rows_that_do_not_fit_into_one_key_are_sorted_apart(monkeypatch):
    ids = random_picks(np.random.default_rng(2))
    together = build(ids)
    for rows in (1, 2, 3):
        monkeypatch.setattr(module, "_NUM_KEYS", rows * NUM_BLOCKS * ROW * 4)
        apart = build(ids)
        jax.tree.map(np.testing.assert_array_equal, together, apart)
    monkeypatch.setattr(module, "_NUM_KEYS", NUM_BLOCKS * ROW * 4 - 1)
    with pytest.raises(ValueError, match="queries_per_row=8 with 6 blocks and top_k=3 needs more"):
        build(ids)


def test_a_valid_entry_may_have_the_key_of_nobody(monkeypatch):
    ids = np.full((BATCH, GROUPS, NUM_QUERIES, 4), -1, np.int32)
    ids[..., 2:] = [NUM_BLOCKS - 2, NUM_BLOCKS - 1]
    ids[:, :, 3] = -1
    expected = build(ids)
    num_keys = BATCH * GROUPS * NUM_QUERIES // ROW * NUM_BLOCKS * ROW * 4
    monkeypatch.setattr(module, "_INVALID", jnp.uint32(num_keys - 1))
    jax.tree.map(np.testing.assert_array_equal, expected, build(ids))


@pytest.mark.parametrize("num_queries", [64, 100, 8192, 2**17, 2**20, 2**22])
@pytest.mark.parametrize("top_k", [1, 3, 16, 64])
def test_block_query_and_slot_fit_into_32_bits(num_queries, top_k):
    for block_size in (64, 128):
        num_blocks = -(-num_queries // block_size)
        row = row_length(num_queries, num_blocks, top_k)
        assert row >= 64
        assert row & (row - 1) == 0
        slots = 1 << (top_k - 1).bit_length()
        assert num_blocks * row * slots <= 2**32
