"""The report's tables of training: a layer's selection, forward and backward pass, and its KL."""

from collections.abc import Sequence

from experiments.benchmarking import results, summary
from experiments.benchmarking.cases import BASELINES, MSA
from experiments.benchmarking.results import Row
from experiments.benchmarking.tables import factors, gigabytes, head, milliseconds, span
from msa_jax.eval.figures import short_length
from msa_jax.eval.tables import Table

_ERRORS = ("output", "kl", "dq", "dk", "dv", "dindex_q", "dindex_k")


def tables(rows: Sequence[Row]) -> dict[str, Table]:
    """Tables by title, those without lines too.

    Args:
      rows: of training.
    """
    msa = [row for row in rows if row.case.subject == MSA]
    return {
        "Training: time and speed-up": _time_table(msa, rows),
        "Training: rates and floors": _rate_table(msa),
        "Training: checks": _check_table(msa),
        "Training: baselines": _baseline_table([row for row in rows if row.case.subject != MSA]),
    }


def introduction(rows: Sequence[Row]) -> str:
    """What the tables show, and what each op ran as."""
    choices = dict.fromkeys(line for row in rows for line in row.record.get("ops", ()))
    return "\n".join([_INTRODUCTION, "", *(f"* {line}" for line in choices)]).rstrip()


def _time_table(msa: Sequence[Row], rows: Sequence[Row]) -> Table:
    header = ["tokens", "selection", "index"]
    header += [f"{name} (ms)" for name in ("select", "main", "backward", "KL", "training")]
    header += ["training, fastest to slowest (ms)", "training, share of floor"]
    header += ["peak (GB)", "workspace (GB)", *(f"x {title}" for title in BASELINES.values())]
    lines = []
    for row in msa:
        parts = [row.parts[name].median_ms for name in results.TRAINING_PARTS]
        line = [*head(row), *map(milliseconds, parts), span(row.whole), f"{row.whole.share:.0%}"]
        line.append(gigabytes(row.record["peak_bytes"]))
        line.append(gigabytes(row.record["temporary_bytes"]["training"]))
        lines.append([*line, *factors(summary.speedups(row, rows))])
    return header, lines


def _rate_table(msa: Sequence[Row]) -> Table:
    names = {"backward": "backward", "kl": "KL", "training": "training"}
    header = ["tokens", "selection", "index"]
    for name in names.values():
        header += [f"{name} TFLOP/s", f"{name} TB/s", f"{name} floor (ms)", f"{name} share"]
    lines = []
    for row in msa:
        line = head(row)
        for part in (row.parts[name] for name in names):
            line += [f"{part.teraflops:.0f}", f"{part.terabytes:.2f}"]
            line += [milliseconds(part.floor_ms), f"{part.share:.0%}"]
        lines.append(line)
    return header, lines


def _check_table(msa: Sequence[Row]) -> Table:
    header = ["tokens", "selection", "index", "union of 4", "union of 8", "recall"]
    header += [f"{name} error" for name in _ERRORS]
    lines = []
    for row in msa:
        record, checked = row.record, row.record["checks"]
        line = [*head(row), *(f"{record['union'][n]:.1f}" for n in ("4", "8"))]
        line.append(f"{checked['selection_recall']:.4f}")
        found = [checked.get(f"{name}_error") for name in _ERRORS]
        lines.append([*line, *("-" if error is None else f"{error:.1e}" for error in found)])
    return header, lines


def _baseline_table(baselines: Sequence[Row]) -> Table:
    header = ["tokens", "baseline", "time (ms)", "fastest to slowest (ms)", "repeats", "TFLOP/s"]
    header += ["peak (GB)"]
    lines = []
    for row in baselines:
        part = row.whole
        line = [short_length(row.case.length), BASELINES[row.case.subject]]
        line += [milliseconds(part.median_ms), span(part)]
        line += [str(row.record["timings"]["training"]["repeats"]), f"{part.teraflops:.0f}"]
        lines.append([*line, gigabytes(row.record["peak_bytes"])])
    return header, lines


_INTRODUCTION = """\
"Training" is one program: selection, forward pass, the KL's value, and the gradients of queries,
keys, values, index queries and index keys for a random gradient of the output and the mean KL. Its
parts are timed alone too: "main" the forward pass with what it keeps, "backward" the gradients of
queries, keys and values, "KL" its value and its gradients. Dense baselines are timed forward and
backward, flash-msa with its KL. Useful work counts two products for each of the forward pass's, and
for the KL its two gradients, over what is visible of the selected blocks; nothing that is computed
again. Before it is timed, sampled query rows (output, KL, dq, index dq) and one key block (dk, dv,
index dk) of the first sequence are held to float64, and two runs to each other bit for bit. Errors
of gradients and of the KL are over all that was sampled together. Peak is the process's after the
first run of the whole, inputs included. Operations ran as follows."""
