"""Queries, keys and values to time, and index inputs whose selections overlap as said.

What neighbouring queries select decides how often a key block is read again, so the kinds bracket
it: "random" index inputs share next to nothing, "identical" ones share everything inside a block of
queries, "correlated" ones have the overlap reported of a trained model, and "captured" ones are a
trained model's own (`python -m experiments.capture_inputs`).
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from experiments.benchmarking.cases import Case
from experiments.benchmarking.correlated import pace_of_reported_overlap, walks

_CHUNK = 8192


class MainInputs(NamedTuple):
    """Main queries [B, T, Hq, D], keys and values [B, T, Hkv, D]."""

    q: Array
    k: Array
    v: Array


class IndexInputs(NamedTuple):
    """Index queries [B, T, Hkv, Di] and index keys [B, T, Di]."""

    index_q: Array
    index_k: Array


def main_inputs(case: Case, dtype: jax.typing.DTypeLike = jnp.bfloat16) -> MainInputs:
    """Standard normal queries, keys and values."""
    keys = jax.random.split(jax.random.key(case.seed), 3)
    heads = (case.num_heads, case.num_kv_heads, case.num_kv_heads)
    return MainInputs(
        *(
            _normal(key, case, (number, case.head_dim), dtype)
            for key, number in zip(keys, heads, strict=True)
        )
    )


def output_cotangent(case: Case, dtype: jax.typing.DTypeLike = jnp.bfloat16) -> Array:
    """A standard normal gradient of the output, [B, T, Hq, D]."""
    key = jax.random.key(case.seed + 2)
    return _normal(key, case, (case.num_heads, case.head_dim), dtype)


def index_inputs(
    case: Case, selection: str, dtype: jax.typing.DTypeLike = jnp.bfloat16
) -> IndexInputs:
    """Index inputs of one kind.

    Raises:
      ValueError: "captured" without a file, or with a file of other shapes.
    """
    if selection == "captured":
        return _captured(case, dtype)
    key_q, key_k = jax.random.split(jax.random.key(case.seed + 1))
    heads = (case.num_kv_heads, case.index_dim)
    index_k = _normal(key_k, case, (case.index_dim,), dtype)
    if selection == "identical":
        blocks = -(-case.length // case.block_size)
        rows = jax.random.normal(key_q, (case.batch, blocks, *heads), dtype)
        return IndexInputs(jnp.repeat(rows, case.block_size, 1)[:, : case.length], index_k)
    if selection == "random":
        return IndexInputs(_normal(key_q, case, heads, dtype), index_k)
    assert selection == "correlated", selection
    pace = pace_of_reported_overlap(key_q, index_k[0], case)
    shape = (case.batch, case.length, *heads)
    return IndexInputs(walks(key_q, pace, shape=shape, chunk=_chunk(case), dtype=dtype), index_k)


def mean_union(block_ids: Int[Array | np.ndarray, "B H T K"], neighbours: int, first: int) -> float:
    """Mean number of distinct blocks that `neighbours` queries select.

    Args:
      block_ids: a selection, -1 where empty.
      neighbours: queries of a window; windows start at multiples of it.
      first: the first query counted, so that those with fewer than K visible blocks stay out.
    """
    windows = np.arange(-(-first // neighbours), block_ids.shape[2] // neighbours)
    if len(windows) == 0:
        return float("nan")
    windows = windows[:: max(1, len(windows) // 1024)]
    rows = windows[:, None] * neighbours + np.arange(neighbours)
    ids = np.asarray(block_ids[:, :, rows])  # [B, H, windows, neighbours, K]
    ids = np.sort(ids.reshape(*ids.shape[:3], -1))
    fresh = np.concatenate([np.ones_like(ids[..., :1], bool), np.diff(ids) > 0], -1)
    return float((fresh & (ids >= 0)).sum(-1).mean())


def _normal(key, case: Case, inner: tuple[int, ...], dtype) -> Array:
    """Standard normal [B, T, *inner]."""
    shape = (case.batch, case.length, *inner)
    return _draw(key, shape=shape, chunk=_chunk(case), dtype=dtype)


@functools.partial(jax.jit, static_argnames=("shape", "chunk", "dtype"))
def _draw(key, *, shape: tuple[int, ...], chunk: int, dtype) -> Array:
    """Draws `chunk` tokens at a time, so that no float32 copy of the whole is made."""
    keys = jax.random.split(key, shape[0] * shape[1] // chunk)
    drawn = jax.lax.map(lambda key: jax.random.normal(key, (chunk, *shape[2:]), dtype), keys)
    return drawn.reshape(shape)


def _chunk(case: Case) -> int:
    """Tokens drawn at once, a divisor of all."""
    tokens = case.batch * case.length
    return next(size for size in range(min(_CHUNK, tokens), 0, -1) if tokens % size == 0)


def _captured(case: Case, dtype) -> IndexInputs:
    if not case.inputs:
        raise ValueError("--selection=captured needs --inputs: an npz file of a trained model")
    with np.load(case.inputs) as file:
        arrays = {name: file[name] for name in ("index_q", "index_k")}
    expected = {"index_q": (case.num_kv_heads, case.index_dim), "index_k": (case.index_dim,)}
    for name, inner in expected.items():
        if arrays[name].shape[1:] != inner:
            raise ValueError(
                f"{case.inputs}: {name} is [tokens, {arrays[name].shape[1:]}], the case has "
                f"{inner}; set --kv_heads and --index_dim to the model's"
            )
    tokens = np.arange(case.length) % len(arrays["index_k"])
    tiled = (jnp.asarray(arrays[name][tokens], dtype) for name in ("index_q", "index_k"))
    return IndexInputs(*(jnp.repeat(array[None], case.batch, 0) for array in tiled))
