"""Every op in its `shard_map` on TPUs: kernels interpreted, default calls compiled for slices.

Batch rows, heads and queries are split.
"""

import contextlib
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from op_cases import compiled
from tpu_cases import changed, interpreted
from triton_cases import assert_close

from experiments.compiling.hlo import plain_name, read_hlo
from pallas_kernels import (
    dense_attention,
    index_kl,
    main_block_mass,
    select_blocks,
    select_pattern,
    sparse_attention,
)
from pallas_kernels.ahead_of_time_tpu import tpu_devices
from pallas_kernels.mosaic_tpu import CHIPS, Target, traced_for
from pallas_kernels.tuning import trying

# Topology, and its devices along data, tensor and context.
SLICES = {"v5p": ("v5p:2x2x2", (2, 2, 2)), "v6e": ("v6e:2x2", (1, 2, 2))}
BATCH, LENGTH, NUM_HEADS, NUM_KV_HEADS, DIM = 2, 512, 8, 2, 128
BLOCKS = {"block_size": 128, "top_k": 2}
MESH_AXES = ("data", "tensor", "context")
SPLIT, INDEX_KEYS = P("data", "context", "tensor", None), P("data", "context", None)
NUM_PAGES = 16

# Ten queries per device, in slots of their row; the last block is ragged.
CASE = changed(groups=2, batch=2, query_offset=(100, 37))
# The least code: the time of this test is its compilation.
TILES = {
    "select_blocks.mosaic_tpu": {"rows": 128, "products": 1, "slots": 2, "unroll": 1},
    "sparse_attention.tpu_forward": {"queries": 8, "blocks_per_step": 1, "blocks_per_part": 1},
    "sparse_attention.tpu_backward": {
        "blocks_per_step": 1,
        "blocks_per_part": 1,
        "tiles_per_step": 1,
        "tiles_per_part": 1,
    },
    "index_kl.tpu": {
        "queries": 8,
        "blocks_per_step": 2,
        "blocks_per_part": 2,
        "tiles_per_step": 1,
        "tiles_per_part": 1,
        "depth": 2,
    },
}


@functools.partial(compiled, static_argnums=1)
def results_and_gradients(x, implementation):
    """What a layer's ops return, and the gradients of sums of it."""
    kernel = {"implementation": implementation} | CASE.place()

    def loss(x):
        index, main = (x["index_q"], x["index_k"]), (x["q"], x["k"], x["v"])
        blocks = {"block_size": CASE.block_size, "top_k": CASE.top_k}
        selection = select_blocks(*index, **blocks, **kernel)
        o, lse = sparse_attention(*main, selection, **kernel)
        known = jax.lax.stop_gradient(lse)
        rng = np.random.default_rng(0)
        shape = lse.shape[0], CASE.groups, lse.shape[2]
        alignment = index_kl(
            *main[:2],
            *index,
            selection,
            main_lse=known,
            weights=jnp.asarray(rng.normal(size=shape), jnp.float32),
            **kernel,
        )
        attended = sum((r * rng.normal(size=r.shape)).sum() for r in (o, lse))
        results = o, lse, *alignment[1:]
        return attended + alignment.loss, (selection, results)

    gradients, (selection, results) = jax.grad(loss, has_aux=True)(x)
    return {"block_ids": selection.block_ids, "results": results, "gradients": gradients}


def test_kernels_on_a_mesh():
    """Of eight fake CPU devices give what the references give on one."""
    names = ("q", "k", "v", "index_q", "index_k")
    x = dict(zip(names, CASE.main_inputs() + CASE.index_inputs(), strict=True))
    mesh = jax.make_mesh((2, 2, 2), MESH_AXES, axis_types=(AxisType.Explicit,) * 3)
    specs = dict.fromkeys(names, SPLIT) | {"index_k": INDEX_KEYS}
    expected = results_and_gradients(x, "reference")
    with contextlib.ExitStack() as stack:
        stack.enter_context(interpreted())
        for kernel, tiles in TILES.items():
            stack.enter_context(trying(kernel, tiles))
        stack.enter_context(jax.set_mesh(mesh))
        actual = results_and_gradients(
            {name: jax.device_put(x[name], NamedSharding(mesh, specs[name])) for name in names},
            "mosaic_tpu",
        )
    np.testing.assert_array_equal(actual.pop("block_ids"), expected.pop("block_ids"))
    actual = jax.tree.leaves_with_path(actual)
    for (path, a), e in zip(actual, jax.tree.leaves(expected), strict=True):
        assert len(a.addressable_shards) == 8, path
        assert np.abs(e).max() > 0.01, path
        assert_close(a, e, "float32")


