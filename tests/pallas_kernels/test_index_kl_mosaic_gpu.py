"""`index_kl` on Hopper: interpreted against the oracle, and compiled ahead for an H100."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import numpy_oracle
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu
from op_cases import ascending_picks, compiled, segments_of

from pallas_kernels import BlockSelection, index_kl
from pallas_kernels.ahead_of_time import compile_for_h100
from pallas_kernels.index_kl import api, chunks_mosaic_gpu, mosaic_gpu
from pallas_kernels.index_kl.index_k_mosaic_gpu import IndexKConfig
from pallas_kernels.index_kl.mosaic_gpu import IndexKLConfig
from pallas_kernels.index_kl.tiles import TILE_QUERIES
from pallas_kernels.index_kl.tiles_mosaic_gpu import Scales, TileConfig
from pallas_kernels.mosaic_gpu import Target, traced_for
from pallas_kernels.residuals import INDEX_GRADIENTS

SMALL = IndexKLConfig(
    TileConfig(num_thread_blocks=1), IndexKConfig(num_thread_blocks=1, num_parts=2)
)
SINGLE = IndexKLConfig(
    TileConfig(num_workers=1, num_slots=1, num_thread_blocks=1),
    IndexKConfig(num_workers=1, num_slots=1, num_parts=1, num_thread_blocks=1),
)
# One row of 64 queries per chunk.
CHUNKS = dataclasses.replace(SMALL, chunk_bytes=1, queries_per_row=64)
SCALES = {"scale": 0.2, "index_scale": 0.15}
LOSS_WEIGHT = 0.3


@dataclasses.dataclass(frozen=True)
class Case:
    """Shapes and place of one call; top_k 0 is the whole causal prefix."""

    per_group: int = 16
    groups: int = 1
    batch: int = 1
    num_queries: int = 64
    num_keys: int = 192
    head_dim: int = 64
    index_dim: int = 64
    block_size: int = 64
    top_k: int = 2
    density: float = 0.2
    query_offset: int | tuple[int, ...] = 128
    documents: tuple[tuple[int, int], ...] = ()
    dtype: str = "bfloat16"
    weight: float = 1e-6
    config: IndexKLConfig = SMALL

    def inputs(self):
        """q, k, index_q, index_k."""
        rng = np.random.default_rng(0)
        queries, keys = (self.batch, self.num_queries), (self.batch, self.num_keys)
        for shape in (
            (*queries, self.per_group * self.groups, self.head_dim),
            (*keys, self.groups, self.head_dim),
            (*queries, self.groups, self.index_dim),
            (*keys, self.index_dim),
        ):
            yield jnp.asarray(rng.normal(size=shape), self.dtype)

    def block_ids(self):
        """Ascending, then -1: any block, of the future and of other documents too."""
        if not self.top_k:
            return None
        shape = self.batch, self.groups, self.num_queries, self.top_k
        num_blocks = -(-self.num_keys // self.block_size)
        return ascending_picks(
            shape, num_blocks, lambda rng, most: rng.binomial(most, self.density)
        )

    def segment_ids(self):
        return segments_of(self.documents, self.batch, self.num_keys)

    def mask(self, block_ids):
        return numpy_oracle.support(
            self.batch,
            self.groups,
            self.num_queries,
            self.num_keys,
            block_ids,
            self.block_size,
            segment_ids=self.segment_ids(),
            query_offset=self.query_offset,
        )

    def main_lse(self, q, k):
        """The oracle's, as attention would return it."""
        mask = self.mask(self.block_ids())
        exact = (np.asarray(x, np.float64) for x in (q, k, k))
        _, lse = numpy_oracle.attention(*exact, mask, SCALES["scale"])
        return jnp.asarray(lse, jnp.float32)

    def weights(self):
        """Of the loss, as small as those of a mean over many queries."""
        shape = self.batch, self.groups, self.num_queries
        return jnp.asarray(self.weight * np.random.default_rng(2).normal(size=shape), jnp.float32)

    def align(self, q, k, index_q, index_k, main_lse, weights):
        """Value, log-sum-exp and gradients; to be traced for some target."""
        block_ids, segments, offset = self.block_ids(), self.segment_ids(), self.query_offset

        def run(index_q, index_k):
            loss, *terms = mosaic_gpu.index_kl(
                q,
                k,
                index_q,
                index_k,
                None if block_ids is None else jnp.asarray(block_ids),
                None if segments is None else jnp.asarray(segments),
                offset if isinstance(offset, int) else jnp.asarray(offset, jnp.int32),
                main_lse,
                weights,
                block_size=self.block_size,
                config=self.config,
                **SCALES,
            )
            # As a loss that is divided by a number of layers.
            return LOSS_WEIGHT * loss, terms

        gradients, terms = jax.grad(run, (0, 1), has_aux=True)(index_q, index_k)
        return *terms, *gradients


