"""`index_kl` on a TPU: interpreted on a CPU, and compiled for every chip."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import numpy_oracle
import pytest
from op_cases import compiled
from test_index_kl_triton import weights_of
from tpu_cases import CASES, SMALL, changed, interpreted, interpreted_strictly, without_sorts
from triton_cases import assert_close, exact

from pallas_kernels import BlockSelection, index_kl
from pallas_kernels.ahead_of_time_tpu import compile_for_tpu
from pallas_kernels.index_kl import mosaic_tpu
from pallas_kernels.index_kl.tiles_mosaic_tpu import IndexKLConfig
from pallas_kernels.mosaic_tpu import CHIPS
from pallas_kernels.tuning import trying

# Documents that start inside a block, as they may without a selection.
PREFIX_CASES = {
    "one head per group, from the first query": changed(
        per_group=1, query_offset=0, num_queries=50, num_keys=50
    ),
    "an offset per batch row": changed(groups=2, batch=2, num_queries=9, query_offset=(4, 130)),
    "documents with padding behind them": changed(
        num_queries=300,
        num_keys=300,
        query_offset=0,
        documents=((0, 150), (170, 200), (200, 290)),
        index_dim=128,
    ),
}


# Little to unroll; lists of several slices and steps with room left.
SMALL_TILES = {
    "queries": 8,
    "blocks_per_step": 4,
    "blocks_per_part": 2,
    "tiles_per_step": 4,
    "tiles_per_part": 2,
    "tiles_per_slice": 4,
    "depth": 2,
}


# A document of a few blocks, one that ends inside a block, and padding.
PACKED = changed(num_queries=150, query_offset=0, documents=((0, 100), (128, 145)), top_k=3)


def align(case, block_ids, main_lse, weights, q, k, index_q, index_k):
    """The loss, and its terms and log-sum-exps."""
    selection = None
    if block_ids is not None:
        selection = BlockSelection(jnp.asarray(block_ids), case.block_size)
    loss, *terms = index_kl(
        *(q, k, index_q, index_k, selection),
        main_lse=main_lse,
        weights=jnp.asarray(weights, jnp.float32),
        implementation="mosaic_tpu",
        **case.place(),
    )
    return loss, terms


def assert_as_oracle(case, block_ids, *, lse_given=False, tiles=SMALL_TILES):
    q, k, v = case.main_inputs()
    index_q, index_k = case.index_inputs()
    mask, arguments = case.mask(block_ids), exact(q, k, index_q, index_k)
    seen = mask.any(-1)
    weights = weights_of(case)
    main_lse = None
    if lse_given:
        main_lse = jnp.asarray(numpy_oracle.attention(*exact(q, k, v), mask)[1], jnp.float32)

    def loss(q, k, index_q, index_k, main_lse):
        return align(case, block_ids, main_lse, weights, q, k, index_q, index_k)

    kernel = "index_kl.tpu_prefix" if block_ids is None else "index_kl.tpu"
    with trying(kernel, tiles):
        run = compiled(jax.grad(loss, (0, 1, 2, 3), has_aux=True))
        (dq, dk, *gradients), results = run(q, k, index_q, index_k, main_lse)
    for actual, wanted in zip(results, numpy_oracle.index_kl(*arguments, mask), strict=True):
        # Nothing is rounded on the way to the results.
        assert_close(actual, wanted, "float32")
    assert not np.asarray(results[0])[~seen].any()
    assert not np.asarray(dq).any()
    assert not np.asarray(dk).any()
    wanted = numpy_oracle.index_kl_gradients(*arguments, mask, weights)
    for actual, gradient in zip(gradients, wanted, strict=True):
        assert actual.dtype == case.dtype
        assert_close(actual, gradient, case.dtype)


# With bfloat16 it is interpreted strictly, below.
@pytest.mark.parametrize("name", [name for name in CASES if name != "bfloat16"])
def test_value_and_gradients(name):
    with interpreted():
        assert_as_oracle(CASES[name], CASES[name].block_ids())


@pytest.mark.parametrize("case", PREFIX_CASES.values(), ids=PREFIX_CASES)
def test_value_and_gradients_of_the_causal_prefix(case):
    with interpreted():
        assert_as_oracle(case, None)


def test_log_sum_exp_of_the_main_scores_is_taken_as_it_is():
    """One that is too large by log 2 halves the teacher."""
    case = changed(num_queries=9)
    arguments = *case.main_inputs()[:2], *case.index_inputs()
    mask = case.mask(None)
    _, lse = numpy_oracle.attention(*exact(*case.main_inputs()), mask)
    with interpreted(), trying("index_kl.tpu_prefix", SMALL_TILES):
        _, (halved, _) = compiled(functools.partial(align, case, None))(
            jnp.asarray(lse + np.log(2), jnp.float32), weights_of(case), *arguments
        )
    kl, _ = numpy_oracle.index_kl(*exact(*arguments), mask)
    np.testing.assert_allclose(halved, (kl - np.log(2)) / 2, atol=1e-6)


def test_default_tiles():
    with interpreted():
        assert_as_oracle(SMALL, SMALL.block_ids(), tiles={}, lse_given=True)


@pytest.mark.parametrize("case", [CASES["bfloat16"], PACKED], ids=["bfloat16", "prefix"])
def test_without_races_and_in_memory_of_nan(case):
    with interpreted_strictly():
        assert_as_oracle(case, None if case is PACKED else case.block_ids(), lse_given=True)


def test_gradients_of_a_querys_scores_sum_to_zero():
    """Index keys that are unit vectors make a query's gradient that of its scores."""
    case = changed(num_queries=30, num_keys=64, query_offset=34, top_k=1)
    q, k, _ = case.main_inputs()
    scores = jnp.asarray(case.normal(7, case.num_queries, 1, case.num_keys), jnp.float32)
    one_hot = jnp.eye(case.num_keys)[None]
    ones = np.ones((1, 1, case.num_queries))

    def gradient(scores):
        return jax.grad(lambda x: align(case, None, None, ones, q, k, x, one_hot)[0])(scores)

    with interpreted(), trying("index_kl.tpu_prefix", SMALL_TILES):
        actual = np.asarray(compiled(gradient)(scores))
    np.testing.assert_allclose(actual.sum(-1), 0, atol=2e-6)
    arguments = exact(q, k, scores, one_hot)
    wanted, _ = numpy_oracle.index_kl_gradients(*arguments, case.mask(None), ones)
    np.testing.assert_allclose(actual, wanted, atol=1e-6)
    assert np.abs(actual).max() > 0.01


