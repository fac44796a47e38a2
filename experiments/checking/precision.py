"""What the 8-bit index costs: selection and output against those of the native index."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from experiments.benchmarking.inputs import index_inputs, main_inputs
from experiments.checking.cases import PrecisionCase
from experiments.checking.judgement import Figure
from pallas_kernels import BlockSelection, select_blocks, sparse_attention


def check(case: PrecisionCase, implementation: str) -> dict[str, Figure]:
    """Recall of the native index's past blocks, and the relative error of the output."""
    shape = case.shape

    @functools.partial(jax.jit, static_argnums=(2,))
    def select(index_q, index_k, precision):
        return select_blocks(
            index_q,
            index_k,
            block_size=shape.block_size,
            top_k=shape.top_k,
            index_precision=precision,
            implementation=implementation,
        ).block_ids

    @jax.jit
    def attend(q, k, v, block_ids):
        selection = BlockSelection(block_ids, shape.block_size)
        return sparse_attention(q, k, v, selection, implementation=implementation)[0]

    index, arrays = index_inputs(shape, case.inputs), main_inputs(shape)
    ids = {name: select(*index, name) for name in ("native", "int8")}
    exact, rounded = (attend(*arrays, ids[name]) for name in ("native", "int8"))
    first = shape.top_k * shape.block_size
    return {
        "recall": Figure(float(recall(ids["native"], ids["int8"], first))),
        "output_change": Figure(float(_relative(rounded, exact, first))),
    }


@functools.partial(jax.jit, static_argnums=(2,))
def recall(
    ids: Int[Array, "B H T K"], others: Int[Array, "B H T K"], first: int
) -> Float[Array, ""]:
    """Share of the past blocks of `ids` that `others` has too.

    Args:
      ids: a selection of all K blocks per query, the own one the last.
      others: another.
      first: query from which on all K are there.
    """
    ids, others = ids[:, :, first:, :-1], others[:, :, first:, :-1]

    def found(column):
        return (others == ids[..., column, None]).any(-1)

    columns = jax.lax.map(
        lambda column: found(column).mean(dtype=jnp.float32), jnp.arange(ids.shape[-1])
    )
    return columns.mean()


@functools.partial(jax.jit, static_argnums=(2,))
def _relative(o: Array, expected: Array, first: int) -> Float[Array, ""]:
    o, expected = (array[:, first:].astype(jnp.float32) for array in (o, expected))
    return jnp.sqrt(jnp.square(o - expected).sum() / jnp.square(expected).sum())