def interpreted(races=False):
    """Shared and device memory that nobody wrote is NaN."""
    return traced_for(Target(interpret=plgpu.InterpretGPUParams(detect_races=races)))


def run(case, inputs, races=False):
    with interpreted(races):
        return compiled(case.align)(*inputs, case.main_lse(inputs[0], inputs[1]), case.weights())


def expected(case, inputs):
    """As `run`, by the oracle in float64."""
    mask = case.mask(case.block_ids())
    exact = [np.asarray(x, np.float64) for x in inputs]
    kl, index_lse = numpy_oracle.index_kl(*exact, mask, **SCALES)
    weights = LOSS_WEIGHT * np.asarray(case.weights(), np.float64)
    return kl, index_lse, *numpy_oracle.index_kl_gradients(*exact, mask, weights, **SCALES)


def relative_error(actual, wanted):
    difference = np.asarray(actual, np.float64) - wanted
    return np.linalg.norm(difference) / max(np.linalg.norm(wanted), 1e-30)


def assert_as_oracle(case):
    inputs = list(case.inputs())
    (kl, index_lse, *gradients) = results = run(case, inputs)
    wanted_kl, wanted_lse, *wanted = expected(case, inputs)
    np.testing.assert_allclose(index_lse, wanted_lse, atol=1e-4, rtol=1e-5)
    # The rounding of a probability to float16, which heads average.
    np.testing.assert_allclose(kl, wanted_kl, atol=5e-4, rtol=1e-3)
    for gradient, exact in zip(gradients, wanted, strict=True):
        assert gradient.dtype == case.dtype
        assert np.abs(exact).max() > 0
        rounding = relative_error(jnp.asarray(exact, case.dtype), exact)
        assert relative_error(gradient, exact) < 4e-3 + rounding
    return results


