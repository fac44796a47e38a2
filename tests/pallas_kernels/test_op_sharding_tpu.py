"""Every op in its `shard_map` on TPUs: kernels interpreted, default calls compiled for slices.

Batch rows, heads and queries are split.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from op_cases import compiled
from tpu_cases import case, interpreted
from triton_cases import assert_close

from pallas_kernels import (
    dense_attention,
    index_kl,
    main_block_mass,
    select_blocks,
    select_pattern,
    sparse_attention,
)
from pallas_kernels.ahead_of_time_tpu import tpu_devices
from pallas_kernels.index_kl.api import IMPLEMENTATIONS as INDEX_KL
from pallas_kernels.mosaic_tpu import CHIPS, Target, traced_for
from pallas_kernels.select_blocks.api import IMPLEMENTATIONS as SELECT_BLOCKS
from pallas_kernels.sparse_attention.api import IMPLEMENTATIONS as SPARSE_ATTENTION

# Topology, and its devices along data, tensor and context.
SLICES = {"v5p": ("v5p:2x2x2", (2, 2, 2)), "v6e": ("v6e:2x2", (1, 2, 2))}
BATCH, LENGTH, NUM_HEADS, NUM_KV_HEADS, DIM = 2, 512, 8, 2, 128
BLOCKS = {"block_size": 128, "top_k": 2}
MESH_AXES = ("data", "tensor", "context")
SPLIT, INDEX_KEYS = P("data", "context", "tensor", None), P("data", "context", None)
NUM_PAGES = 16

# Ten queries per device, in slots of their row; the last block is ragged.
CASE = case(groups=2, batch=2, num_queries=20, query_offset=(100, 37))
ON_TPU = {"implementation": "mosaic_tpu"}
IMPLEMENTATIONS = {
    "select_blocks": SELECT_BLOCKS,
    "sparse_attention": SPARSE_ATTENTION,
    "index_kl": INDEX_KL,
}


def run_kernel(op, x, kernel):
    """One op by `kernel`, on what the references of the ops before it return."""
    place, reference = CASE.place(), {"implementation": "reference"}
    blocks = {"block_size": CASE.block_size, "top_k": CASE.top_k}
    index, main = (x["index_q"], x["index_k"]), (x["q"], x["k"], x["v"])
    if op == "select_blocks":
        return select_blocks(*index, **blocks, **place, **kernel).block_ids
    selection = select_blocks(*index, **blocks, **place, **reference)
    if op == "sparse_attention":
        return sparse_attention(*main, selection, **place, **kernel)
    _, lse = sparse_attention(*main, selection, **place, **reference)
    lse = jax.lax.stop_gradient(lse)
    return index_kl(*main[:2], *index, selection, main_lse=lse, **place, **kernel)


def results_and_gradients(op, x):
    def loss(x):
        results = run_kernel(op, x, ON_TPU)
        if op == "select_blocks":
            return 0.0, results
        rng = np.random.default_rng(0)
        return sum((r * rng.normal(size=r.shape)).sum() for r in results), results

    gradients, results = compiled(jax.grad(loss, has_aux=True))(x)
    return jax.tree.leaves(results) + jax.tree.leaves(gradients)


@pytest.mark.parametrize(
    "op", [op for op, known in IMPLEMENTATIONS.items() if "mosaic_tpu" in known]
)
def test_kernels_on_a_mesh(op):
    """Eight fake CPU devices give what one gives, by the same kernels."""
    names = ("q", "k", "v", "index_q", "index_k")
    x = dict(zip(names, CASE.main_inputs() + CASE.index_inputs(), strict=True))
    mesh = jax.make_mesh((2, 2, 2), MESH_AXES, axis_types=(AxisType.Explicit,) * 3)
    specs = dict.fromkeys(names, SPLIT) | {"index_k": INDEX_KEYS}
    with interpreted():
        expected = results_and_gradients(op, x)
        with jax.set_mesh(mesh):
            placed = {
                name: jax.device_put(array, NamedSharding(mesh, specs[name]))
                for name, array in x.items()
            }
            actual = results_and_gradients(op, placed)
    assert {len(array.addressable_shards) for array in actual} == {8}
    for a, e in zip(actual, expected, strict=True):
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


def test_training_ops_and_their_gradients(compiled_on_a_slice):
    arrays = layer()
    segments = {"segment_ids": arrays.pop("segment_ids")}

    def loss(x, segment_ids):
        place = {"segment_ids": segment_ids}
        index = x["index_q"], x["index_k"]
        selection = select_blocks(*index, **BLOCKS, **place)
        o, lse = sparse_attention(x["q"], x["k"], x["v"], selection, **place)
        dense = dense_attention(x["q"], x["k"], x["v"], **place)
        kl, _ = index_kl(
            x["q"], x["k"], *index, selection, main_lse=jax.lax.stop_gradient(lse), **place
        )
        return (o + dense).astype(jnp.float32).sum() + kl.sum()

    def step(x):
        segment_ids = x.pop("segment_ids")
        return jax.value_and_grad(loss)(x, segment_ids)

    compiled, mesh = compiled_on_a_slice(step, arrays | segments)
    assert "sparse_attention_forward" in compiled.as_text()
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
    output, lse = (sharding.spec for sharding in compiled.output_shardings)
    assert (output, lse) == (SPLIT, P("data", "tensor", "context"))
