"""Runs Triton kernels on numpy arrays by Triton's own interpreter, without a GPU and without torch.

Triton interprets every kernel or none, by an environment variable read when it is imported. Here
kernels and the functions of Triton's library that they call are exchanged while one runs, so that
others can be compiled in the same process. What no kernel wrote is NaN.
"""

import contextlib
import threading

import jax
import jax.numpy as jnp
import numpy as np
import triton.language as tl
from triton.runtime import interpreter as _interpreter
from triton.runtime.jit import JITFunction

from pallas_kernels.triton import Target, traced_for

_LANGUAGE = (
    tl,
    tl.core,
    tl.standard,
    tl.math,
    tl.tensor,
    tl.dtype,
    tl.core.tensor_descriptor_base,
    _interpreter,
    _interpreter.InterpreterBuilder,
)


# XLA may call back from several threads, and what is exchanged is the process's.
_one_at_a_time = threading.Lock()


def interpreted():
    """Traces kernels for the interpreter."""
    return traced_for(Target(80, interpreter=run))


def run(kernel, grid, out, constants, *inputs):
    """The outputs of a kernel: see `pallas_kernels.triton.Target`."""
    arrays = [np.ascontiguousarray(array) for array in inputs]
    outputs = [_unwritten(shape) for shape in out]
    pointers = [_pointer(array) for array in (*arrays, *outputs)]
    names = kernel.arg_names
    arguments = dict(zip(names, pointers, strict=False)) | constants
    assert sorted(arguments) == sorted(names), "each argument once"
    builder = _interpreter.interpreter_builder
    with _one_at_a_time, _interpreting(kernel) as function, np.errstate(all="ignore"):
        builder.set_grid_dim(*grid, *[1] * (3 - len(grid)))
        for index in np.ndindex(*builder.grid_dim):
            builder.set_grid_idx(*index)
            function(**arguments)
    return tuple(outputs)


def _unwritten(shape: jax.ShapeDtypeStruct) -> np.ndarray:
    value = np.nan if jnp.issubdtype(shape.dtype, jnp.floating) else 1 << 30
    return np.full(shape.shape, value, shape.dtype)


def _pointer(array: np.ndarray):
    names = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32", "int32": "i32"}
    kind = tl.str_to_ty("*" + names[str(array.dtype)], None)
    handle = _interpreter.TensorHandle(np.array([array.ctypes.data], np.uint64), kind)
    return tl.tensor(handle, kind)


@contextlib.contextmanager
def _interpreting(kernel):
    """Yields the kernel as a Python function, with the language and library that it calls."""
    names = kernel.fn.__globals__
    before = [(owner, dict(vars(owner))) for owner in _LANGUAGE]
    compiled = {name: member for name, member in names.items() if isinstance(member, JITFunction)}
    try:
        _interpreter.InterpreterBuilder.create_dot = _dot
        for owner in (tl, tl.core, tl.standard):
            for name, member in list(vars(owner).items()):
                if isinstance(member, JITFunction):
                    setattr(owner, name, _interpreter.InterpretedFunction(member.fn))
        names.update({n: _interpreter.InterpretedFunction(m.fn) for n, m in compiled.items()})
        function = _interpreter.InterpretedFunction(kernel.fn).rewrite()
        # Kernels call the language as `tl`, its library as `tl.core`. Patched here once and not, as
        # by the interpreter, in every call.
        _interpreter._patch_lang(function)
        _interpreter._patch_lang(tl.standard.sum.fn)
        _interpreter._patch_lang = lambda function: None
        # The interpreter's own asks numpy for the number in an array of one axis.
        tl.tensor.__index__ = lambda self: int(self.handle.data.item())
        yield function
    finally:
        names.update(compiled)
        for owner, members in before:
            for name, member in list(vars(owner).items()):
                if name in members and member is not members[name]:
                    setattr(owner, name, members[name])
                elif name not in members and isinstance(owner, type):
                    # What was added to modules, rewritten functions keep using.
                    delattr(owner, name)


def _dot(self, a, b, d, *options, dot=_interpreter.InterpreterBuilder.create_dot):
    """As Triton's, which multiplies the bits of bfloat16 as if they were integers."""
    a, b = (self.cast_impl(x, tl.float32) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b))
    return dot(self, a, b, d, *options)
