"""What the Hopper kernels share: where they may be traced, with 64-bit types on and in a mesh."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from pallas_kernels import select_blocks, sparse_attention
from pallas_kernels.mosaic_gpu import (
    REGISTERS_PER_LANE,
    Target,
    consumer_registers,
    producer_registers,
    traced_for,
)
from pallas_kernels.sparse_attention import api
from pallas_kernels.sparse_attention import mosaic_gpu as sparse_attention_mosaic_gpu

BLOCK_SIZE, TOP_K = 64, 2


def tensors(batch=1, queries=66, keys=256, seed=0):
    """q, k, v, index_q and index_k: two heads in one group, small integers."""
    random = np.random.default_rng(seed)
    shapes = ((queries, 2), (keys, 1), (keys, 1), (queries, 1), (keys,))
    for shape in shapes:
        x = random.integers(-2, 3, (batch, *shape, 64)) / 2
        yield jnp.asarray(x, jnp.bfloat16)


def places(batch=1, queries=66, keys=256, dtype=jnp.int32):
    """Documents and offsets."""
    documents = jnp.ones((batch, keys), dtype).at[:, : keys // 4].set(7)
    return documents, jnp.full((batch,), keys - queries, dtype)


def both_ops(q, k, v, index_q, index_k, segment_ids, query_offset, implementation):
    """Output of attention over the selected blocks."""
    place = {"segment_ids": segment_ids, "query_offset": query_offset}
    chosen = select_blocks(
        index_q, index_k, block_size=BLOCK_SIZE, top_k=TOP_K, implementation=implementation, **place
    )
    return sparse_attention(q, k, v, chosen, implementation=implementation, **place)[0]


def loss(*arrays, implementation="mosaic_gpu"):
    return both_ops(*arrays, implementation=implementation).astype(jnp.float32).sum()


def lowered(fn, *arrays):
    """`fn` for a GPU, as text, as far as that goes without one."""
    with traced_for(Target()):
        return jax.jit(fn).trace(*arrays).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize("dtype", ["int32", "int64"])
def test_lowers_with_64_bit_types_on(dtype, double_precision, monkeypatch):
    """All eight kernels, with gradients, and of what was traced before it is differentiated.

    The interpreter could not run them: it traces parts of a kernel late, with 64 bits on.
    """
    on_hopper = sparse_attention_mosaic_gpu
    config = on_hopper.SparseAttentionConfig()
    by_kernels = functools.partial(on_hopper.sparse_attention, config=config)
    monkeypatch.setitem(api.IMPLEMENTATIONS, "mosaic_gpu", by_kernels)
    documents_and_offsets = places(dtype=dtype)
    assert {array.dtype.name for array in documents_and_offsets} == {dtype}
    with_gradients = jax.value_and_grad(jax.jit(loss), argnums=(0, 1, 2))
    text = lowered(with_gradients, *tensors(), *documents_and_offsets)
    assert text.count("kernel_hash") == 8


@pytest.mark.parametrize("axis_type", [AxisType.Explicit, AxisType.Auto])
def test_a_callers_shard_map_must_not_check_what_varies(axis_type):
    """It is refused with the mend, a default call takes the reference, and the mend works."""
    mesh = jax.make_mesh((4,), ("data",), axis_types=(axis_type,))
    with jax.set_mesh(mesh):
        arrays = jax.device_put((*tensors(4), *places(4)), jax.P("data"))

        def gradients(check_vma, implementation):
            run = functools.partial(both_ops, implementation=implementation)
            mapped = jax.shard_map(
                run, in_specs=P("data"), out_specs=P("data"), check_vma=check_vma
            )
            return jax.grad(lambda *x: mapped(*x).astype(jnp.float32).sum(), argnums=(0, 1, 2))

        with pytest.raises(NotImplementedError, match=r"\(here data\); pass check_vma=False"):
            lowered(gradients(True, "mosaic_gpu"), *arrays)
        assert "mosaic_gpu" not in lowered(gradients(True, None), *arrays)
        assert "mosaic_gpu" in lowered(gradients(False, "mosaic_gpu"), *arrays)


def test_what_does_not_vary_runs_in_a_shard_map():
    """Every device does the same on whole arrays, and the result is known to be the same."""
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
    run = functools.partial(both_ops, implementation="mosaic_gpu")
    with jax.set_mesh(mesh):
        mapped = jax.shard_map(run, in_specs=P(), out_specs=P())
        assert "mosaic_gpu" in lowered(mapped, *tensors(), *places())


@pytest.mark.parametrize("num_consumers", [1, 2, 3])
def test_roles_share_the_registers_of_a_core(num_consumers):
    used = num_consumers * consumer_registers(num_consumers) + producer_registers(num_consumers)
    assert 0 < used <= REGISTERS_PER_LANE
    assert consumer_registers(num_consumers) % 8 == 0
