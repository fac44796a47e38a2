"""`select_blocks` on Hopper: the kernels interpreted on a CPU, and compiled ahead for an H100."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu
from op_cases import compiled

from pallas_kernels import select_blocks
from pallas_kernels.ahead_of_time import compile_for_h100
from pallas_kernels.mosaic_gpu import Target, traced_for
from pallas_kernels.select_blocks import mosaic_gpu, reference
from pallas_kernels.select_blocks.mosaic_gpu import SelectConfig
from pallas_kernels.select_blocks.scores_mosaic_gpu import (
    GROUP,
    Documents,
    Scales,
    ScoreConfig,
    ScoreOptions,
    block_scores,
)
from pallas_kernels.select_blocks.top_k_mosaic_gpu import MAX_TOP_K, TopKConfig, top_ids

# The interpreter takes about 0.3 s per thread block: small tiles, few of them.
SMALL = SelectConfig(ScoreConfig(queries_per_warpgroup=64, num_stages=2))
TWO_LEVELS = dataclasses.replace(SMALL, min_blocks_of_two_levels=1)

# Documents of 150 and 320 tokens in row 0, of 320 and 180 in row 1, with padding behind each.
SEGMENT_IDS = np.zeros((2, 512), np.int32)
for _row, _start, _stop, _id in (
    (0, 0, 150, 1),
    (0, 192, 512, 2),
    (1, 0, 320, 1),
    (1, 320, 500, 2),
):
    SEGMENT_IDS[_row, _start:_stop] = _id


def integers(*shape, seed=0):
    """Small integers in four of the features: scores are exact in every dtype and often tie."""
    values = np.random.default_rng(seed).integers(-2, 3, shape).astype(np.float64)
    values[..., 4:] = 0
    return values


def interpreted(**params):
    return traced_for(Target(interpret=plgpu.InterpretGPUParams(**params)))


@dataclasses.dataclass(frozen=True)
class Case:
    """Shapes and options of one call."""

    batch: int = 1
    num_queries: int = 256
    num_keys: int | None = None
    num_heads: int = 1
    index_dim: int = 64
    block_size: int = 64
    top_k: int = 3
    dtype: str = "bfloat16"
    num_local_blocks: int = 1
    num_sink_blocks: int = 0
    packed: bool = False
    query_offset: int | tuple[int, ...] = 0
    index_precision: str = "native"
    config: SelectConfig = SMALL

    def inputs(self, draw=integers):
        slots = self.num_keys or self.num_queries
        index_q = draw(self.batch, self.num_queries, self.num_heads, self.index_dim)
        index_k = draw(self.batch, slots, self.index_dim, seed=1)
        if self.index_precision == "int8":  # blocks of different scales
            index_k *= 1 + np.arange(slots)[:, None] // self.block_size % 3
        return jnp.asarray(index_q, self.dtype), jnp.asarray(index_k, self.dtype)

    def options(self):
        return {
            "block_size": self.block_size,
            "top_k": self.top_k,
            "num_local_blocks": self.num_local_blocks,
            "num_sink_blocks": self.num_sink_blocks,
            "pooling": "max",
            "scale": self.index_dim**-0.5,
            "index_precision": self.index_precision,
        }

    def place(self):
        offset = self.query_offset
        return (
            jnp.asarray(SEGMENT_IDS) if self.packed else None,
            offset if isinstance(offset, int) else jnp.asarray(offset, jnp.int32),
        )

    def expected(self, index_q, index_k):
        def run(index_q, index_k):
            return reference.select_blocks(index_q, index_k, *self.place(), **self.options())

        return np.asarray(compiled(run)(index_q, index_k))

    def actual(self, index_q, index_k, **interpretation):
        def run(index_q, index_k):
            options = {**self.options(), "config": self.config}
            return mosaic_gpu.select_blocks(index_q, index_k, *self.place(), **options)

        with interpreted(**interpretation):
            return np.asarray(compiled(run)(index_q, index_k))


CASES = {
    "two heads, ragged, a tile per chunk": Case(
        num_queries=300, num_heads=2, config=dataclasses.replace(SMALL, score_bytes=1)
    ),
    "float16, wide blocks and heads": Case(
        num_queries=512, index_dim=128, block_size=128, top_k=2, dtype="float16"
    ),
    "fewer blocks than K": Case(num_queries=200, top_k=17),
    "forced blocks": Case(num_queries=384, top_k=4, num_local_blocks=2, num_sink_blocks=1),
    "packed": Case(batch=2, num_queries=512, top_k=2, packed=True),
    "packed and forced": Case(
        batch=2, num_queries=512, packed=True, num_local_blocks=2, num_sink_blocks=1
    ),
    "packed, offset per row": Case(
        batch=2, num_queries=90, num_keys=512, top_k=2, packed=True, query_offset=(401, 275)
    ),
    "offset, ragged keys": Case(num_queries=128, num_keys=500, query_offset=372),
    "two levels": Case(
        num_queries=100, num_keys=2600, query_offset=2500, top_k=2, config=TWO_LEVELS
    ),
    "two levels, packed and forced, chunks of one tile and of three": Case(
        batch=2, num_queries=512, packed=True, num_sink_blocks=1,
        config=dataclasses.replace(TWO_LEVELS, score_bytes=2 * 8 * 4 * 128 * 3),
    ),
    "8 bits": Case(index_precision="int8", top_k=2),
    "8 bits, wide, of float32": Case(
        num_queries=384, index_dim=128, block_size=128, top_k=2, index_precision="int8",
        dtype="float32",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_ids_are_those_of_the_reference(case):
    inputs = case.inputs()
    expected = case.expected(*inputs)
    assert len(np.unique(expected.reshape(-1, case.top_k), axis=0)) >= 3, "the case must choose"
    np.testing.assert_array_equal(case.actual(*inputs), expected)


def test_no_races(capfd):
    case = Case(num_queries=384, config=TWO_LEVELS)
    inputs = case.inputs()
    actual = case.actual(*inputs, detect_races=True)
    np.testing.assert_array_equal(actual, case.expected(*inputs))
    # The interpreter remembers the races of the last kernel only, but prints those of each.
    assert "RACE" not in capfd.readouterr().out


def test_what_is_not_written_is_not_chosen():
    """All scores are negative and stale memory holds zeros, also in the groups looked at."""
    case = Case(num_queries=128, num_keys=2600, query_offset=2472, config=TWO_LEVELS)
    index_q, index_k = case.inputs(lambda *shape, seed=0: 1 + abs(integers(*shape, seed=seed)))
    actual = case.actual(index_q, -index_k, uninitialized_memory="zero")
    np.testing.assert_array_equal(actual, case.expected(index_q, -index_k))


# numpy's warnings of what the case is about.
@pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered in matmul:RuntimeWarning")
@pytest.mark.parametrize(
    ("index_precision", "num_local_blocks", "num_sink_blocks", "best", "of_nan_query"),
    [
        ("native", 1, 0, [1, 3, 5], [4, -1, -1]),
        ("native", 2, 1, [0, 4, 5], [0, 3, 4]),
        ("native", 2, 0, [1, 4, 5], [3, 4, -1]),
        ("int8", 1, 0, [1, 3, 5], [4, -1, -1]),
    ],
)
def test_nan_and_overflow(index_precision, num_local_blocks, num_sink_blocks, best, of_nan_query):
    """Forced, then overflowed, then finite; a NaN token spoils its block, a NaN query all."""
    case = Case(
        num_queries=384,
        index_precision=index_precision,
        num_local_blocks=num_local_blocks,
        num_sink_blocks=num_sink_blocks,
    )
    index_q, index_k = (np.array(array, np.float64) for array in case.inputs())
    index_q[..., 0], index_q[0, 300, 0] = 1e38, np.nan
    index_k[..., 0] = 0
    index_k[0, [70, 200], 0] = 1e38  # +inf in blocks 1 and 3
    index_k[0, 10] = np.nan  # in block 0
    index_k[0, 128:192, 0] = -1e38  # -inf all over block 2
    inputs = jnp.asarray(index_q, "bfloat16"), jnp.asarray(index_k, "bfloat16")
    actual = case.actual(*inputs)
    np.testing.assert_array_equal(actual, case.expected(*inputs))
    assert actual[0, 0, 383].tolist() == best
    assert actual[0, 0, 300].tolist() == of_nan_query


@pytest.mark.parametrize("num_local_blocks", [1, 2])
def test_scores_and_their_maxima_over_groups_of_blocks(num_local_blocks):
    """128 queries behind 18 blocks: the second group is ragged. A NaN spoils block 3 alone."""
    case = Case(num_queries=128, num_keys=20 * 64, query_offset=18 * 64)
    index_q, index_k = case.inputs(
        lambda *shape, seed=0: np.random.default_rng(seed).normal(size=shape)
    )
    index_k = index_k.at[0, 3 * 64 + 5].set(jnp.nan)
    options = ScoreOptions(
        case.block_size, scale=0.3, num_local_blocks=num_local_blocks, groups=True
    )
    with interpreted():
        scores, groups = block_scores(
            index_q,
            index_k,
            jnp.asarray([case.query_offset]),
            jnp.int32(0),
            None,
            None,
            num_queries=128,
            options=options,
            config=SMALL.scores,
        )
    tokens = np.asarray(index_k, np.float64)[0] @ np.asarray(index_q, np.float64)[0, :, 0].T * 0.3
    expected = tokens.reshape(20, 64, 128).max(1)
    expected[3] = -np.inf
    expected[18, :64] = -np.inf  # the own block of the first queries
    if num_local_blocks == 2:
        expected[17, :64] = expected[18, 64:] = np.inf
    np.testing.assert_allclose(scores[0, 0, :19], expected[:19], rtol=1e-5)
    expected_groups = [expected[:GROUP].max(0), expected[GROUP:19].max(0)]
    np.testing.assert_allclose(groups[0, 0], expected_groups, rtol=1e-5)


REFUSED = {
    "pooling='mean'": {"pooling": "mean"},
    "block_size=32": {"block_size": 32},
    "top_k=65": {"top_k": 65},
    "scale=-1.0": {"scale": -1.0},
}


@pytest.mark.parametrize("reason", REFUSED)
def test_refused_options(reason):
    with interpreted(), pytest.raises(NotImplementedError, match=reason):
        mosaic_gpu.select_blocks(
            *Case().inputs(), None, 0, **{**Case().options(), **REFUSED[reason]}
        )


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        (Case(dtype="float32"), "float32 index queries"),
        (Case(index_dim=32), "index_dim=32"),
        (Case(num_queries=63, num_keys=256), "decoding: 63 queries"),
    ],
)
def test_refused_inputs(case, reason):
    with interpreted(), pytest.raises(NotImplementedError, match=reason):
        mosaic_gpu.select_blocks(*case.inputs(), None, 0, **case.options())


def test_a_cpu_takes_the_reference():
    inputs = Case().inputs()
    with pytest.raises(NotImplementedError, match="need an NVIDIA Hopper GPU"):
        select_blocks(*inputs, block_size=64, top_k=3, implementation="mosaic_gpu")
    ids = select_blocks(*inputs, block_size=64, top_k=3).block_ids
    np.testing.assert_array_equal(ids, Case().expected(*inputs))


def test_runs_in_a_shard_map():
    """On a mesh of one device: the interpreter mixes up the barriers of several."""
    case = Case(batch=2, num_queries=128, num_heads=2)
    index_q, index_k = case.inputs()
    mesh = jax.make_mesh((1, 1), ("data", "tensor"), (jax.sharding.AxisType.Explicit,) * 2)
    with jax.set_mesh(mesh), interpreted():
        ids = select_blocks(
            jax.device_put(index_q, jax.P("data", None, "tensor", None)),
            jax.device_put(index_k, jax.P("data")),
            block_size=64,
            top_k=3,
            implementation="mosaic_gpu",
        ).block_ids
        assert ids.sharding.spec == jax.P("data", "tensor", None, None)
    np.testing.assert_array_equal(ids, case.expected(index_q, index_k))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ScoreConfig(queries_per_warpgroup=96), "queries_per_warpgroup=96.*64 or 128"),
        (lambda: ScoreConfig(num_consumers=3), "num_consumers=3: choose 1 or 2"),
        (lambda: ScoreConfig(num_stages=1), "num_stages=1: choose at least 2"),
        (
            lambda: ScoreConfig(num_stages=5).check_shared_memory(128, 128, 2),
            "num_stages=5.*232448",
        ),
        (lambda: TopKConfig(queries_per_lane=3), "queries_per_lane=3: choose 1 or 2"),
        (lambda: TopKConfig(unroll=0), "unroll=0: must be >= 1"),
        (lambda: SelectConfig(ScoreConfig(64, 2), TopKConfig(2)), "top_k.tile=256 must divide"),
        (lambda: SelectConfig(score_bytes=0), "score_bytes=0: must be >= 1"),
    ],
)
def test_configs_say_what_is_wrong(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_million_tokens_go_in_chunks_of_whole_waves():
    """33 tiles of 4 heads are one thread block for every core."""
    config, heads, num_blocks = SelectConfig(), 4, 8192
    chunk = config.chunk(2**20, heads, num_blocks)
    assert chunk % (33 * config.scores.tile) == 0
    assert config.score_bytes / 2 < 4 * heads * num_blocks * chunk <= config.score_bytes
    assert config.chunk(8192, heads, 64) == 8192
    assert config.chunk(2**20, 64 * heads, num_blocks) == 2 * config.scores.tile


def kernel_resources(fn, *arrays):
    """Of the single kernel in `fn`; `arrays` are (shape, dtype)."""
    (resources,) = compile_for_h100(fn, *(jax.ShapeDtypeStruct(*array) for array in arrays))
    return resources


@pytest.mark.parametrize(
    ("dtype", "block_size", "index_dim"),
    [("float16", 128, 128)]
    + [(dtype, *sizes) for dtype in ("bfloat16", "int8") for sizes in ((64, 128), (128, 64))]
    + [(dtype, size, size) for dtype in ("bfloat16", "int8") for size in mosaic_gpu.SIZES],
)
def test_the_score_kernel_compiles_without_spills(dtype, block_size, index_dim):
    config, length = ScoreConfig(), 1024
    options = ScoreOptions(block_size, 0.1, num_sink_blocks=1, groups=True)

    def run(index_q, index_k, offset, start, first, earliest, *scales):
        documents = Documents(first, earliest)
        return block_scores(
            index_q,
            index_k,
            offset,
            start,
            documents,
            Scales(*scales) if scales else None,
            num_queries=length,
            options=options,
            config=config,
        )

    arrays = [
        ((1, length, 4, index_dim), dtype),
        ((1, length, index_dim), dtype),
        ((1,), "int32"),
        ((), "int32"),
        ((1, length), "int32"),
        ((1, length // config.tile), "int32"),
    ]
    if dtype == "int8":
        arrays += [((1, 4, length), "float32"), ((1, length // block_size), "float32")]
    assert kernel_resources(run, *arrays).spill_bytes == 0


@pytest.mark.parametrize("top_k", [16, MAX_TOP_K])
def test_the_top_k_kernel_compiles_without_spills(top_k):
    config, length = TopKConfig(), 1024

    def run(scores, own, first, end, parents):
        return top_ids(scores, own, first, end, parents, top_k=top_k, config=config)

    tiles = ((1, length // config.tile), "int32")
    arrays = [
        ((1, 4, 16 * top_k, length), "float32"),
        ((1, length), "int32"),
        tiles,
        tiles,
        ((1, 4, top_k, length), "int32"),
    ]
    assert kernel_resources(run, *arrays).spill_bytes == 0
