"""The tuner's search: tile sizes a kernel may take, which of them compile, which is fastest."""

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax

from experiments.benchmarking.cases import Case
from experiments.benchmarking.inputs import index_inputs, main_inputs
from experiments.benchmarking.timing import jax_chain, repeat
from msa_jax.config import ConfigError
from pallas_kernels import select_blocks, tuning
from pallas_kernels.ahead_of_time import compile_for_h100
from pallas_kernels.sparse_attention.mosaic_gpu import SparseAttentionConfig
from pallas_kernels.sparse_attention.mosaic_gpu import sparse_attention as attend_by_kernels

Values = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class SearchSpace:
    """What may be tried of one kernel's config.

    Attributes:
      op: "select_blocks" or "sparse_attention".
      fields: values to combine, by field of the config.
      dtypes: of the kernel's products; "int8" is the 8-bit index.
    """

    op: str
    fields: Mapping[str, Sequence[Any]]
    dtypes: Sequence[str] = ("bfloat16",)

    def candidates(self) -> Iterator[Values]:
        """Every combination."""
        for values in itertools.product(*self.fields.values()):
            yield dict(zip(self.fields, values, strict=True))


KERNELS = {
    "select_blocks.scores": SearchSpace(
        "select_blocks",
        {"queries_per_warpgroup": (64, 128), "num_consumers": (1, 2), "num_stages": (2, 3, 4, 6)},
        ("bfloat16", "int8"),
    ),
    "select_blocks.top_k": SearchSpace(
        "select_blocks", {"queries_per_lane": (1, 2), "unroll": (4, 8, 16)}
    ),
    "sparse_attention.union": SearchSpace(
        "sparse_attention", {"num_consumers": (2, 3), "key_tile": (64, 128), "ring": (4, 6, 8, 10)}
    ),
    "sparse_attention.kv_outer": SearchSpace(
        "sparse_attention",
        {
            "num_consumers": (2, 3),
            "num_query_slots": (2, 3),
            "num_kv_stages": (1, 2),
            "tiles_per_slice": (16, 32, 64),
        },
    ),
    "sparse_attention.combine": SearchSpace(
        "sparse_attention", {"num_consumers": (1, 2), "num_slots": (3, 4, 5, 6)}
    ),
    "sparse_attention.backward": SearchSpace(
        "sparse_attention", {"num_query_slots": (2, 3), "tiles_per_slice": (16, 32, 64, 128)}
    ),
}


def compiling(name: str, case: Case, dtype: str) -> Iterator[Values]:
    """The candidates that compile for an H100 without spilling; prints why others do not.

    Raises:
      ConfigError: the op does not run this kernel on the case.
    """
    call, arguments = _op(name, case, dtype)
    for values in KERNELS[name].candidates():
        with tuning.trying(name, values) as trial:
            try:
                resources = compile_for_h100(lambda *arrays: call(*arrays), *arguments)
            except Exception as error:  # the compiler's errors have no class in common
                print(f"  {_text(values)}: {' '.join(str(error).split())[:120]}", flush=True)
                continue
        if trial.bucket is None:
            raise ConfigError(f"{KERNELS[name].op} does not ask for {name} at {case.length} tokens")
        spilled = [kernel.name for kernel in resources if kernel.spill_bytes]
        if spilled:
            print(f"  {_text(values)}: {', '.join(spilled)} spills", flush=True)
        else:
            yield values


def fastest(
    name: str, candidates: Sequence[Values], case: Case, dtype: str, selection: str
) -> tuple[Values, str]:
    """Times candidates on this GPU, prints the times, returns the best and its shape bucket.

    Raises:
      ConfigError: no candidate is left to time.
    """
    if not candidates:
        raise ConfigError(f"no candidate of {name} compiles at {case.length} tokens")
    call, _ = _op(name, case, dtype)
    index = index_inputs(case, selection)
    arrays: tuple[Any, ...] = tuple(index)
    if KERNELS[name].op == "sparse_attention":
        selected = select_blocks(*index, block_size=case.block_size, top_k=case.top_k)
        arrays = (*main_inputs(case), selected.block_ids)
    times, bucket = [], None
    for values in candidates:
        with tuning.trying(name, values) as trial:
            compiled = jax.jit(lambda *arrays: call(*arrays)).lower(*arrays).compile()
        bucket = trial.bucket
        times.append(repeat(jax_chain(lambda run=compiled: run(*arrays)), case.repeats).median_ms)
        print(f"  {_text(values)}: {times[-1]:.3f} ms", flush=True)
    best = candidates[times.index(min(times))]
    print(f"  best: {_text(best)}", flush=True)
    assert bucket is not None  # `compiling` refuses a kernel that does not ask
    return best, bucket


def _op(
    name: str, case: Case, dtype: str
) -> tuple[Callable[..., Any], tuple[jax.ShapeDtypeStruct, ...]]:
    """The op that runs the kernel as a function of arrays, and their shapes."""

    def shape(*sizes: int, kind: str = "bfloat16") -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((case.batch, *sizes), kind)

    def select(index_q, index_k):
        return select_blocks(
            index_q,
            index_k,
            block_size=case.block_size,
            top_k=case.top_k,
            index_precision="int8" if dtype == "int8" else "native",
            implementation="mosaic_gpu",
        ).block_ids

    def attend(q, k, v, block_ids):
        scheme = "union" if name.endswith(".union") else "kv_outer"
        return attend_by_kernels(
            q,
            k,
            v,
            block_ids,
            None,
            0,
            block_size=case.block_size,
            scale=case.head_dim**-0.5,
            config=SparseAttentionConfig(scheme),
        )

    def differentiate(q, k, v, block_ids):
        # The forward pass is timed along: the same for all candidates.
        (o, lse), pullback = jax.vjp(lambda q, k, v: attend(q, k, v, block_ids), q, k, v)
        return pullback((o, lse))

    if KERNELS[name].op == "select_blocks":
        index_q = shape(case.length, case.num_kv_heads, case.index_dim)
        return select, (index_q, shape(case.length, case.index_dim))
    q, kv = (
        shape(case.length, heads, case.head_dim) for heads in (case.num_heads, case.num_kv_heads)
    )
    ids = shape(case.num_kv_heads, case.length, case.top_k, kind="int32")
    call = differentiate if name.endswith(".backward") else attend
    return call, (q, kv, kv, ids)


def _text(values: Values) -> str:
    return ", ".join(f"{name}={value}" for name, value in values.items())
