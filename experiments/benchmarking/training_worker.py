"""The case of one layer's training with MSA: held to exact gradients, then timed."""

import concurrent.futures
import logging
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from experiments.benchmarking import checks, exact_gradients, exact_rows
from experiments.benchmarking.cases import Case, phase
from experiments.benchmarking.inputs import (
    IndexInputs,
    MainInputs,
    index_inputs,
    main_inputs,
    mean_union,
    output_cotangent,
)
from experiments.benchmarking.jax_worker import describe, memory
from experiments.benchmarking.programs import Programs
from experiments.benchmarking.timing import jax_chain, repeat
from experiments.benchmarking.training_programs import TrainedLayer, begin_compiling, digest

Record = dict[str, Any]


class _Inputs(NamedTuple):
    """Of the layer, and the gradient of its output."""

    arrays: MainInputs
    index: IndexInputs
    do: jax.Array

    def train(self, programs: Programs) -> TrainedLayer:
        return programs["training"](*self.arrays, *self.index, self.do)


def msa_training(case: Case) -> Iterator[Record]:
    """Selection, main branch, its backward pass, the KL, and all as one program."""
    choices = _Choices()
    with concurrent.futures.ThreadPoolExecutor() as pool:
        phase("start jax")
        jax.devices()
        begun = begin_compiling(case, pool)
        phase("draw queries, keys, values")
        arrays = jax.block_until_ready(main_inputs(case))
        do = jax.block_until_ready(output_cotangent(case))
        phase("compile")
    for selection in case.selections:
        phase(f"draw {selection} index")
        index = jax.block_until_ready(index_inputs(case, selection))
        for precision, parts in begun.items():
            record = {"selection": selection, "precision": precision, "ops": choices.lines}
            try:
                programs = {name: part.result() for name, part in parts.items()}
                yield record | _measure(case, _Inputs(arrays, index, do), programs, precision)
            except Exception as error:  # the other kinds may still run; jax has no class for all
                yield record | {"error": describe(error)}


def _measure(case: Case, given: _Inputs, programs: Programs, precision: str) -> Record:
    phase("first run")
    layer = jax.block_until_ready(given.train(programs))
    used = memory(programs)  # before checks and parts take theirs
    host_ids = np.asarray(layer.block_ids)
    checked = check(case, given, layer, host_ids, exact=precision == "native")
    once = digest(layer, checks.digest)
    layer = None
    phase("compare two runs")
    if digest(given.train(programs), checks.digest) != once:
        raise checks.CheckError("two runs over the same inputs differ")
    first = case.top_k * case.block_size
    return {
        "timings": {name: _timed(case, name, call) for name, call in _calls(given, programs)},
        "checks": checked | {"two_runs_equal": True},
        "union": {str(n): mean_union(host_ids, n, first) for n in (4, 8)},
        **used,
    }


def _calls(given: _Inputs, programs: Programs) -> Iterator[tuple[str, Callable[[], Any]]]:
    """The whole first, while nothing of its parts takes memory; each part's inputs as it comes."""
    arrays, index, do = given
    yield "training", lambda: given.train(programs)
    yield "selection", lambda: programs["selection"](*index)
    ids = programs["selection"](*index)
    yield "main", lambda: programs["main"](*arrays, ids)
    _, lse, pullback = programs["main"](*arrays, ids)
    yield "backward", lambda: programs["backward"](pullback, do)
    pullback = None
    yield "kl", lambda: programs["kl"](*arrays[:2], *index, ids, lse)


def _timed(case: Case, name: str, call: Callable[[], Any]) -> Record:
    phase(f"time {name}")
    return repeat(jax_chain(call), case.repeats).asdict()


def check(
    case: Case, given: _Inputs, layer: TrainedLayer, host_ids: np.ndarray, *, exact: bool
) -> Record:
    """Sampled rows and a key block of the first sequence against exact results.

    Raises:
      CheckError: one of them is off by more than its limit.
    """
    phase("check the forward pass")
    arrays, index, do = given
    rows = exact_rows.sample_rows(case)
    ids = host_ids[0][:, rows].swapaxes(0, 1)
    scores = exact_rows.block_scores(*index, rows, case.block_size)
    record: Record = checks.check_selection(ids, scores, rows, case.block_size, exact=exact)
    expected = exact_rows.attention(*arrays, ids, rows, case.block_size)
    o = np.asarray(exact_rows.sampled(layer.o, rows))
    record |= checks.check_output(o, np.asarray(layer.lse)[0][:, rows].T, expected)

    phase("check gradients of rows")
    of_rows = exact_gradients.of_rows(case, arrays, index, do, ids, rows)
    errors = {"kl": (np.asarray(layer.kl)[0][:, rows].T, of_rows.kl)}
    for name in ("q", "index_q"):
        found = exact_rows.sampled(getattr(layer.gradients, name), rows)
        errors[f"d{name}"] = np.asarray(found), getattr(of_rows, name)

    phase("check gradients of a block")
    of_block = exact_gradients.of_block(case, arrays, index, do, layer, host_ids[0])
    if of_block is not None:
        size = case.block_size
        slots = np.arange(of_block.block * size, min((of_block.block + 1) * size, case.length))
        for name in ("k", "v", "index_k"):
            found = exact_rows.sampled(getattr(layer.gradients, name), slots)
            errors[f"d{name}"] = np.asarray(found), getattr(of_block, name)
    return record | checks.check_gradients(errors)


class _Choices(logging.Handler):
    """What each op of this process runs as, as `pallas_kernels` says it once."""

    def __init__(self):
        super().__init__()
        self.lines: list[str] = []
        logger = logging.getLogger("pallas_kernels")
        logger.setLevel(logging.INFO)
        logger.addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())
        phase(f"trace; {self.lines[-1]}")