@pytest.fixture(scope="module", params=SLICES)
def compiled_on_a_slice(request):
    """Compiles `fn` of (shape, spec, dtype) arrays for the slice."""
    topology, sizes = SLICES[request.param]
    devices = np.array(tpu_devices(topology)).reshape(sizes)
    mesh = Mesh(devices, MESH_AXES, axis_types=(AxisType.Explicit,) * 3)

    def compile_on_it(fn, arrays):
        arguments = {
            name: jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))
            for name, (shape, spec, dtype) in arrays.items()
        }
        with jax.set_mesh(mesh), traced_for(Target(CHIPS[request.param])):
            return jax.jit(fn).lower(arguments).compile(), mesh

    return compile_on_it


def layer(num_queries=LENGTH):
    """The bfloat16 arrays of an MSA layer, as the training step places them."""
    heads = {"q": NUM_HEADS, "k": NUM_KV_HEADS, "v": NUM_KV_HEADS, "index_q": NUM_KV_HEADS}
    lengths = {"q": num_queries, "index_q": num_queries, "k": LENGTH, "v": LENGTH}
    arrays = {
        name: ((BATCH, lengths[name], number, DIM), SPLIT, jnp.bfloat16)
        for name, number in heads.items()
    }
    segments = {"segment_ids": ((BATCH, LENGTH), P("data", "context"), jnp.int32)}
    return arrays | segments | {"index_k": ((BATCH, LENGTH, DIM), INDEX_KEYS, jnp.bfloat16)}


def kernels_in(compiled):
    """Names of the kernels that a compiled program calls."""
    return {plain_name(instruction) for instruction in read_hlo(compiled.as_text()).kernels}


def test_training_ops_and_their_gradients(compiled_on_a_slice):
    arrays = layer()
    segments = {"segment_ids": arrays.pop("segment_ids")}

    def loss(x, segment_ids):
        place = {"segment_ids": segment_ids}
        index = x["index_q"], x["index_k"]
        selection = select_blocks(*index, **BLOCKS, **place)
        o, lse = sparse_attention(x["q"], x["k"], x["v"], selection, **place)
        dense = dense_attention(x["q"], x["k"], x["v"], **place)
        known = {"main_lse": jax.lax.stop_gradient(lse)}
        alignment = index_kl(x["q"], x["k"], *index, selection, **known, **place)
        return (o + dense).astype(jnp.float32).sum() + alignment.loss

    def step(x):
        segment_ids = x.pop("segment_ids")
        return jax.value_and_grad(loss)(x, segment_ids)

    compiled, mesh = compiled_on_a_slice(step, arrays | segments)
    assert kernels_in(compiled) == {
        "select_blocks",
        "sparse_attention_forward",
        "sparse_attention_query_gradient",
        "sparse_attention_key_value_gradient",
        "index_kl_divergence",
        "index_kl_index_q_gradient",
        "index_kl_index_k_gradient",
    }
    _, gradients = compiled.output_shardings
    assert {name: sharding.spec for name, sharding in gradients.items()} == {
        name: spec for name, (_, spec, _) in arrays.items()
    }
    # A device is given its share and no more.
    shares = [
        math.prod(NamedSharding(mesh, spec).shard_shape(shape)) * jnp.dtype(dtype).itemsize
        for shape, spec, dtype in (arrays | segments).values()
    ]
    assert compiled.memory_analysis().argument_size_in_bytes == pytest.approx(sum(shares), rel=0.01)


def test_ops_that_measure_selection(compiled_on_a_slice):
    def run(x):
        place = {"segment_ids": x["segment_ids"]}
        oracle = select_pattern("oracle", x["q"], x["k"], **BLOCKS, **place)
        return oracle.block_ids, main_block_mass(x["q"], x["k"], block_size=128, **place)

    compiled, _ = compiled_on_a_slice(run, layer())
    expected = P("data", "tensor", "context", None)
    assert {sharding.spec for sharding in compiled.output_shardings} == {expected}


def test_decoding_from_pages(compiled_on_a_slice):
    """Eight new tokens per row, four on each device; pages of a device's heads, for all rows."""
    arrays = {name: array for name, array in layer(8).items() if name in ("q", "index_q")} | {
        "k": ((NUM_PAGES, NUM_KV_HEADS, 128, DIM), P(None, "tensor", None, None), jnp.bfloat16),
        "v": ((NUM_PAGES, NUM_KV_HEADS, 128, DIM), P(None, "tensor", None, None), jnp.bfloat16),
        "index_k": ((NUM_PAGES, 128, DIM), P(), jnp.bfloat16),
        "page_table": ((BATCH, 8), P("data", None), jnp.int32),
        "query_offset": ((BATCH,), P("data"), jnp.int32),
    }

    def run(x):
        place = {name: x[name] for name in ("page_table", "query_offset")}
        selection = select_blocks(x["index_q"], x["index_k"], **BLOCKS, **place)
        return sparse_attention(x["q"], x["k"], x["v"], selection, **place)

    compiled, _ = compiled_on_a_slice(run, arrays)
    assert kernels_in(compiled) == {"select_blocks", "sparse_attention_forward"}
    output, lse = (sharding.spec for sharding in compiled.output_shardings)
    assert (output, lse) == (SPLIT, P("data", "tensor", "context"))
