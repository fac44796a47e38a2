"""What the tests of the Mosaic TPU kernels share: small calls, and targets to trace them for."""

import contextlib
import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu
from triton_cases import Case

from pallas_kernels.mosaic_tpu import CHIPS, Target, traced_for
from pallas_kernels.sparse_attention.reverse_tiles import reverse_tiles
from pallas_kernels.sparse_attention.tile_lists import tile_lists

# One core, and two cores that share a device.
ONE_CORE, TWO_CORES = CHIPS["v6e"], CHIPS["v5p"]

# 150 keys in blocks of 64: the last block is ragged.
SMALL = Case(
    num_queries=20, num_keys=150, query_offset=100, head_dim=64, index_dim=64, block_size=64
)


def changed(**changes) -> Case:
    return dataclasses.replace(SMALL, **changes)


CASES = {
    "one head per group, from the first query": changed(
        per_group=1, query_offset=0, num_queries=70, num_keys=70
    ),
    "groups of 3, an offset per batch row": changed(
        per_group=3, groups=2, batch=2, num_queries=9, query_offset=(4, 130)
    ),
    "groups of 16, dims and blocks of 128": changed(
        per_group=16, num_queries=10, num_keys=300, query_offset=250, head_dim=128, block_size=128
    ),
    "documents with padding behind them": changed(
        num_queries=150, query_offset=0, documents=((0, 60), (64, 100), (128, 145)), top_k=3
    ),
    "decoding": changed(per_group=4, groups=2, batch=2, num_queries=1, query_offset=(149, 70)),
    "16 blocks per query": changed(
        per_group=4, num_queries=9, num_keys=1100, query_offset=1091, top_k=16
    ),
    "bfloat16": changed(per_group=4, dtype="bfloat16", top_k=3),
}


def interpreted(chip=TWO_CORES):
    """By plain XLA: quick, and without memories or races."""
    return traced_for(Target(chip, interpret=True))


@contextlib.contextmanager
def interpreted_strictly(chip=ONE_CORE):
    """With memories that hold NaN until they are written; a race fails the test."""
    parameters = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")
    with traced_for(Target(chip, interpret=parameters)):
        yield
    races = interpret_pallas_call.races
    assert races is not None
    assert not races.races_found


def without_sorts(monkeypatch, *modules):
    """Gives the kernels of modules lists of the right size in place of sorted ones.

    XLA's sorts take longer to compile than the kernels. Whole steps are compiled with them.
    """

    def instead_of(build):
        def lists(*args, **sizes):
            shapes = jax.eval_shape(functools.partial(build, **sizes), *args)
            return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

        return lists

    for module in modules:
        for build in (tile_lists, reverse_tiles):
            if hasattr(module, build.__name__):
                monkeypatch.setattr(module, build.__name__, instead_of(build))
