"""The cases that run in jax: MSA, cuDNN and the ceilings of the device."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarking import checks
from experiments.benchmarking.cases import Case
from experiments.benchmarking.inputs import (
    IndexInputs,
    MainInputs,
    index_inputs,
    main_inputs,
    mean_union,
)
from experiments.benchmarking.timing import jax_chain, repeat
from pallas_kernels import BlockSelection, select_blocks, sparse_attention

Record = dict[str, Any]
Programs = dict[str, Any]  # compiled, by part

_MATMUL_SIZES = (4096, 8192, 16384)
_COPY_BYTES = 2**32


def ceilings(case: Case) -> Iterator[Record]:
    """The highest matmul rate (FLOP/s) and copy bandwidth (bytes read and written per second)."""
    rates = {}
    for size in _MATMUL_SIZES:
        keys = jax.random.split(jax.random.key(case.seed))
        # Scaled so that the products of a chain keep their size.
        a, b = (jax.random.normal(key, (size, size), jnp.bfloat16) * size**-0.5 for key in keys)
        multiply = jax.jit(lambda a, b: a @ b).lower(a, b).compile()
        rates[size] = 2 * size**3 / _seconds(lambda m=multiply, a=a, b=b: m(a, b), case.repeats)
    x = jax.random.normal(jax.random.key(case.seed), (_COPY_BYTES // 4,))
    copy = jax.jit(lambda x: -x).lower(x).compile()
    bandwidth = 2 * x.nbytes / _seconds(lambda: copy(x), case.repeats)
    yield {
        "matmul_flops": max(rates.values()),
        "matmul_flops_by_size": rates,
        "copy_bytes": bandwidth,
    }


def cudnn(case: Case) -> Iterator[Record]:
    """Dense causal attention by cuDNN."""
    arrays = main_inputs(case)

    def attend(q, k, v):
        return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn")

    compiled = jax.jit(attend).lower(*arrays).compile()
    timing = repeat(jax_chain(lambda: compiled(*arrays)), case.repeats)
    yield {"timings": {"both": timing.asdict()}, **_memory({"both": compiled})}


def msa(case: Case) -> Iterator[Record]:
    """Selection, main branch and both, one record for each kind of selection and precision."""
    arrays = main_inputs(case)
    programs: dict[str, Programs] = {}
    for selection in case.selections:
        index = index_inputs(case, selection)
        for precision in case.precisions:
            record = {"selection": selection, "precision": precision}
            try:
                if precision not in programs:
                    programs[precision] = _compile(case, arrays, index, precision)
                yield record | _msa(case, arrays, index, precision, programs[precision])
            except Exception as error:  # the other kinds may still run; jax has no class for all
                yield record | {"error": describe(error)}


def _compile(case: Case, arrays: MainInputs, index: IndexInputs, precision: str) -> Programs:
    """The programs of one precision, by part; they serve every kind of selection."""

    def select(index_q, index_k):
        return select_blocks(
            index_q,
            index_k,
            block_size=case.block_size,
            top_k=case.top_k,
            index_precision=precision,
            implementation=case.implementation,
        ).block_ids

    def attend(q, k, v, block_ids):
        selection = BlockSelection(block_ids, case.block_size)
        return sparse_attention(q, k, v, selection, implementation=case.implementation)

    def both(q, k, v, index_q, index_k):
        return attend(q, k, v, select(index_q, index_k))

    ids_type = jax.eval_shape(select, *index)
    return {
        "selection": jax.jit(select).lower(*index).compile(),
        "main": jax.jit(attend).lower(*arrays, ids_type).compile(),
        "both": jax.jit(both).lower(*arrays, *index).compile(),
    }


def _msa(
    case: Case, arrays: MainInputs, index: IndexInputs, precision: str, programs: Programs
) -> Record:
    block_ids = programs["selection"](*index)
    checked = _check(case, arrays, index, block_ids, programs, exact=precision == "native")
    calls: dict[str, Callable[[], Any]] = {
        "selection": lambda: programs["selection"](*index),
        "main": lambda: programs["main"](*arrays, block_ids),
        "both": lambda: programs["both"](*arrays, *index),
    }
    timings = {name: repeat(jax_chain(call), case.repeats) for name, call in calls.items()}
    first = case.top_k * case.block_size
    return {
        "timings": {name: timing.asdict() for name, timing in timings.items()},
        "checks": checked,
        "union": {str(n): mean_union(block_ids, n, first) for n in (4, 8)},
        **_memory(programs),
    }


def _check(
    case: Case,
    arrays: MainInputs,
    index: IndexInputs,
    block_ids: jax.Array,
    programs: Programs,
    *,
    exact: bool,
) -> Record:
    """Sampled rows of the first sequence against the oracle, and two runs against each other."""
    rows = checks.sample_rows(case)
    ids = np.asarray(block_ids[0][:, rows]).swapaxes(0, 1)
    scores = checks.exact_block_scores(*index, rows, case.block_size)
    record: Record = checks.check_selection(ids, scores, rows, case.block_size, exact=exact)

    o, lse = programs["main"](*arrays, block_ids)
    sampled = np.asarray(o[0, rows].astype(jnp.float32))  # no o[0]: it would be copied
    expected = checks.exact_attention(*arrays, ids, rows, case.block_size)
    record |= checks.check_output(sampled, np.asarray(lse[0][:, rows]).T, expected)
    best = checks.exact_choice(scores, rows, case)
    exact_output, _ = checks.exact_attention(*arrays, best, rows, case.block_size)
    record["error_of_selection"] = checks.overall_error(sampled, exact_output)

    once = int(checks.digest(o))
    o = lse = None
    again = int(checks.digest(programs["both"](*arrays, *index)[0]))
    if once != again:
        raise checks.CheckError("two runs over the same inputs differ")
    return record | {"rows": len(rows), "two_runs_equal": True}


def describe(error: Exception) -> str:
    """One line of an error."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"


def _seconds(call: Callable[[], Any], repeats: int) -> float:
    return repeat(jax_chain(call), repeats).median_ms / 1e3


def _memory(programs: Programs) -> Record:
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
