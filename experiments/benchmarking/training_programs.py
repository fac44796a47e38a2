"""The programs that a training case times: one layer's parts, and all of it as one program."""

from collections.abc import Callable
from concurrent.futures import Executor, Future
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from experiments.benchmarking.cases import Case, phase
from experiments.benchmarking.programs import begin
from pallas_kernels import BlockSelection, index_kl, select_blocks, sparse_attention


class LayerGradients(NamedTuple):
    """Of sum(o * do) + the mean KL, by each input."""

    q: Array
    k: Array
    v: Array
    index_q: Array
    index_k: Array


class TrainedLayer(NamedTuple):
    """What one layer's training step computes.

    Attributes:
      o: output of the main branch.
      kl: per query and group, [B, Hkv, T].
      gradients: of all five inputs.
      block_ids: the selection, [B, Hkv, T, K].
      lse: main log-sum-exp, [B, Hq, T].
      index_lse: student's log-sum-exp, [B, Hkv, T].
    """

    o: Array
    kl: Array
    gradients: LayerGradients
    block_ids: Array
    lse: Array
    index_lse: Array


def begin_compiling(case: Case, pool: Executor) -> dict[str, dict[str, Future]]:
    """Futures of the compiled parts by precision; they serve every kind of selection.

    "training" takes (q, k, v, index_q, index_k, do) and returns a `TrainedLayer`; "selection" takes
    the index inputs; "main" (q, k, v, ids) and returns output, log-sum-exp and pullback; "backward"
    takes (pullback, do); "kl" takes (q, k, index_q, index_k, ids, lse) and returns the mean
    divergence and the two gradients.
    """

    def array(*shape: int, dtype=jnp.bfloat16) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((case.batch, *shape), dtype)

    keys = array(case.length, case.num_kv_heads, case.head_dim)
    q = do = array(case.length, case.num_heads, case.head_dim)
    index = (
        array(case.length, case.num_kv_heads, case.index_dim),
        array(case.length, case.index_dim),
    )
    ids = array(case.num_kv_heads, case.length, case.top_k, dtype=jnp.int32)
    lse = array(case.num_heads, case.length, dtype=jnp.float32)

    main = jax.jit(_main(case))
    pullback = main.trace(q, keys, keys, ids).out_info[2]
    shared = {
        "main": begin("main", pool, main, q, keys, keys, ids),
        "backward": begin("backward", pool, jax.jit(lambda p, do: p(do)), pullback, do),
        "kl": begin("kl", pool, jax.jit(_kl(case)), q, keys, *index, ids, lse),
    }
    begun = {}
    for precision in case.precisions:
        select, train = jax.jit(_select(case, precision)), jax.jit(_train(case, precision))
        begun[precision] = shared | {
            "selection": begin(f"selection, {precision}", pool, select, *index),
            "training": begin(f"training, {precision}", pool, train, q, keys, keys, *index, do),
        }
    return begun


def _select(case: Case, precision: str) -> Callable:
    def select(index_q, index_k):
        return select_blocks(
            index_q,
            index_k,
            block_size=case.block_size,
            top_k=case.top_k,
            index_precision=precision,
            implementation=case.implementation or None,
        ).block_ids

    return select


def _attend(case: Case) -> Callable:
    def attend(q, k, v, block_ids):
        selection = BlockSelection(block_ids, case.block_size)
        return sparse_attention(q, k, v, selection, implementation=case.implementation or None)

    return attend


def _diverge(case: Case) -> Callable:
    options: dict[str, Any] = {"implementation": case.implementation or None}

    def diverge(q, k, index_q, index_k, block_ids, lse):
        selection = BlockSelection(block_ids, case.block_size)
        lse = jax.lax.stop_gradient(lse)
        return index_kl(q, k, index_q, index_k, selection, main_lse=lse, **options)

    return diverge


def _main(case: Case) -> Callable:
    attend = _attend(case)

    def main(q, k, v, block_ids):
        o, pullback, lse = jax.vjp(lambda *qkv: attend(*qkv, block_ids), q, k, v, has_aux=True)
        return o, lse, pullback

    return main


def _kl(case: Case) -> Callable:
    diverge = _diverge(case)

    def kl(q, k, index_q, index_k, block_ids, lse):
        def mean(index_q, index_k):
            return diverge(q, k, index_q, index_k, block_ids, lse).loss

        return jax.value_and_grad(mean, argnums=(0, 1))(index_q, index_k)

    return kl


def _train(case: Case, precision: str) -> Callable:
    select, attend, diverge = _select(case, precision), _attend(case), _diverge(case)

    def train(q, k, v, index_q, index_k, do):
        def layer(q, k, v, index_q, index_k):
            block_ids = select(index_q, index_k)
            o, lse = attend(q, k, v, block_ids)
            loss, kl, index_lse = diverge(q, k, index_q, index_k, block_ids, lse)
            return (o, loss), (kl, block_ids, lse, index_lse)

        (o, loss), pullback, (kl, *rest) = jax.vjp(layer, q, k, v, index_q, index_k, has_aux=True)
        gradients = LayerGradients(*pullback((do, jnp.ones_like(loss))))
        return TrainedLayer(o, kl, gradients, *rest)

    return train


def digest(layer: TrainedLayer, digest_of: Callable[[Array], Array]) -> list[int]:
    """A hash of every bit of the output and the gradients."""
    phase("digest")
    arrays = [layer.o, *layer.gradients]
    return [int(digest_of(a if a.ndim == 4 else a[:, :, None])) for a in arrays]
