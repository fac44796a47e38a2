"""The case of MSA: held to the exact results, then timed."""

import concurrent.futures
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from experiments.benchmarking import checks, exact_rows
from experiments.benchmarking.cases import Case, phase
from experiments.benchmarking.inputs import (
    IndexInputs,
    MainInputs,
    index_inputs,
    main_inputs,
    mean_union,
)
from experiments.benchmarking.jax_worker import describe, memory
from experiments.benchmarking.programs import Programs, begin_compiling
from experiments.benchmarking.timing import jax_chain, repeat

Record = dict[str, Any]


def msa(case: Case) -> Iterator[Record]:
    """Selection, main branch and both, one record for each kind of selection and precision."""
    with concurrent.futures.ThreadPoolExecutor() as pool:
        phase("start jax")
        jax.devices()
        begun = begin_compiling(case, pool)
        phase("draw queries, keys, values")
        arrays = jax.block_until_ready(main_inputs(case))
        phase("compile")
    # The end of the pool is that of compiling: nothing runs beside what is timed.
    for selection in case.selections:
        oracle = None
        for precision, parts in begun.items():
            record = {"selection": selection, "precision": precision}
            try:
                programs = {name: part.result() for name, part in parts.items()}
                oracle = oracle or _oracle(case, arrays, selection)
                yield record | _msa(case, arrays, oracle, programs, exact=precision == "native")
            except Exception as error:  # the other kinds may still run; jax has no class for all
                yield record | {"error": describe(error)}


class _Oracle(NamedTuple):
    """What sampled rows are held to, for one kind of selection.

    Attributes:
      index: the index inputs.
      rows: query positions [R].
      scores: of `exact_rows.block_scores`.
      ids: the exact selection of the rows, [R, Hkv, K].
      attention: output and log-sum-exp over it.
    """

    index: IndexInputs
    rows: np.ndarray
    scores: np.ndarray
    ids: np.ndarray
    attention: tuple[np.ndarray, np.ndarray]


def _oracle(case: Case, arrays: MainInputs, selection: str) -> _Oracle:
    phase(f"draw {selection} index")
    index = jax.block_until_ready(index_inputs(case, selection))
    phase(f"oracle of {selection}")
    rows = exact_rows.sample_rows(case)
    scores = exact_rows.block_scores(index.index_q, index.index_k, rows, case.block_size)
    ids = exact_rows.choice(scores, rows, case)
    attention = exact_rows.attention(*arrays, ids, rows, case.block_size)
    return _Oracle(index, rows, scores, ids, attention)


def _msa(
    case: Case, arrays: MainInputs, oracle: _Oracle, programs: Programs, *, exact: bool
) -> Record:
    phase("check")
    index = oracle.index
    block_ids = programs["selection"](*index)
    host_ids = np.asarray(block_ids)
    checked = _check(case, arrays, oracle, block_ids, host_ids, programs, exact=exact)
    calls: dict[str, Callable[[], Any]] = {
        "selection": lambda: programs["selection"](*index),
        "main": lambda: programs["main"](*arrays, block_ids),
        "both": lambda: programs["both"](*arrays, *index),
    }
    timings = {}
    for name, call in calls.items():
        phase(f"time {name}")
        timings[name] = repeat(jax_chain(call), case.repeats).asdict()
    phase("union and memory")
    first = case.top_k * case.block_size
    return {
        "timings": timings,
        "checks": checked,
        "union": {str(n): mean_union(host_ids, n, first) for n in (4, 8)},
        **memory(programs),
    }


def _check(
    case: Case,
    arrays: MainInputs,
    oracle: _Oracle,
    block_ids: jax.Array,
    host_ids: np.ndarray,
    programs: Programs,
    *,
    exact: bool,
) -> Record:
    """Sampled rows of the first sequence against the oracle, and two runs against each other."""
    rows = oracle.rows
    ids = host_ids[0][:, rows].swapaxes(0, 1)
    record: Record = checks.check_selection(ids, oracle.scores, rows, case.block_size, exact=exact)

    o, lse = programs["main"](*arrays, block_ids)
    sampled = np.asarray(exact_rows.sampled(o, rows))
    expected = oracle.attention
    if not np.array_equal(ids, oracle.ids):
        expected = exact_rows.attention(*arrays, ids, rows, case.block_size)
    record |= checks.check_output(sampled, np.asarray(lse)[0][:, rows].T, expected)
    record["error_of_selection"] = checks.overall_error(sampled, oracle.attention[0])

    phase("compare two runs")
    once = int(checks.digest(o))
    o = lse = None
    again = int(checks.digest(programs["both"](*arrays, *oracle.index)[0]))
    if once != again:
        raise checks.CheckError("two runs over the same inputs differ")
    return record | {"rows": len(rows), "two_runs_equal": True}
