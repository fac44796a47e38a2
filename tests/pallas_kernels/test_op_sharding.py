"""Every op on a mesh of eight fake devices: the single-device results, and really sharded."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from every_op import OPS, assert_same, edit, inputs, results_and_gradients
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from op_cases import BLOCK_SIZE, SEGMENT_IDS, assert_close, compiled

from pallas_kernels import main_block_mass, select_blocks, sparse_attention, visibility
from pallas_kernels.mosaic_gpu import Target, traced_for
from pallas_kernels.sharding import shard_over_batch_heads_and_queries

BATCH_AXES = ("data", "fsdp")
SHARDED = (
    "select_blocks",
    "random",
    "random_per_block",
    "oracle",
    "sparse_attention",
    "dense_attention, window",
    "index_kl, selected",
    "index_kl, dense",
)
SPECS = {name: P(BATCH_AXES, None, "tensor", None) for name in ("q", "k", "v", "index_q")} | {
    "index_k": P(BATCH_AXES, None, None)
}
# As in training: the queries of a token lie where its keys do, and the op gathers the keys.
SPLIT_SEQUENCE = {name: P(spec[0], "context", *spec[2:]) for name, spec in SPECS.items()}


def four_rows(array):
    """Twice the two rows of the other tests, in another order."""
    return np.concatenate([array, array[::-1]])


def mesh(axis_type=AxisType.Explicit, data=2, fsdp=2, tensor=2, context=1):
    names = (*BATCH_AXES, "tensor", "context")
    return jax.make_mesh((data, fsdp, tensor, context), names, axis_types=(axis_type,) * 4)


def place_on(a_mesh, x, specs=SPECS):
    return {name: jax.device_put(x[name], NamedSharding(a_mesh, specs[name])) for name in x}


@pytest.fixture
def x(double_precision):
    return edit(inputs("float64"), four_rows)


@pytest.fixture
def segment_ids():
    return jnp.asarray(four_rows(SEGMENT_IDS))


@pytest.mark.parametrize("op", ["random", "dense_attention, window"])
def test_explicit_mesh(op, x, segment_ids):
    """Batch rows over two mesh axes, heads over the third; documents come unsharded.

    All ops are on a mesh in the next test.
    """
    expected = results_and_gradients(op, x, segment_ids=segment_ids)
    explicit = mesh()
    with jax.set_mesh(explicit):
        placed = place_on(explicit, x)
        results, gradients = results_and_gradients(op, placed, segment_ids=segment_ids)
    assert_same((results, gradients), expected)
    for result in results:
        heads = ("tensor", None) if result.ndim == 4 else ("tensor",)
        assert result.sharding.spec == P(BATCH_AXES, None, *heads)
    for name, gradient in gradients.items():
        assert gradient.sharding.spec == SPECS[name]


@pytest.mark.parametrize("op", SHARDED)
def test_queries_split_over_devices(op, x, segment_ids):
    """A device's queries go on where the last one's end, and its keys' gradients are summed."""
    x, segment_ids = edit(x, lambda array: array[:, :60]), segment_ids[:, :60]
    expected = results_and_gradients(op, x, segment_ids=segment_ids)
    explicit = mesh(fsdp=1, context=2)
    with jax.set_mesh(explicit):
        placed = place_on(explicit, x, SPLIT_SEQUENCE)
        results, gradients = results_and_gradients(op, placed, segment_ids=segment_ids)
    assert_same((results, gradients), expected)
    for result in results:
        heads = ("tensor", None) if result.ndim == 4 else ("tensor",)
        assert result.sharding.spec == P(BATCH_AXES, "context", *heads)
    for name, gradient in gradients.items():
        assert gradient.sharding.spec == SPLIT_SEQUENCE[name]


@pytest.mark.parametrize("op", ["select_blocks", "dense_attention, window", "index_kl, selected"])
@pytest.mark.parametrize("offset", [29, np.array([45, 41, 0, 7], np.int32)], ids=["all", "per row"])
def test_offsets_of_queries_split_over_two_axes(op, offset, x):
    """Two queries per device, of 16 in the middle of the keys."""
    x |= {name: x[name][:, :16] for name in ("q", "index_q")}
    specs = SPECS | dict.fromkeys(("q", "index_q"), P(None, ("context", "data"), None, None))
    expected = results_at(op, x, offset)
    explicit = mesh(fsdp=1, tensor=1, context=4)
    with jax.set_mesh(explicit):
        assert_same(results_at(op, place_on(explicit, x, specs), offset), expected)


def results_at(op, x, offset):
    """An op's results; an int offset stays one."""
    offset = offset if isinstance(offset, int) else jnp.asarray(offset)
    return compiled(lambda x: OPS[op](x, {"query_offset": offset}, {}))(x)


def test_queries_that_are_not_split_keep_their_offset():
    """References cut a known one into causal ranges, on a mesh axis of one device too."""

    def local(x, offset):
        assert offset == 3
        return (x,)

    explicit = mesh(tensor=2, context=1)
    x = jnp.zeros((4, 8, 2))
    with jax.set_mesh(explicit):
        placed = jax.device_put(x, NamedSharding(explicit, P("data", "context", "tensor")))
        shard_over_batch_heads_and_queries(local, ("bqh", "o"), ("bqh",))(placed, 3)


