"""`select_blocks` on TPU: the kernel interpreted on a CPU, and compiled ahead for every chip."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from op_cases import INDEX_DIM, NUM_BLOCKS, NUM_KEYS, compiled
from test_select_blocks import SelectBlocksTests

from pallas_kernels import select_blocks
from pallas_kernels.ahead_of_time_tpu import compile_for_tpu
from pallas_kernels.mosaic_tpu import CHIPS, Target, traced_for
from pallas_kernels.select_blocks import mosaic_tpu, reference
from pallas_kernels.select_blocks.select_mosaic_tpu import SelectConfig
from pallas_kernels.tuning import trying

# Several tiles, several chunks of 8 blocks per tile, and more groups than are looked at together.
SMALL = SelectConfig(rows=128, products=1, slots=2, unroll=2)

# Documents of 150 and 320 tokens in row 0, of 320 and 180 in row 1, with padding behind each.
SEGMENT_IDS = np.zeros((2, 512), np.int32)
for _row, _start, _stop, _id in (
    (0, 0, 150, 1),
    (0, 192, 512, 2),
    (1, 0, 320, 1),
    (1, 320, 500, 2),
):
    SEGMENT_IDS[_row, _start:_stop] = _id


def interpreted(chip="v5p", interpret=True):
    return traced_for(Target(CHIPS[chip], interpret))


def integers(*shape, seed=0):
    """Small integers in four of the features: scores are exact in every dtype and often tie."""
    values = np.random.default_rng(seed).integers(-2, 3, shape).astype(np.float64)
    values[..., 4:] = 0
    return values


@dataclasses.dataclass(frozen=True)
class Case:
    """Shapes and options of one call; the queries are the last ones unless an offset says else."""

    batch: int = 1
    num_queries: int = 300
    num_keys: int = 300
    num_heads: int = 2
    index_dim: int = 64
    block_size: int = 16
    top_k: int = 4
    dtype: str = "bfloat16"
    num_local_blocks: int = 1
    num_sink_blocks: int = 0
    packed: bool = False
    query_offset: int | tuple[int, ...] | None = None
    index_precision: str = "native"
    paged: bool = False
    config: SelectConfig = SMALL
    chip: str = "v5p"

    def inputs(self):
        index_q = integers(self.batch, self.num_queries, self.num_heads, self.index_dim)
        index_k = integers(self.batch, self.num_keys, self.index_dim, seed=1)
        if self.index_precision == "int8":  # blocks of different scales
            index_k *= 1 + np.arange(self.num_keys)[:, None] // self.block_size % 3
        return jnp.asarray(index_q, self.dtype), jnp.asarray(index_k, self.dtype)

    def options(self):
        return {
            "block_size": self.block_size,
            "top_k": self.top_k,
            "num_local_blocks": self.num_local_blocks,
            "num_sink_blocks": self.num_sink_blocks,
            "pooling": "max",
            "scale": 0.3,
            "index_precision": self.index_precision,
        }

    def place(self):
        offset = (
            self.num_keys - self.num_queries if self.query_offset is None else self.query_offset
        )
        return (
            jnp.asarray(SEGMENT_IDS) if self.packed else None,
            offset if isinstance(offset, int) else jnp.asarray(offset, jnp.int32),
        )

    def expected(self, index_q, index_k):
        def run(index_q, index_k):
            return reference.select_blocks(index_q, index_k, *self.place(), **self.options())

        return np.asarray(compiled(run)(index_q, index_k))

    def pages(self, index_k):
        """The keys in pages of a block each, in any order, and which page holds a block."""
        num_blocks = self.num_keys // self.block_size
        used = self.batch * num_blocks
        order = np.random.default_rng(2).permutation(used + 3)
        blocks = index_k.reshape(used, self.block_size, -1)
        pages = jnp.full((used + 3, *blocks.shape[1:]), jnp.nan, index_k.dtype)
        table = order[:used].reshape(self.batch, num_blocks).astype(np.int32)
        return pages.at[order[:used]].set(blocks), jnp.asarray(table)

    def actual(self, index_q, index_k, interpret=True):
        page_table = None
        if self.paged:
            index_k, page_table = self.pages(index_k)

        def run(index_q, index_k):
            options = {**self.options(), "config": self.config, "page_table": page_table}
            return mosaic_tpu.select_blocks(index_q, index_k, *self.place(), **options)

        with interpreted(self.chip, interpret):
            return np.asarray(compiled(run)(index_q, index_k))


CASES = {
    "one core": Case(chip="v6e"),
    "wide blocks and heads, odd number of tiles": Case(
        num_queries=80, num_keys=1500, num_heads=4, index_dim=128, block_size=128
    ),
    "one head, block 64, K 16, several chunks in a buffer": Case(
        num_queries=130, num_keys=1700, num_heads=1, block_size=64, top_k=16,
        config=dataclasses.replace(SMALL, products=2**17, slots=3, unroll=1),
    ),
    "float32": Case(dtype="float32", index_dim=128),
    "fewer blocks than K": Case(num_queries=100, num_keys=100, top_k=17),
    "all blocks in a cut chunk": Case(config=SelectConfig()),
    "fewer keys than a block": Case(num_queries=9, num_keys=9),
    "forced blocks": Case(top_k=5, num_local_blocks=3, num_sink_blocks=1),
    "more forced blocks than K": Case(num_local_blocks=3, num_sink_blocks=3),
    "packed": Case(batch=2, num_queries=512, num_keys=512, block_size=64, packed=True, top_k=2),
    "packed and forced": Case(
        batch=2, num_queries=512, num_keys=512, block_size=64, packed=True, num_local_blocks=2,
        num_sink_blocks=1,
    ),
    "packed, offset per row": Case(
        batch=2, num_queries=90, num_keys=512, packed=True, query_offset=(401, 275)
    ),
    "queries in padding only": Case(
        batch=2, num_queries=12, num_keys=512, packed=True, query_offset=(160, 500), block_size=32
    ),
    "decoding, a row per core and one more": Case(
        batch=3, num_queries=1, num_keys=1000, num_heads=4, query_offset=(999, 3, 640)
    ),
    "decoding, one row": Case(num_queries=1, num_keys=2048, top_k=16, num_sink_blocks=1),
    "blocks of no whole tile": Case(block_size=24, num_keys=500),
    "pages": Case(
        batch=2, num_queries=90, num_keys=480, num_heads=1, query_offset=(390, 100), paged=True
    ),
    "decoding from pages, 8 bits": Case(
        batch=3, num_queries=1, num_keys=1024, query_offset=(999, 3, 640), block_size=32,
        paged=True, index_precision="int8",
    ),
    "8 bits": Case(index_precision="int8"),
    "8 bits, wide, ragged, of float32": Case(
        num_queries=100, num_keys=1100, index_dim=128, block_size=64, index_precision="int8",
        dtype="float32", batch=2,
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_ids_are_those_of_the_reference(case):
    inputs = case.inputs()
    np.testing.assert_array_equal(case.actual(*inputs), case.expected(*inputs))


@pytest.mark.parametrize(
    "case",
    [
        CASES["packed, offset per row"],
        CASES["8 bits, wide, ragged, of float32"],
        CASES["decoding from pages, 8 bits"],
    ],
)
def test_memory_that_nobody_wrote_is_not_chosen_and_copies_do_not_race(case, capfd):
    """Both cores run at once, a copy arrives when it is waited for, memory starts as NaN."""
    interpret = pltpu.InterpretParams(
        detect_races=True, uninitialized_memory="nan", num_cores_or_threads=2
    )
    inputs = case.inputs()
    np.testing.assert_array_equal(case.actual(*inputs, interpret), case.expected(*inputs))
    # The interpreter prints each race.
    assert "RACE" not in capfd.readouterr().out


def test_pages_that_hold_nothing_need_no_number():
    """Behind the blocks in use the table says -1, or anything."""
    case = CASES["pages"]
    index_q, index_k = case.inputs()
    pages, table = case.pages(index_k)
    in_use = -(-(np.asarray(case.query_offset)[:, None] + case.num_queries) // case.block_size)
    behind = np.arange(table.shape[1]) >= in_use
    table = jnp.where(behind, jnp.asarray([[-1], [10**6]]), table)
    with interpreted(interpret=pltpu.InterpretParams()):  # reads out of bounds are errors
        actual = mosaic_tpu.select_blocks(
            index_q, pages, *case.place(), **case.options(), config=SMALL, page_table=table
        )
    np.testing.assert_array_equal(actual, case.expected(index_q, index_k))


class TestMosaicTPU(SelectBlocksTests):
    """What all implementations promise; maxima are the only pooling."""

    implementation = "mosaic_tpu"
    dtypes = ("float32",)

    def select(self, index_q, index_k, **options):
        # The least code: these tests' time is its compilation.
        small = {"rows": 128, "products": 1, "slots": 2, "unroll": 1}
        with interpreted(), trying("select_blocks.mosaic_tpu", small):
            return super().select(index_q, index_k, **options)

    @pytest.mark.parametrize("pooling", ["max"])
    def test_pooling(self, pooling, widest_dtype):
        super().test_pooling(pooling, widest_dtype)

    @pytest.mark.parametrize("pooling", ["max"])
    def test_a_block_with_a_nan_token_counts_as_the_lowest(self, pooling, widest_dtype):
        super().test_a_block_with_a_nan_token_counts_as_the_lowest(pooling, widest_dtype)

    @pytest.mark.parametrize("pooling", ["max"])
    def test_overflow_is_the_highest_but_not_forced(self, pooling, widest_dtype):
        super().test_overflow_is_the_highest_but_not_forced(pooling, widest_dtype)

    @pytest.mark.parametrize(("num_local_blocks", "num_sink_blocks"), [(2, 1)])
    def test_forced_blocks(self, num_local_blocks, num_sink_blocks, widest_dtype):
        super().test_forced_blocks(num_local_blocks, num_sink_blocks, widest_dtype)

    @pytest.mark.parametrize("top_k", [1, NUM_BLOCKS + 3])
    def test_number_of_blocks(self, top_k, widest_dtype):
        super().test_number_of_blocks(top_k, widest_dtype)

    def test_what_overflows_by_the_scale_is_not_forced(self, widest_dtype):
        keys = np.zeros((NUM_KEYS, INDEX_DIM))
        keys[17, 0] = 2e38
        options = {"dtype": widest_dtype, "scale": 4.0, "num_local_blocks": 2}
        query = np.array([1.0, 0, 0, 0])
        assert self.blocks_of_slot_36(query, keys, **options, top_k=2) == [3, 4]
        assert self.blocks_of_slot_36(query, keys, **options, top_k=3) == [2, 3, 4]

    @pytest.mark.parametrize("pooling", ["lse", "mean"])
    def test_poolings_differ(self, pooling, widest_dtype):
        with pytest.raises(NotImplementedError, match=f"pooling='{pooling}'"):
            super().test_pooling(pooling, widest_dtype)

    def test_the_scale_changes_what_log_sum_exp_pooling_prefers(self, widest_dtype):
        """A scale that is not positive would turn the maxima around."""
        inputs = Case(dtype=widest_dtype).inputs()
        with pytest.raises(NotImplementedError, match="scale=-1"):
            self.select(*inputs, scale=-1.0)


REFUSED = {
    "block_size=12": {"block_size": 12},
    "block_size=520": {"block_size": 520},
    "top_k=65": {"top_k": 65},
    "float16 index queries": {"dtype": "float16"},
    "index_dim=257": {"index_dim": 257},
    "MXU of a v7x has no 8-bit": {"index_precision": "int8", "chip": "v7x"},
    "pages of 8 keys": {"block_size": 8, "num_keys": 320, "paged": True},
    "300 keys in blocks of 16.*score_bytes=9000": {
        "config": dataclasses.replace(SMALL, score_bytes=9000)
    },
}


@pytest.mark.parametrize("reason", REFUSED)
def test_refusals(reason):
    case = Case(**REFUSED[reason])
    with pytest.raises(NotImplementedError, match=reason):
        case.actual(*case.inputs())


def test_rows_are_fewer_where_their_scores_would_not_fit():
    case = Case(config=dataclasses.replace(SMALL, rows=512, score_bytes=24_000))
    inputs = case.inputs()
    np.testing.assert_array_equal(case.actual(*inputs), case.expected(*inputs))


def test_a_cpu_is_refused():
    with pytest.raises(NotImplementedError, match="need a TPU"):
        select_blocks(*Case().inputs(), block_size=16, top_k=4, implementation="mosaic_tpu")


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("rows", 100, "rows=100: choose a multiple of 128"),
        ("slots", 1, "slots=1: choose at least 2"),
        ("products", 0, "products=0: must be >= 1"),
        ("unroll", 0, "unroll=0: must be >= 1"),
        ("score_bytes", 0, "score_bytes=0: must be >= 1"),
    ],
)
def test_configs_say_what_is_wrong(field, value, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SMALL, **{field: value})


def compile_case(case, chip):
    """Compiles a call with the chip's tuned tiles."""

    def run(index_q, index_k, segment_ids, query_offset, page_table):
        options = {**case.options(), "page_table": page_table}
        return mosaic_tpu.select_blocks(index_q, index_k, segment_ids, query_offset, **options)

    shape = jax.ShapeDtypeStruct
    keys, table = (case.batch, case.num_keys, case.index_dim), None
    if case.paged:
        num_blocks = case.num_keys // case.block_size
        keys = (case.batch * num_blocks, case.block_size, case.index_dim)
        table = shape((case.batch, num_blocks), "int32")
    return compile_for_tpu(
        run,
        shape((case.batch, case.num_queries, case.num_heads, case.index_dim), case.dtype),
        shape(keys, case.dtype),
        shape((case.batch, case.num_keys), "int32") if case.packed else None,
        shape((case.batch,), "int32"),
        table,
        chip=chip,
    )