CASES = {
    # The gradients of scores are below what float16 resolves: only rounded to it at the end.
    "float16, small gradients": Case(dtype="float16", weight=2e-5),
    "one head, two groups, rounds of one slot": Case(per_group=1, groups=2, config=SINGLE),
    "4 heads, ragged, chunks": Case(
        per_group=4, num_queries=100, num_keys=170, query_offset=70, top_k=1, config=CHUNKS
    ),
    "packed, padded": Case(
        num_keys=300, documents=((0, 110), (128, 200)), query_offset=90, top_k=4
    ),
    "two rows, offsets, index dim 128": Case(
        batch=2, query_offset=(64, 128), per_group=32, index_dim=128
    ),
    "causal prefix, ragged, chunks": Case(
        top_k=0, per_group=8, num_queries=90, num_keys=190, query_offset=(90,), config=CHUNKS
    ),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_value_and_gradients(case):
    assert_as_oracle(case)


def test_rows_without_support_are_zero_and_their_queries_reach_nobody():
    """Query 0 is what places of nobody might load: it selects nothing, and is NaN."""
    case = Case()
    case_ids = case.block_ids()
    case_ids[:, :, 0] = -1
    q, k, index_q, index_k = case.inputs()
    lse = case.main_lse(q, k)
    q, index_q = (x.at[:, 0].set(jnp.nan) for x in (q, index_q))
    with interpreted(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(Case, "block_ids", lambda self: case_ids)
        results = compiled(case.align)(q, k, index_q, index_k, lse, case.weights())
        nothing = ~case.mask(case_ids).any(-1)
    kl, index_lse, d_index_q, d_index_k = (np.asarray(x, np.float32) for x in results)
    assert nothing[:, :, 0].all()
    assert not nothing.all()
    assert (kl[nothing] == 0).all()
    assert np.isfinite(kl).all()
    np.testing.assert_array_equal(index_lse == -np.inf, nothing)
    assert (d_index_q[np.moveaxis(nothing, 1, 2)] == 0).all()
    assert np.isfinite(d_index_q).all()
    assert np.isfinite(d_index_k).all()


def test_a_row_of_gradients_sums_to_zero_and_two_runs_agree_bit_for_bit():
    """With index keys all alike the gradient of an index query is its row's sum times the key."""
    case = Case(density=0.15)
    q, k, index_q, index_k = case.inputs()
    alike = jnp.broadcast_to(index_k[:, :1], index_k.shape)
    arguments = q, k, index_q, alike, case.main_lse(q, k)
    with interpreted():
        align = compiled(case.align)
        first, second = (align(*arguments, case.weights()) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        np.testing.assert_array_equal(np.asarray(a, np.float64), np.asarray(b, np.float64))
    gradient = np.abs(np.asarray(first[2], np.float64)).max()
    assert gradient < 2e-3 * np.abs(alike).max() * LOSS_WEIGHT * np.abs(case.weights()).max()
    assert np.abs(np.asarray(first[3], np.float64)).max() > 0


def test_no_races(capfd):
    """Tiles of one step or two: what a ring of two slots holds is of two tiles."""
    config = dataclasses.replace(SINGLE, tiles=dataclasses.replace(SINGLE.tiles, num_slots=2))
    case = Case(density=0.1, per_group=8, config=config)
    run(case, list(case.inputs()), races=True)
    # The interpreter remembers the races of the last kernel only, but prints those of each.
    assert "RACE" not in capfd.readouterr().out.upper()


def test_the_teacher_has_no_gradient():
    case = Case(density=0.1)
    q, k, index_q, index_k = case.inputs()
    block_ids = jnp.asarray(case.block_ids())
    lse = case.main_lse(q, k)

    def loss(q, k, lse, weights):
        place = block_ids, None, 128, lse, weights
        return mosaic_gpu.index_kl(
            q, k, index_q, index_k, *place, block_size=64, config=SMALL, **SCALES
        )[0]

    with interpreted():
        gradients = compiled(jax.grad(loss, (0, 1, 2, 3)))(q, k, lse, case.weights())
    assert all((np.asarray(x, np.float32) == 0).all() for x in gradients)


COMPILED = {
    "as shipped": Case(groups=2, head_dim=128, index_dim=128, block_size=128, top_k=16),
    "64 heads, blocks of 64": Case(per_group=64, head_dim=128, index_dim=64, top_k=3),
}


@pytest.mark.parametrize("case", COMPILED.values(), ids=COMPILED)
def test_compiles_for_an_h100_without_spills(case):
    """In their default shapes."""
    case = dataclasses.replace(case, num_queries=512, num_keys=512, query_offset=0)
    case = dataclasses.replace(case, config=IndexKLConfig())
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in case.inputs()]
    heads = case.per_group * case.groups
    lse = jax.ShapeDtypeStruct((1, heads, 512), "float32")
    weights = jax.ShapeDtypeStruct(case.weights().shape, "float32")
    kernels = compile_for_h100(case.align, *shapes, lse, weights)
    names = [kernel.name.removesuffix("_mosaic_gpu_kernel") for kernel in kernels]
    assert sorted(names) == ["index_k_gradient", "index_kl_alignment", "index_kl_log_sum_exp"]
    assert all(kernel.spill_bytes == kernel.stack_bytes == 0 for kernel in kernels)


@pytest.mark.fast
@pytest.mark.parametrize("tokens", [2**17, 2**20])
@pytest.mark.parametrize("top_k", [0, 16])
def test_chunks_bound_memory_and_places_whatever_the_length(tokens, top_k):
    """64/4 heads; the tiles of one chunk with what is stored by tile and by row."""
    width, groups, heads, block_size, chunk_bytes = 128, 4, 16, 128, 2**31
    result_bytes = TILE_QUERIES * (width + block_size) * 2
    found = []

    def tiles(*arrays):
        scales = Scales(block_size, 1.0, 1.0, heads)
        call = chunks_mosaic_gpu.as_kernels_take(scales, *arrays, None, 0)
        call, chunks = chunks_mosaic_gpu.cut(call, result_bytes, chunk_bytes, None)
        found.append(chunks)
        return chunks_mosaic_gpu.chunk_tiles(call, chunks, jnp.int32(0))

    shapes = (
        ((1, tokens, groups * heads, width), "bfloat16"),
        ((1, tokens, groups, width), "bfloat16"),
        ((1, groups * heads, tokens), "float32"),
        ((1, tokens, groups, width), "bfloat16"),
        ((1, tokens, width), "bfloat16"),
        *([((1, groups, tokens, top_k), "int32")] * bool(top_k)),
    )
    arrays = [jax.ShapeDtypeStruct(*shape) for shape in shapes]
    result = jax.eval_shape(lambda *x: tiles(*x, *([] if top_k else [None])), *arrays)
    (chunks,) = found
    by_tile = len(result.tiles) * result_bytes
    by_row = len(result.queries) * TILE_QUERIES * (width * 2 + heads * 4 + 16)
    assert chunks.number * chunks.length >= tokens
    # No smaller than need be, unless a chunk is a single row already; at most half more for that.
    assert by_tile + by_row <= chunk_bytes * (1 if chunks.length > chunks.queries_per_row else 2)
    assert by_tile + by_row > chunk_bytes / 2 or chunks.length == chunks.queries_per_row
    assert len(result.tiles) * TILE_QUERIES < 2**31


@pytest.mark.fast
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"dtype": "float32"}, "all in bfloat16 or all in float16"),
        ({"head_dim": 32}, "head_dim of 64 or 128, not 32"),
        ({"index_dim": 32}, "index dim of 64 or 128, not 32"),
        ({"per_group": 65}, "at most 64 query heads per KV head, not 65"),
        ({"num_queries": 16}, "16 queries are decoding"),
        ({"block_size": 32}, "block_size of 64 or 128, not 32"),
        ({"top_k": 65}, "1 to 64 blocks per query, not 65"),
        ({"top_k": 0, "documents": ((0, 64),)}, "no packed documents"),
    ],
)
def test_refuses(change, reason):
    case = dataclasses.replace(Case(), **change)
    inputs = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in case.inputs()]
    lse = jax.ShapeDtypeStruct((1, case.per_group, case.num_queries), "float32")
    weights = jax.ShapeDtypeStruct(case.weights().shape, "float32")
    with interpreted(), pytest.raises(NotImplementedError, match=reason):
        jax.eval_shape(case.align, *inputs, lse, weights)