def test_student_that_rules_out_what_the_teacher_attends_to():
    """The divergence of scores in the thousands is large and finite, and so are gradients."""
    case = changed(num_queries=10)
    q, k, _ = case.main_inputs()
    index_q, index_k = case.index_inputs()
    arguments, ones = (q, k, index_q * 256, index_k * 8), np.ones((1, 1, case.num_queries))

    def run(*arguments):
        loss = functools.partial(align, case, None, None, ones)
        return jax.value_and_grad(lambda *x: loss(*x)[0], (2, 3))(*arguments)

    with interpreted(), trying("index_kl.tpu_prefix", SMALL_TILES):
        value, gradients = compiled(run)(*arguments)
    assert value > 10000
    assert all(np.isfinite(x).all() for x in gradients)
    mask = case.mask(None)
    wanted = numpy_oracle.index_kl_gradients(*exact(*arguments), mask, np.ones(mask.shape[:3]))
    for actual, gradient in zip(gradients, wanted, strict=True):
        assert_close(actual, gradient, "bfloat16")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"head_dim": 32}, "head_dim of 64 or 128"),
        ({"index_dim": 32}, "index dim of 64 or 128"),
        ({"block_size": 16}, "block_size of 64 or 128"),
        ({"dtype": "float16"}, "bfloat16 or all in float32"),
    ],
)
def test_refuses(changes, reason):
    case = changed(num_queries=1, **changes)
    inputs = *case.main_inputs()[:2], *case.index_inputs()
    with interpreted(), pytest.raises(NotImplementedError, match=reason):
        align(case, case.block_ids(), None, weights_of(case), *inputs)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("queries", 12),
        ("depth", 3),
        ("blocks_per_part", 3),
        ("blocks_per_step", 6),
        ("tiles_per_step", 6),
        ("tiles_per_slice", 100),
    ],
)
def test_config_names_the_field_that_is_wrong(field, value):
    with pytest.raises(ValueError, match=f"{field}={value}"):
        IndexKLConfig(**{field: value})


def gradients(num_queries, prefix, size=128, dtype="bfloat16"):
    """The value and gradients of a large call, with blocks and dims of a size; its arguments."""
    arguments = [
        jax.ShapeDtypeStruct((1, num_queries, *shape), dtype)
        for shape in ((64, size), (4, size), (4, size), (size,))
    ]
    arguments.append(jax.ShapeDtypeStruct((1, 4, num_queries, 16), "int32"))

    def run(q, k, index_q, index_k, block_ids):
        selection = None if prefix else BlockSelection(block_ids, size)

        def loss(index_q, index_k):
            return index_kl(q, k, index_q, index_k, selection, implementation="mosaic_tpu").loss

        return jax.value_and_grad(loss, (0, 1))(index_q, index_k)

    return run, arguments


@pytest.fixture
def unsorted(monkeypatch):
    without_sorts(monkeypatch, mosaic_tpu)


@pytest.mark.parametrize(
    ("chip", "num_queries", "prefix"),
    [
        *((chip, 32768 if chip == "v5p" else 4096, False) for chip in CHIPS),
        # Larger tiles: where there is least memory for them.
        ("v7x", 4096, True),
    ],
)
@pytest.mark.usefixtures("unsorted")
def test_compiles(chip, num_queries, prefix):
    run, arguments = gradients(num_queries, prefix)
    executable = compile_for_tpu(run, *arguments, chip=chip)
    text = executable.as_text()
    for kernel in ("main_lse", "divergence", "index_q_gradient", "index_k_gradient"):
        assert f"index_kl_{kernel}" in text
    assert executable.memory_analysis().temp_size_in_bytes < 2e9


@pytest.mark.usefixtures("unsorted")
@pytest.mark.parametrize("prefix", [False, True])
def test_compiles_with_small_blocks_and_dims(prefix):
    run, arguments = gradients(1024, prefix, 64, "float32")
    assert "index_kl_index_k_gradient" in compile_for_tpu(run, *arguments, chip="v5e").as_text()