LARGE = Case(
    num_queries=2**15, num_keys=2**15, num_heads=4, index_dim=128, block_size=128, top_k=16
)
COMPILED = {
    "32K, packed": dataclasses.replace(LARGE, packed=True, num_sink_blocks=1),
    "1M": dataclasses.replace(LARGE, num_queries=2**20, num_keys=2**20),
    "decoding at a ragged 1M": dataclasses.replace(
        LARGE, batch=4, num_queries=1, num_keys=2**20 - 1000
    ),
}


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("case", COMPILED.values(), ids=COMPILED)
def test_compiles(case, chip):
    text = compile_case(case, chip).as_text()
    assert "select_blocks" in text
    assert "tpu_custom_call" in text


@pytest.mark.parametrize(
    ("change", "chip"),
    [
        ({"block_size": 64, "index_dim": 64, "top_k": 64, "num_keys": 2**17}, "v5p"),
        ({"batch": 64, "num_queries": 1, "num_keys": 2**20, "paged": True}, "v5p"),
        ({"batch": 3, "num_queries": 1, "num_keys": 2**15, "paged": True}, "v7x"),
        ({"block_size": 8, "batch": 2}, "v7x"),
        ({"dtype": "float32", "num_heads": 1}, "v6e"),
        ({"dtype": "float32"}, "v5p"),
        ({"index_precision": "int8"}, "v5e"),
        ({"index_precision": "int8"}, "v6e"),
    ],
)
def test_compiles_other_sizes_and_dtypes(change, chip):
    case = dataclasses.replace(LARGE, **change)
    assert "tpu_custom_call" in compile_case(case, chip).as_text()
