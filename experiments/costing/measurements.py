"""Kernel rates out of the benchmark's results."""

import dataclasses
import pathlib
from collections.abc import Callable, Sequence

from experiments.benchmarking import results
from experiments.benchmarking.cases import DENSE, FORWARD, MSA, TRAINING
from experiments.benchmarking.results import ResultError, Row
from msa_jax import cost, economics
from msa_jax.config import AttentionConfig
from msa_jax.kernel_rates import KernelRates, RateCurve

FASTEST = "fastest"

# Of the peak, what all of a training step but attention reached on the H100: 350M parameters, dense
# attention by cuDNN, 32K tokens, products computed again counted, the optimizer's time included:
# docs/benchmarks/h100_350m_profile_gqa.json, by the sum in
# tests/experiments/test_economics_command.py.
MATMUL_FRACTION = 0.40


@dataclasses.dataclass(frozen=True)
class Measurements:
    """What a file of results says.

    Attributes:
      device_kind: the GPU it was measured on.
      rates: of attention.
      copy_bytes_per_second: bandwidth of a large copy.
      layer: the benchmark's.
      selection: kind of the index inputs.
      dense: which dense kernel, or "fastest".
      lengths: where the forward and where the training pass of MSA was measured.
    """

    device_kind: str
    rates: KernelRates
    copy_bytes_per_second: float
    layer: AttentionConfig
    selection: str
    dense: str
    lengths: dict[str, tuple[int, ...]]


def read(path: pathlib.Path, *, selection: str, dense: str) -> Measurements:
    """Rates of one kind of selection, bf16 index, and of a dense kernel.

    A part's time is its share of the whole pass's time, so that parts add up to what the whole was
    measured to take.

    Args:
      path: results of `experiments.benchmark`.
      selection: as the benchmark names it, "random" to "captured".
      dense: "cudnn", "flash_attention_4", or "fastest": at each length whichever took less.

    Raises:
      ResultError: there is no such file, or it lacks a pass of this selection or dense kernel.
    """
    runs = results.load([path])
    devices = {run["environment"]["gpu"]["name"] for run in runs}
    if len(devices) != 1:
        raise ResultError(f"{path}: results of {len(devices)} kinds of GPU: pass a file of one")
    rows = results.rows(runs)
    found = {
        (passes, name): _rows(rows, name, passes, selection, dense, path)
        for passes in (FORWARD, TRAINING)
        for name in ("msa", "dense")
    }
    forward, training = found[FORWARD, "msa"], found[TRAINING, "msa"]
    rates = KernelRates(
        dense_forward=_curve(found[FORWARD, "dense"], "both", _main),
        dense_training=_curve(found[TRAINING, "dense"], "training", lambda row: 3 * _main(row)),
        selection=_curve(forward, "selection", _index),
        main=_curve(forward, "main", _main),
        training_selection=_curve(training, "selection", _index),
        training_main=_curve(training, "main", _main),
        backward=_curve(training, "backward", lambda row: 2 * _main(row)),
        kl=_curve(training, "kl", _main),
    )
    return Measurements(
        device_kind=devices.pop(),
        rates=rates,
        copy_bytes_per_second=results.ceilings(runs).copy_bytes,
        layer=forward[0].case.attention,
        selection=selection,
        dense=dense,
        lengths={FORWARD: rates.main.lengths, TRAINING: rates.training_main.lengths},
    )


def machine(
    measured: Measurements, gpu: economics.Gpu, *, price: float, matmul_fraction: float
) -> tuple[economics.Machine, bool]:
    """The GPU at the measured rates, and whether they were measured on one of its kind.

    For another GPU they are the same share of its matmul peak and of its bandwidth.

    Raises:
      ResultError: they were measured on another GPU, and on none that the table has.
    """
    own = gpu.device_kind in measured.device_kind
    kernels, bandwidth = measured.rates, measured.copy_bytes_per_second
    if not own:
        base = _sheet(measured.device_kind)
        kernels = kernels.scaled(gpu.peak_flops / base.peak_flops)
        bandwidth *= gpu.bytes_per_second / base.bytes_per_second
    return economics.Machine(gpu, kernels, matmul_fraction, bandwidth, price), own


def _sheet(device_kind: str) -> economics.Gpu:
    for sheet in economics.GPUS.values():
        if sheet.device_kind in device_kind:
            return sheet
    known = ", ".join(economics.GPUS)
    raise ResultError(
        f"measured on {device_kind!r}, of which no data sheet is known: from the rates of another "
        f"GPU ({known}) estimates can be made; add it to msa_jax.economics.GPUS"
    )


def _rows(
    rows: Sequence[Row], name: str, passes: str, selection: str, dense: str, path: pathlib.Path
) -> list[Row]:
    """One row per length, ascending."""
    subjects = (MSA,) if name == "msa" else DENSE if dense == FASTEST else (dense,)
    kinds = (selection, "native") if name == "msa" else ("", "")
    best: dict[int, Row] = {}
    for row in rows:
        known = best.get(row.case.length)
        right = row.case.subject in subjects and row.case.passes == passes
        if not right or (row.selection, row.precision) != kinds:
            continue
        if known is None or row.whole.median_ms < known.whole.median_ms:
            best[row.case.length] = row
    if not best:
        what = f"MSA, {selection} selection," if name == "msa" else f"{' or '.join(subjects)}"
        raise ResultError(f"{path}: no {passes} pass of {what} was measured: choose another")
    return [best[length] for length in sorted(best)]


def _curve(rows: Sequence[Row], part: str, flops: Callable[[Row], int]) -> RateCurve:
    rates = []
    for row in rows:
        times = {name: p.median_ms for name, p in row.parts.items() if p is not row.whole}
        share = times[part] / sum(times.values()) if part in times else 1.0
        rates.append(flops(row) / (share * row.whole.median_ms * 1e-3))
    return RateCurve(tuple(row.case.length for row in rows), tuple(rates))


def _main(row: Row) -> int:
    """Main-branch FLOPs of the forward pass, of all sequences."""
    if row.case.subject == MSA:
        return row.case.batch * cost.attention_flops(row.case.attention, row.case.length).main
    case = row.case
    return 4 * case.batch * case.num_heads * case.head_dim * cost.causal_pairs(case.length)


def _index(row: Row) -> int:
    return row.case.batch * cost.attention_flops(row.case.attention, row.case.length).index
