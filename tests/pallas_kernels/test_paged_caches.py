"""Decoding from pages: the contiguous call's results, wherever the pages lie.

Rows of ten blocks, of which the last few have no page. The pool is in a random order, and pages
that no row holds, those at its ends among them, are NaN.
"""

import functools

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from op_cases import (
    BATCH,
    BLOCK_SIZE,
    HEAD_DIM,
    INDEX_DIM,
    NUM_HEADS,
    NUM_KV_HEADS,
    TOP_K,
    assert_close,
    compiled,
    integers,
    normal,
)

from pallas_kernels import select_blocks, sparse_attention
from pallas_kernels.selection import BlockSelection

NUM_BLOCKS, NUM_PAGES = 10, 24
NUM_KEYS = NUM_BLOCKS * BLOCK_SIZE
QUERY_COUNTS = (1, 5)
# Five queries from slot 45 cross a block's end; slot 40 begins one.
OFFSETS = {"all": 45, "per row": np.array([45, 40], np.int32)}


def page_table(offset, num_queries):
    """[B, N]: distinct pages of the blocks that queries see, and -1."""
    last = np.broadcast_to(offset, BATCH) + num_queries - 1
    pages = np.random.default_rng(0).permutation(np.arange(1, NUM_PAGES - 1))
    table = pages[: BATCH * NUM_BLOCKS].reshape(BATCH, NUM_BLOCKS).astype(np.int32)
    return np.where(np.arange(NUM_BLOCKS) <= last[:, None] // BLOCK_SIZE, table, -1)


def paged(array, table):
    """[B, S, ..., D] as head-major pages [P, ..., Bk, D]; NaN where no block lies."""
    blocks = array.reshape(BATCH, NUM_BLOCKS, BLOCK_SIZE, *array.shape[2:])
    blocks = np.moveaxis(blocks, 2, -2)
    pages = np.full((NUM_PAGES, *blocks.shape[2:]), np.nan)
    for row, block in zip(*np.nonzero(table >= 0), strict=True):
        pages[table[row, block]] = blocks[row, block]
    return pages


def inputs(num_queries, draw=normal):
    """Queries and contiguous keys."""
    return {
        "q": normal(0, BATCH, num_queries, NUM_HEADS, HEAD_DIM),
        "k": normal(1, BATCH, NUM_KEYS, NUM_KV_HEADS, HEAD_DIM),
        "v": normal(2, BATCH, NUM_KEYS, NUM_KV_HEADS, HEAD_DIM),
        "index_q": draw(3, BATCH, num_queries, NUM_KV_HEADS, INDEX_DIM),
        "index_k": draw(4, BATCH, NUM_KEYS, INDEX_DIM),
    }


def in_pages(x, table):
    return x | {name: paged(x[name], table) for name in ("k", "v", "index_k")}


def decode(x, offset, table=None, **options):
    """Block ids, output and log-sum-exp of one layer; an int offset stays one."""
    offset = offset if isinstance(offset, int) else jnp.asarray(offset)

    def run(x, table):
        place = {"query_offset": offset, "page_table": table}
        blocks = {"block_size": BLOCK_SIZE, "top_k": TOP_K} | options
        selection = select_blocks(x["index_q"], x["index_k"], **blocks, **place)
        return selection.block_ids, *sparse_attention(x["q"], x["k"], x["v"], selection, **place)

    return compiled(run)(jax.tree.map(jnp.asarray, x), table)


def assert_same(actual, expected, rows=slice(None)):
    np.testing.assert_array_equal(actual[0][rows], expected[0][rows])
    for a, e in zip(actual[1:], expected[1:], strict=True):
        assert_close(a[rows], e[rows])


@pytest.mark.parametrize("num_queries", QUERY_COUNTS)
@pytest.mark.parametrize("offset", OFFSETS.values(), ids=OFFSETS)
def test_pages_give_the_contiguous_results(num_queries, offset, double_precision):
    """Index inputs are small integers, so that blocks tie and their order decides."""
    x = inputs(num_queries, draw=integers)
    table = page_table(offset, num_queries)
    actual = decode(in_pages(x, table), offset, jnp.asarray(table))
    assert_same(actual, decode(x, offset))
    assert (np.asarray(actual[0]) >= 0).all()


@pytest.mark.parametrize(
    "options", [{"index_precision": "int8"}, {"pooling": "lse", "num_sink_blocks": 1}], ids=str
)
def test_other_options(options, double_precision):
    x, offset = inputs(5), OFFSETS["per row"]
    table = page_table(offset, 5)
    actual = decode(in_pages(x, table), offset, jnp.asarray(table), **options)
    assert_same(actual, decode(x, offset, **options))


@pytest.mark.parametrize("row", range(BATCH))
def test_a_row_reads_no_other_rows_pages(row, double_precision):
    x, offset = inputs(5), OFFSETS["per row"]
    table = page_table(offset, 5)
    poisoned = in_pages(x, table)
    others = np.setdiff1d(np.arange(NUM_PAGES), table[row])
    for name in ("k", "v", "index_k"):
        poisoned[name][others] = np.nan
    actual = decode(poisoned, offset, jnp.asarray(table))
    assert_same(actual, decode(x, offset), rows=slice(row, row + 1))
    assert np.isnan(actual[1][1 - row]).any()


def test_rows_may_share_a_prefix(double_precision):
    """Two rows of one prompt: their first blocks lie in the same pages."""
    x, offset = inputs(5), OFFSETS["per row"]
    prompt = 3 * BLOCK_SIZE
    for name in ("k", "v", "index_k"):
        x[name][1, :prompt] = x[name][0, :prompt]
    table = page_table(offset, 5)
    table[1, :3] = table[0, :3]
    assert_same(decode(in_pages(x, table), offset, jnp.asarray(table)), decode(x, offset))


def test_gradients_of_pages(double_precision):
    """As of the contiguous keys, in the pages' places; none where no row has a page."""
    x, offset = inputs(5), OFFSETS["per row"]
    table = page_table(offset, 5)
    pages = in_pages(x, table)
    selection = BlockSelection(decode(x, offset)[0], BLOCK_SIZE)

    def gradients(x, table):
        def loss(kv):
            place = {"query_offset": jnp.asarray(offset), "page_table": table}
            o, lse = sparse_attention(jnp.asarray(x["q"]), *kv, selection, **place)
            return (o * normal(5, *o.shape)).sum() + lse.sum()

        return compiled(jax.grad(loss))((jnp.asarray(x["k"]), jnp.asarray(x["v"])))

    actual, expected = gradients(pages, jnp.asarray(table)), gradients(x, None)
    for a, e in zip(actual, expected, strict=True):
        held = paged(np.asarray(e), table)
        assert_close(a, np.nan_to_num(held))


def test_on_a_mesh(double_precision):
    """Rows, heads and queries are split; every device holds all pages of its heads."""
    x, offset = inputs(4), OFFSETS["per row"]
    table = page_table(offset, 4)
    expected = decode(x, offset)
    names = ("data", "tensor", "context")
    mesh = jax.make_mesh((2, 2, 2), names, axis_types=(AxisType.Explicit,) * 3)
    queries, pages = P("data", "context", "tensor", None), P(None, "tensor", None, None)
    specs = {"q": queries, "index_q": queries, "k": pages, "v": pages, "index_k": P()}
    with jax.set_mesh(mesh):
        placed = {
            name: jax.device_put(array, NamedSharding(mesh, specs[name]))
            for name, array in in_pages(x, table).items()
        }
        actual = decode(placed, offset, jnp.asarray(table))
    assert_same(actual, expected)
    assert actual[1].sharding.spec == queries


class TestRefusals:
    """Called as by a user, without the test suite's run-time shape checks."""

    @pytest.fixture(autouse=True)
    def no_shape_checks(self, monkeypatch):
        monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)

    @pytest.fixture(params=["select_blocks", "sparse_attention"])
    def call(self, request):
        """An op with good arguments but for the changes."""
        x, offset = inputs(5), OFFSETS["per row"]
        table = page_table(offset, 5)
        x = jax.tree.map(jnp.asarray, in_pages(x, table))
        place = {"query_offset": jnp.asarray(offset), "page_table": jnp.asarray(table)}
        if request.param == "select_blocks":
            blocks = {"block_size": BLOCK_SIZE, "top_k": TOP_K}
            arrays = {"index_q": x["index_q"], "index_k": x["index_k"]} | blocks
            return functools.partial(select_blocks, **arrays, **place)
        ids = jnp.zeros((BATCH, NUM_KV_HEADS, 5, TOP_K), jnp.int32)
        arrays = {name: x[name] for name in ("q", "k", "v")}
        arrays["selection"] = BlockSelection(ids, BLOCK_SIZE)
        return functools.partial(sparse_attention, **arrays, **place)

    def test_segments(self, call):
        segment_ids = jnp.ones((BATCH, NUM_KEYS), jnp.int32)
        with pytest.raises(ValueError, match=r"segment_ids together with page_table: .* leave"):
            call(segment_ids=segment_ids)

    @pytest.mark.parametrize("table", [jnp.zeros(3, jnp.int32), jnp.zeros((BATCH, NUM_BLOCKS))])
    def test_tables_of_another_kind(self, call, table):
        with pytest.raises(ValueError, match=r"page_table is .*, it must be integers \[B, N\]"):
            call(page_table=table)

    def test_tables_of_other_rows(self, call):
        with pytest.raises(ValueError, match=r"\(3, 80, "):
            call(page_table=jnp.zeros((3, NUM_BLOCKS), jnp.int32))

    def test_pages_of_another_size(self, call):
        name = "index_k" if "index_k" in call.keywords else "v"
        half = call.keywords[name][..., :4, :]
        with pytest.raises(
            ValueError, match=rf"{name} is .* Bk = block_size = 8: a page holds one"
        ):
            call(**{name: half})

    def test_too_few_pages_for_the_queries(self, call):
        with pytest.raises(ValueError, match="5 queries at query_offset=76 need 81 key slots"):
            call(query_offset=76)

    def test_an_implementation_without_pages(self, call):
        message = r"of pages has no implementation \['triton'\]; choose from mosaic_tpu, reference"
        with pytest.raises(ValueError, match=message):
            call(implementation="triton")
