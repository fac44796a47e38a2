"""The programs that an MSA case times: selection, main branch, both. They compile side by side."""

from collections.abc import Callable
from concurrent.futures import Executor, Future
from typing import Any

import jax
import jax.numpy as jnp

from experiments.benchmarking.cases import Case, phase
from pallas_kernels import BlockSelection, select_blocks, sparse_attention

# Compiled, by part: "selection" and "main", and "both" as one program.
Programs = dict[str, Any]


def begin_compiling(case: Case, pool: Executor) -> dict[str, dict[str, Future]]:
    """Futures of `Programs` by precision; they serve every kind of selection.

    Lowering is Python and stays in this thread, compiling goes on in the pool. What fails is the
    future's exception.

    Args:
      case: with its precisions.
      pool: of threads.
    """

    def array(*shape: int, dtype=jnp.bfloat16) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((case.batch, *shape), dtype)

    keys = array(case.length, case.num_kv_heads, case.head_dim)
    q = array(case.length, case.num_heads, case.head_dim)
    index_q = array(case.length, case.num_kv_heads, case.index_dim)
    index_k = array(case.length, case.index_dim)
    ids = array(case.num_kv_heads, case.length, case.top_k, dtype=jnp.int32)

    attend = _attend(case)
    main = begin("main", pool, attend, q, keys, keys, ids)
    begun = {}
    for precision in case.precisions:
        select = _select(case, precision)
        both = _both(attend, select)
        begun[precision] = {
            "main": main,
            "both": begin(f"both, {precision}", pool, both, q, keys, keys, index_q, index_k),
            "selection": begin(f"selection, {precision}", pool, select, index_q, index_k),
        }
    return begun


def begin(name: str, pool: Executor, function, *types: Any) -> Future:
    """Lowers a jitted function for arguments of these types here, and compiles it in the pool."""
    phase(f"lower {name}")
    try:
        return pool.submit(function.lower(*types).compile)
    except Exception as error:  # of this precision alone; jax has no class for all
        failed: Future = Future()
        failed.set_exception(error)
        return failed


# Jitted parts are traced once for all programs that hold them.


def _attend(case: Case) -> Callable:
    @jax.jit
    def attend(q, k, v, block_ids):
        selection = BlockSelection(block_ids, case.block_size)
        return sparse_attention(q, k, v, selection, implementation=case.implementation)

    return attend


def _select(case: Case, precision: str) -> Callable:
    @jax.jit
    def select(index_q, index_k):
        return select_blocks(
            index_q,
            index_k,
            block_size=case.block_size,
            top_k=case.top_k,
            index_precision=precision,
            implementation=case.implementation,
        ).block_ids

    return select


def _both(attend: Callable, select: Callable) -> Callable:
    @jax.jit
    def both(q, k, v, index_q, index_k):
        return attend(q, k, v, select(index_q, index_k))

    return both
