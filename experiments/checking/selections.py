"""Selections to attend over: learned ones, and those that a kernel may stumble over."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from experiments.benchmarking.cases import Case as Shape
from experiments.benchmarking.inputs import index_inputs
from experiments.checking.cases import Place
from pallas_kernels import select_blocks

type Slots = Int[Array, "B T"]


def segment_ids(shape: Shape, place: Place) -> Int[Array, "B S"] | None:
    """Documents on multiples of the block size, with padding behind them; other ones per row."""
    if not place.packed:
        return None
    ids = np.zeros((shape.batch, shape.length), np.int32)
    blocks = shape.length // shape.block_size
    for row in range(shape.batch):
        starts = [0, blocks * (3 + row) // 10, blocks * (6 + row) // 10, blocks]
        for i in range(3):
            start, stop = (edge * shape.block_size for edge in starts[i : i + 2])
            ids[row, start : stop - shape.block_size // 2 * i] = i + 1
    return jnp.asarray(ids)


def query_slots(shape: Shape, place: Place) -> Slots:
    """The key slot of each query."""
    offset = jnp.broadcast_to(jnp.asarray(place.query_offset, jnp.int32), (shape.batch,))
    return offset[:, None] + jnp.arange(place.num_queries or shape.length, dtype=jnp.int32)


def first_blocks(
    shape: Shape, place: Place, slots: Int[np.ndarray, "B T"]
) -> Int[np.ndarray, "B T"]:
    """The first block of each query's document; past all blocks for padding."""
    segments = segment_ids(shape, place)
    if segments is None:
        return np.zeros_like(slots)
    blocks = np.full(segments.shape, shape.length, np.int32)
    for row, ids in enumerate(np.asarray(segments)):
        for document in np.unique(ids[ids > 0]):
            blocks[row, ids == document] = np.argmax(ids == document) // shape.block_size
    return np.take_along_axis(blocks, slots, axis=1)


def select(kind: str, shape: Shape, place: Place, implementation: str) -> Int[Array, "B Hkv T K"]:
    """Block ids of one of `SELECTIONS`, or "learned": by `select_blocks` on correlated inputs.

    Apart from the learned ones they ignore documents: a query must not see blocks of another.
    """
    slots = query_slots(shape, place)
    if kind == "learned":
        index_q, index_k = index_inputs(shape, "correlated")
        if place.num_queries:
            index_q = jnp.take_along_axis(index_q, slots[:, :, None, None], axis=1)
        learned = functools.partial(
            select_blocks,
            block_size=shape.block_size,
            top_k=shape.top_k,
            segment_ids=segment_ids(shape, place),
            query_offset=query_offset(place),
            implementation=implementation,
        )
        return jax.jit(lambda *index: learned(*index).block_ids)(index_q, index_k)
    key, own = jax.random.key(shape.seed + 2), slots // shape.block_size
    return _made(key, own, kind, dataclasses.replace(shape, seed=0))


@functools.partial(jax.jit, static_argnames=("kind", "shape"))
def _made(key, own: Slots, kind: str, shape: Shape) -> Array:
    return SELECTIONS[kind](key, own, shape)


def query_offset(place: Place) -> int | Int[Array, "B"]:
    """As the ops take it: a number for all rows, or an array."""
    if isinstance(place.query_offset, int):
        return place.query_offset
    return jnp.asarray(place.query_offset, jnp.int32)


def _random(key, own: Slots, shape: Shape) -> Array:
    """Random past blocks and the query's own one, up to K of them."""
    size = (shape.batch, shape.num_kv_heads, own.shape[1], shape.top_k - 1)
    own = own[:, None, :, None]
    past = jax.random.randint(key, size, 0, jnp.maximum(own, 1))
    own = jnp.broadcast_to(own, (*size[:3], 1))
    return _ascending(jnp.concatenate([past, own], -1))


def _one_block(key, own: Slots, shape: Shape) -> Array:
    """Block 0 for all queries: its list is as long as it can be, all others are empty."""
    ids = jnp.full((shape.batch, shape.num_kv_heads, own.shape[1], shape.top_k), -1, jnp.int32)
    return ids.at[..., 0].set(0)


def _no_overlap(key, own: Slots, shape: Shape) -> Array:
    """Neighbours take turns over the past blocks, and leave their own one out."""
    turns = jnp.arange(own.shape[1])[:, None] * shape.top_k + jnp.arange(shape.top_k)
    groups = jnp.arange(shape.num_kv_heads)[:, None, None]
    ids = (turns + groups) % jnp.maximum(own, 1)[:, None, :, None]
    return _ascending(ids.astype(jnp.int32))


def _strewn(key, own: Slots, shape: Shape) -> Array:
    """Random blocks with -1 among them, and a tail of blocks that are not there to be seen."""
    keys = jax.random.split(key)
    ids = _random(keys[0], own, shape)
    ids = jnp.where(jax.random.bernoulli(keys[1], 0.3, ids.shape), -1, ids)
    blocks = -(-shape.length // shape.block_size)
    ahead = own[:, None, :, None] + 1 + jnp.arange(3)
    beyond = jnp.where(jnp.arange(own.shape[1])[:, None] % 2 == 0, ahead, blocks + jnp.arange(3))
    count = min(3, shape.top_k - 1)
    beyond = jnp.broadcast_to(beyond, (*ids.shape[:3], 3))[..., :count].astype(jnp.int32)
    return jnp.concatenate([ids[..., : shape.top_k - count], beyond], -1)


def _masked(key, own: Slots, shape: Shape) -> Array:
    """Queries that select nothing: every third one, the first hundred, all of the last group."""
    ids = _random(key, own, shape)
    query = jnp.arange(own.shape[1])[:, None]
    group = jnp.arange(shape.num_kv_heads)[:, None, None]
    nothing = (query % 3 == 0) | (query < 100) | (group == shape.num_kv_heads - 1)
    return jnp.where(nothing, -1, ids)


def _ascending(ids: Array) -> Array:
    """Each id once, ascending, then -1."""
    absent = jnp.iinfo(jnp.int32).max
    ids = jnp.sort(ids, -1)
    repeated = jnp.pad(ids[..., 1:] == ids[..., :-1], ((0, 0), (0, 0), (0, 0), (1, 0)))
    ids = jnp.sort(jnp.where(repeated, absent, ids), -1)
    return jnp.where(ids == absent, -1, ids)


SELECTIONS: dict[str, Callable[..., Array]] = {
    "random": _random,
    "one_block": _one_block,
    "no_overlap": _no_overlap,
    "strewn": _strewn,
    "masked": _masked,
}
