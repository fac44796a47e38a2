"""Fills the device's free memory with NaN, so that what a kernel forgets to write shows.

The pattern is NaN in bfloat16, float16 and float32, and no block's id in int32.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

_PATTERN = 0x7FC07FC0
_LADDER = tuple(2**exponent for exponent in range(10, 29, 3))


def poisoned(call: Callable[..., Any], *arguments: Any) -> Callable[[], Any]:
    """Compiles a jitted call, once per shapes; what is returned poisons memory and runs it.

    Args:
      call: a jitted function.
      *arguments: arrays or None.
    """
    types = jax.tree.map(lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype), arguments)
    compiled = _compiled(call, *types)
    analysis = compiled.memory_analysis()

    def run():
        poison(analysis.output_size_in_bytes + analysis.temp_size_in_bytes)
        return compiled(*arguments)

    return run


@functools.cache
def _compiled(call, *types):
    return call.lower(*types).compile()


def poison(num_bytes: int) -> None:
    """Leaves the pattern in memory that the next allocations of up to `num_bytes` come from."""
    statistics = jax.devices()[0].memory_stats() or {}
    limit, used = (statistics.get(name, 2**62) for name in ("bytes_limit", "bytes_in_use"))
    room = (limit - used) * 3 // 4 if statistics else num_bytes
    whole = -(-num_bytes // 2**20) * 2**20
    sizes = [min(whole, max(room, 4)), *(size for size in _LADDER if size <= num_bytes)]
    # All at once, so that each one takes other memory; largest first fills the largest gap.
    held = [_filled(size) for size in sizes]
    jax.block_until_ready(held)
    for buffer in held:
        buffer.delete()


def _filled(size: int) -> jax.Array:
    """At least `size` bytes; in two axes, since one of a million tokens' would be too long."""
    row = min(size, 2**20)
    return jnp.full((-(-size // row), row // 4), _PATTERN, jnp.int32)


def share_left(shape: tuple[int, ...]) -> float:
    """Share of NaN in the result of a kernel that writes nothing: 1 where poisoning works."""
    nothing = plgpu.kernel(lambda _: None, out_type=jax.ShapeDtypeStruct(shape, jnp.float32))
    return float(jnp.isnan(poisoned(jax.jit(nothing))()).mean())
