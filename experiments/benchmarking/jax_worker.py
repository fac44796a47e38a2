"""The ceilings of the device and cuDNN, in jax; and what its cases report alike."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from experiments.benchmarking.cases import TRAINING, Case, phase
from experiments.benchmarking.inputs import main_inputs, output_cotangent
from experiments.benchmarking.programs import Programs
from experiments.benchmarking.timing import jax_chain, repeat

Record = dict[str, Any]

_MATMUL_SIZES = (4096, 8192, 16384)
_COPY_BYTES = 2**32


def ceilings(case: Case) -> Iterator[Record]:
    """The highest matmul rate (FLOP/s) and copy bandwidth (bytes read and written per second)."""
    rates = {}
    for size in _MATMUL_SIZES:
        phase(f"matmul of {size}")
        keys = jax.random.split(jax.random.key(case.seed))
        # Scaled so that the products of a chain keep their size.
        a, b = (jax.random.normal(key, (size, size), jnp.bfloat16) * size**-0.5 for key in keys)
        multiply = jax.jit(lambda a, b: a @ b).lower(a, b).compile()
        rates[size] = 2 * size**3 / _seconds(lambda m=multiply, a=a, b=b: m(a, b), case.repeats)
    phase("copy")
    x = jax.random.normal(jax.random.key(case.seed), (_COPY_BYTES // 4,))
    copy = jax.jit(lambda x: -x).lower(x).compile()
    bandwidth = 2 * x.nbytes / _seconds(lambda: copy(x), case.repeats)
    yield {
        "matmul_flops": max(rates.values()),
        "matmul_flops_by_size": rates,
        "copy_bytes": bandwidth,
    }


def cudnn(case: Case) -> Iterator[Record]:
    """Dense causal attention by cuDNN; in training with the gradients of q, k and v."""
    training = case.passes == TRAINING
    phase("draw queries, keys, values")
    arrays = jax.block_until_ready(main_inputs(case))
    cotangent = (output_cotangent(case),) if training else ()

    def attend(q, k, v):
        return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn")

    def train(q, k, v, do):
        o, pullback = jax.vjp(attend, q, k, v)
        return o, pullback(do)

    name, program = ("training", train) if training else ("both", attend)
    phase("compile")
    compiled = jax.jit(program).lower(*arrays, *cotangent).compile()
    phase(f"time {name}")
    timing = repeat(jax_chain(lambda: compiled(*arrays, *cotangent)), case.repeats)
    yield {"timings": {name: timing.asdict()}, **memory({name: compiled})}


def describe(error: Exception) -> str:
    """One line of an error."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"


def _seconds(call: Callable[[], Any], repeats: int) -> float:
    return repeat(jax_chain(call), repeats).median_ms / 1e3


def memory(programs: Programs) -> Record:
    """The process's peak so far, and what each program takes beside arguments and results."""
    statistics = jax.devices()[0].memory_stats() or {}
    analyses = {name: program.memory_analysis() for name, program in programs.items()}
    return {
        "peak_bytes": statistics.get("peak_bytes_in_use"),
        "temporary_bytes": {
            name: None if analysis is None else analysis.temp_size_in_bytes
            for name, analysis in analyses.items()
        },
    }