@pytest.mark.parametrize("op", ["sparse_attention", "index_kl, selected"])
def test_explicit_mesh_in_query_chunks(op, x, segment_ids, monkeypatch):
    expected = results_and_gradients(op, x, segment_ids=segment_ids)
    monkeypatch.setattr(visibility, "CHUNK_BYTES", 20_000)
    explicit = mesh()
    with jax.set_mesh(explicit):
        assert_same(
            results_and_gradients(op, place_on(explicit, x), segment_ids=segment_ids), expected
        )


def test_an_offset_per_row_is_split_with_the_batch(x):
    def run(x, offset):
        return OPS["sparse_attention"](x, {"query_offset": offset}, {})

    x = x | {name: x[name][:, :16] for name in ("q", "index_q")}
    offset = jnp.array([45, 41, 0, 7], jnp.int32)
    expected = compiled(run)(x, offset)
    explicit = mesh()
    with jax.set_mesh(explicit):
        assert_same(compiled(run)(place_on(explicit, x), offset), expected)


def test_axes_meant_whole_are_gathered(x, segment_ids):
    """Keys that arrive split over the sequence, and queries over their features."""
    expected = results_and_gradients("dense_attention, window", x, segment_ids=segment_ids)
    x = edit(x, lambda array: array)
    explicit = mesh()
    specs = SPECS | {"q": P("data", None, "tensor", "fsdp"), "v": P(None, None, None, "fsdp")}
    with jax.set_mesh(explicit):
        placed = place_on(explicit, x, specs)
        assert_same(
            results_and_gradients("dense_attention, window", placed, segment_ids=segment_ids),
            expected,
        )


def test_main_block_mass(x, segment_ids):
    x |= {"q": x["q"][:, 1:]}
    run = compiled(functools.partial(main_block_mass, block_size=BLOCK_SIZE, query_offset=1))
    expected = run(x["q"], x["k"], segment_ids=segment_ids)
    explicit = mesh(fsdp=1, context=2)
    specs = SPECS | {"q": SPLIT_SEQUENCE["q"]}
    with jax.set_mesh(explicit):
        placed = place_on(explicit, x, specs)
        actual = run(placed["q"], placed["k"], segment_ids=segment_ids)
    assert_close(actual, expected)
    assert actual.sharding.spec == P(BATCH_AXES, "tensor", "context", None)


@pytest.mark.parametrize("op", ["sparse_attention", "index_kl, dense"])
def test_automatic_mesh(op, x, segment_ids):
    """The compiler shards what it can; the op asks for nothing."""
    expected = results_and_gradients(op, x, segment_ids=segment_ids)
    automatic = mesh(AxisType.Auto)
    with jax.set_mesh(automatic):
        assert_same(
            results_and_gradients(op, place_on(automatic, x), segment_ids=segment_ids), expected
        )


def test_inside_a_shard_map_of_the_caller(x, segment_ids):
    def local(x, segment_ids):
        return OPS["sparse_attention"](x, {"segment_ids": segment_ids}, {})

    expected = compiled(local)(x, segment_ids)
    explicit = mesh()
    by_rows = {name: P(BATCH_AXES) for name in x}
    with jax.set_mesh(explicit):
        mapped = jax.shard_map(
            local, in_specs=(by_rows, P(BATCH_AXES)), out_specs=[P(BATCH_AXES)] * 2
        )
        placed = place_on(explicit, x, by_rows)
        split = jax.device_put(segment_ids, NamedSharding(explicit, P(BATCH_AXES)))
        assert_same(compiled(mapped)(placed, split), expected)


def test_gpu_kernels_and_their_gradients_are_traced_on_a_mesh():
    """As far as lowering to CUDA; what kernels compute is compared elsewhere."""

    def loss(x, segment_ids):
        place = {"segment_ids": segment_ids, "implementation": "mosaic_gpu"}
        selection = select_blocks(x["index_q"], x["index_k"], block_size=64, top_k=2, **place)
        o, _ = sparse_attention(x["q"], x["k"], x["v"], selection, **place)
        return o.astype(jnp.float32).sum()

    explicit = mesh()
    heads = {"q": 4, "k": 2, "v": 2, "index_q": 2}
    shapes = {name: (4, 128, number, 64) for name, number in heads.items()}
    arrays = {
        name: jax.ShapeDtypeStruct(
            shape, jnp.bfloat16, sharding=NamedSharding(explicit, SPECS[name])
        )
        for name, shape in (shapes | {"index_k": (4, 128, 64)}).items()
    }
    segment_ids = jax.ShapeDtypeStruct((4, 128), jnp.int32)
    with traced_for(Target()), jax.set_mesh(explicit):
        traced = jax.jit(jax.value_and_grad(loss)).trace(arrays, segment_ids)
        assert "mosaic_gpu" in traced.lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize("op", ["oracle", "dense_attention, window"])
def test_heads_that_the_mesh_does_not_divide(op, x):
    """Four query heads split over four devices, with two KV heads to serve them."""
    explicit = mesh(data=1, fsdp=2, tensor=4)
    specs = {name: P() for name in x} | {"q": P(None, None, "tensor", None)}
    message = r"KV heads=2 is not divisible by the 4 devices of mesh axes \('tensor',\); choose"
    with jax.set_mesh(explicit), pytest.raises(ValueError, match=message):
        OPS[op](place_on(explicit, x, specs), {}, {})
