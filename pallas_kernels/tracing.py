"""How kernels are traced, on any device: for which target, in 32 bits, for arrays of one device."""

import contextlib
import contextvars
import functools
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp


class GivenTarget[T]:
    """The target that kernels of one kind are traced for, where it is not the default device."""

    def __init__(self):
        self._variable: contextvars.ContextVar[T | None] = contextvars.ContextVar(
            "target", default=None
        )

    @contextlib.contextmanager
    def traced_for(self, target: T) -> Iterator[None]:
        """Traces kernels for `target` on a machine without it: to interpret or to compile ahead.

        The target is read while a kernel is traced; functions already jitted keep theirs.
        """
        token = self._variable.set(target)
        try:
            yield
        finally:
            self._variable.reset(token)

    def get(self) -> T | None:
        """The target, None outside of `traced_for`."""
        return self._variable.get()


def in_32_bits[R](fn: Callable[..., R]) -> Callable[..., R]:
    """Traces `fn` as if `jax_enable_x64` were off: kernels have 32-bit integers and no others.

    64-bit integers among its positional arguments (documents, offsets, block ids) become 32-bit
    ones before. A `custom_vjp` goes around it: its forward pass may be traced much later.
    """

    @functools.wraps(fn)
    def traced(*args, **kwargs) -> R:
        narrow = [_narrow(arg) for arg in args]
        with jax.enable_x64(False):
            return fn(*narrow, **kwargs)

    return traced


def _narrow(arg):
    """A 64-bit integer array as int32; anything else as it is."""
    if isinstance(arg, jax.Array) and arg.dtype in (jnp.int64, jnp.uint64):
        return arg.astype(jnp.int32)
    return arg


def indivisible[R](fn: Callable[..., R]) -> Callable[..., R]:
    """Makes one operation of `fn`, which rematerialisation runs again as a whole or not at all.

    For functions of arrays whose kernels write into a `jax.Ref` made inside. Rematerialisation goes
    through what a layer does one by one; it leaves a Mosaic GPU kernel that writes to a reference
    out of what it computes again, yet not those who make the reference and read it (jax 0.11 and
    0.12). The backward pass would then read memory that nobody has written.
    """
    # What is called so for its batching rule, one call after the other, is never looked into.
    return jax.custom_batching.sequential_vmap(fn)


def refuse_varying(*args: object) -> None:
    """Refuses arrays that a `shard_map` with `check_vma=True` types as varying over mesh axes.

    The types of what kernels read and return would not say so: their bodies do not trace, and a
    gradient would be summed over the mesh.

    Raises:
      NotImplementedError: one of the arguments is such an array.
    """
    varying: set[str] = set()
    for arg in args:
        if isinstance(arg, jax.Array):
            varying |= {str(axis) for axis in jax.typeof(arg).manual_axis_type.varying}
    if varying:
        raise NotImplementedError(
            "kernels do not run in a shard_map that checks what varies over mesh axes "
            f"(here {', '.join(sorted(varying))}); pass check_vma=False to jax.shard_map"
        )
