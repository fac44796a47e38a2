"""The library's operations as functions to compile, with arguments that are shapes alone."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from experiments.benchmarking.cases import Case, parse_length
from experiments.benchmarking.work import Work, work
from msa_jax.config import ConfigError
from pallas_kernels import (
    BlockSelection,
    dense_attention,
    index_kl,
    select_blocks,
    sparse_attention,
)


@dataclasses.dataclass(frozen=True)
class Shape:
    """What an operation is compiled for.

    Attributes:
      length: S, key slots.
      queries: T, the last of them; 0 for as many as keys.
      batch: B.
      num_heads: Hq.
      num_kv_heads: Hkv.
      head_dim: D.
      index_dim: Di.
      block_size: Bk.
      top_k: K.
    """

    length: int = 2**17
    queries: int = 0
    batch: int = 1
    num_heads: int = 64
    num_kv_heads: int = 4
    head_dim: int = 128
    index_dim: int = 128
    block_size: int = 128
    top_k: int = 16

    @property
    def num_queries(self) -> int:
        """T."""
        return self.queries or self.length

    @property
    def case(self) -> Case:
        """The benchmark's, which knows the work."""
        fields = dataclasses.asdict(self)
        del fields["queries"]
        return Case("msa", **fields)


def parse_shape(text: str) -> Shape:
    """The shape that "128K,num_heads=32" names: a length, and fields of `Shape`.

    Raises:
      ConfigError: no such field, or a value that is no number.
    """
    known = {field.name for field in dataclasses.fields(Shape)}
    values = {}
    for item in filter(None, text.split(",")):
        name, equals, number = item.rpartition("=")
        name = name if equals else "length"
        if name not in known:
            raise ConfigError(f"--shape={text}: no field {name!r}; choose from {sorted(known)}")
        values[name] = parse_length(number)
    return Shape(**values)


@dataclasses.dataclass(frozen=True)
class Program:
    """A function, and the shapes of its arguments."""

    function: Callable[..., Any]
    arguments: tuple[Any, ...]


@dataclasses.dataclass(frozen=True)
class Options:
    """How an operation is called.

    Attributes:
      dtype: of all queries, keys and values.
      implementation: name, or "" for the best there is.
      index_precision: of `select_blocks`.
    """

    dtype: str = "bfloat16"
    implementation: str = ""
    index_precision: str = "native"


# The part of the benchmark's work that an operation does; a value of the KL alone has none.
OPERATIONS = {
    "select_blocks": "selection",
    "sparse_attention": "main",
    "sparse_attention_gradient": "backward",
    "index_kl": "",
    "index_kl_gradient": "kl",
    "dense_attention": "",
    "dense_attention_gradient": "",
}


def program(op: str, shape: Shape, options: Options) -> Program:
    """An operation, to be compiled for the target that this is called under.

    Args:
      op: of `OPERATIONS`. The gradient of an attention is its pullback alone, with residuals as
        arguments; that of the KL comes with its value.
      shape: of the arguments.
      options: of the call.
    """
    tensors = _tensors(shape, options.dtype)
    q, k, index_q, index_k, ids, lse = tensors
    place: dict[str, Any] = {
        "query_offset": shape.length - shape.num_queries,
        "implementation": options.implementation or None,
    }

    def select(index_q, index_k):
        kept = {"block_size": shape.block_size, "top_k": shape.top_k}
        precision = options.index_precision
        return select_blocks(index_q, index_k, **kept, index_precision=precision, **place).block_ids

    def attend(q, k, v, ids):
        return sparse_attention(q, k, v, BlockSelection(ids, shape.block_size), **place)

    def attend_densely(q, k, v):
        return dense_attention(q, k, v, return_lse=True, **place)

    def diverge(index_q, index_k, q, k, ids, lse):
        selection = BlockSelection(ids, shape.block_size)
        return index_kl(q, k, index_q, index_k, selection, main_lse=lse, **place).loss

    return {
        "select_blocks": lambda: Program(select, (index_q, index_k)),
        "sparse_attention": lambda: Program(attend, (q, k, k, ids)),
        "sparse_attention_gradient": lambda: _pullback(attend, (q, k, k), ids),
        "index_kl": lambda: Program(diverge, (index_q, index_k, q, k, ids, lse)),
        "index_kl_gradient": lambda: Program(
            jax.value_and_grad(diverge, argnums=(0, 1)), (index_q, index_k, q, k, ids, lse)
        ),
        "dense_attention": lambda: Program(attend_densely, (q, k, k)),
        "dense_attention_gradient": lambda: _pullback(attend_densely, (q, k, k)),
    }[op]()


def _tensors(shape: Shape, dtype: str) -> tuple[jax.ShapeDtypeStruct, ...]:
    """q, k, index_q, index_k, block ids and main log-sum-exp."""

    def tensor(*sizes: int, dtype: str = dtype) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((shape.batch, *sizes), jnp.dtype(dtype))

    queries, groups = shape.num_queries, shape.num_kv_heads
    return (
        tensor(queries, shape.num_heads, shape.head_dim),
        tensor(shape.length, groups, shape.head_dim),
        tensor(queries, groups, shape.index_dim),
        tensor(shape.length, shape.index_dim),
        tensor(groups, queries, shape.top_k, dtype="int32"),
        tensor(shape.num_heads, queries, dtype="float32"),
    )


def _pullback(attend: Callable, inputs: tuple[Any, ...], *rest: Any) -> Program:
    """Of an attention's output by q, k and v."""

    def forward(*inputs):
        # The log-sum-exp gets no gradient, as in a layer.
        _, pull, _ = jax.vjp(lambda *qkv: attend(*qkv, *inputs[3:]), *inputs[:3], has_aux=True)
        return pull

    pull = jax.jit(forward).trace(*inputs, *rest).out_info
    return Program(lambda pull, do: pull(do), (pull, inputs[0]))


def floor_work(op: str, shape: Shape) -> Work | None:
    """What an operation must compute and move at the least; None where that is not defined."""
    part = OPERATIONS[op]
    return work(shape.case, part) if part and shape.num_queries == shape.length else None