@pytest.mark.fast
def test_without_main_lse_the_default_is_the_reference_and_says_why():
    case = Case()
    selection = BlockSelection(jnp.asarray(case.block_ids()), 64)
    inputs = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in case.inputs()]
    with interpreted():
        with pytest.raises(NotImplementedError, match="need main_lse"):
            jax.eval_shape(
                lambda *x: index_kl(*x, selection, query_offset=128, implementation="mosaic_gpu"),
                *inputs,
            )
        result = jax.eval_shape(lambda *x: index_kl(*x, selection, query_offset=128), *inputs)
    assert result.kl.shape == (1, 1, 64)


@pytest.mark.fast
def test_rematerialisation_that_keeps_the_gradients_makes_one_teacher():
    case = Case()
    selection = BlockSelection(jnp.asarray(case.block_ids()), 64)
    q, k, *index = (jax.ShapeDtypeStruct(x.shape, x.dtype) for x in case.inputs())
    lse = jax.ShapeDtypeStruct((1, case.per_group, 64), "float32")

    def loss(index_q, index_k, q, k, lse):
        options = {"query_offset": 128, "main_lse": lse, "implementation": "mosaic_gpu"}
        return index_kl(q, k, index_q, index_k, selection, **options).loss

    def mentioned(policy):
        gradient = jax.grad(jax.checkpoint(loss, policy=policy), (0, 1))
        with traced_for(Target()):
            return str(jax.make_jaxpr(gradient)(*index, q, k, lse)).count("index_kl_alignment")

    policies = jax.checkpoint_policies
    kept = mentioned(policies.save_only_these_names(INDEX_GRADIENTS))
    assert 2 * kept == mentioned(policies.nothing_saveable) > 0


@pytest.mark.fast
def test_a_log_sum_exp_of_another_shape_is_an_error():
    """Past the shape checks of these tests, as a user would see it."""
    lse = jax.ShapeDtypeStruct((1, 64, 16), "float32")
    with pytest.raises(ValueError, match=r"main_lse has shape \(1, 64, 16\), expected"):
        api._check_shape("main_lse", lse, (1, 16, 64), "[B, Hq, T]")


@pytest.mark.fast
@pytest.mark.parametrize(
    ("config", "field"),
    [
        (lambda: TileConfig(num_workers=3), "num_workers"),
        (lambda: TileConfig(num_slots=0), "num_slots"),
        (lambda: TileConfig(num_slots=4).check(128, 128), "num_slots"),
        (lambda: IndexKConfig(num_workers=3), "num_workers"),
        (lambda: IndexKConfig(num_parts=0), "num_parts"),
        (lambda: IndexKConfig(num_slots=4).check(128, 128), "num_slots"),
        (lambda: IndexKLConfig(chunk_bytes=0), "chunk_bytes"),
        (lambda: IndexKLConfig(queries_per_row=96), "queries_per_row"),
    ],
)
def test_config_errors_name_the_field(config, field):
    with pytest.raises(ValueError, match=field):
        config()
