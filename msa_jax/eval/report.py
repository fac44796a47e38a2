"""The report: finished runs in, one self-contained HTML page out.

Every number on the page is read from the runs' files (`msa_jax.eval.runs`) or computed by
`msa_jax.cost`. The page needs no network and no script, and follows the reader's light or dark
scheme.
"""

import os
import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

from msa_jax import cost
from msa_jax.config import ArchitectureConfig
from msa_jax.eval import figures, page
from msa_jax.eval.run_figures import (
    CaptionedFigure,
    all_figures,
    cost_figures,
    evaluation_figures,
    selection_figures,
    training_figures,
)
from msa_jax.eval.run_numbers import (
    attention_flops_per_token,
    clock_median,
    percent,
    short_number,
)
from msa_jax.eval.runs import Run, RunFileError, read_runs, reporting_layers

LAYER_METRICS = {
    "score_recall": "score recall",
    "block_recall": "block recall",
    "coverage": "coverage",
    "union_4": "union of 4",
    "union_8": "union of 8",
    "selection_entropy": "selection entropy (nats)",
    "index_kl": "KL (nats)",
}


def write_report(
    run_paths: Sequence[str | os.PathLike[str]],
    output: str | os.PathLike[str],
    *,
    cost_config: ArchitectureConfig,
    cost_name: str,
) -> None:
    """Reads runs and writes their report.

    Args:
      run_paths: folders of finished runs; the comparison is relative to the last of them.
      output: the HTML file.
      cost_config: MSA model of the compute and memory table.
      cost_name: what the report calls that model.

    Raises:
      RunFileError: a file of a run is missing or damaged; the message names it.
    """
    html = render_report(read_runs(run_paths), cost_config=cost_config, cost_name=cost_name)
    pathlib.Path(output).write_text(html, encoding="utf-8")


def write_figures(
    run_paths: Sequence[str | os.PathLike[str]],
    folder: str | os.PathLike[str],
    *,
    cost_config: ArchitectureConfig,
) -> None:
    """Writes the report's figures as SVG files of their own; see `write_report`."""
    found = all_figures(read_runs(run_paths), cost_config)
    pathlib.Path(folder).mkdir(parents=True, exist_ok=True)
    for name, figure in found.items():
        path = pathlib.Path(folder) / f"{name}.svg"
        path.write_text(figures.standalone(figure.svg), encoding="utf-8")


def render_report(runs: Sequence[Run], *, cost_config: ArchitectureConfig, cost_name: str) -> str:
    """The page as a string; see `write_report`."""
    labels = " and ".join(run.label for run in runs)
    body = [
        *(_headline(run, runs[-1]) for run in runs[:-1]),
        page.section("Comparison", _comparison(runs)),
        page.section("Training", _grid(training_figures(runs).values())),
    ]
    for run in runs:
        if run.selection is not None:
            body.append(page.section(f"What the {run.label} model selects", _selection(run)))
    body += [
        page.section("Final evaluation", _grid(evaluation_figures(runs).values())),
        page.section(f"Compute and memory of {cost_name}", _cost(cost_config)),
        page.section("How it was run", _manifest(runs)),
    ]
    return page.document(f"{labels}: training report", "".join(body))


def comparison_table(runs: Sequence[Run]) -> tuple[list[str], list[list[str]]]:
    """Head and rows of the comparison, as text; the last columns are relative to the last run."""
    rows: list[tuple[str, Callable[[Run], float], Callable[[float], str]]] = [
        ("validation loss (nats per token)", lambda run: run.evaluation.loss, "{:.4f}".format),
        ("bits per byte", lambda run: run.evaluation.bits_per_byte, "{:.4f}".format),
        ("tokens per second, median", lambda run: clock_median(run, "tokens_per_second"), _count),
        ("MFU, own FLOPs, median", lambda run: clock_median(run, "mfu_sparse"), "{:.1%}".format),
        (
            "MFU, dense-equivalent FLOPs, median",
            lambda run: clock_median(run, "mfu_dense_equivalent"),
            "{:.1%}".format,
        ),
        ("parameters", lambda run: cost.parameter_count(run.config).total, short_number),
        ("parameters, active", lambda run: cost.parameter_count(run.config).active, short_number),
        (
            "attention FLOPs per token, forward",
            lambda run: attention_flops_per_token(run.config),
            short_number,
        ),
        ("training FLOPs per token, own", lambda run: _training(run).sparse, short_number),
        (
            "training FLOPs per token, dense-equivalent",
            lambda run: _training(run).dense_equivalent,
            short_number,
        ),
        ("optimizer steps", lambda run: run.evaluation.step, _count),
        ("validation tokens scored", lambda run: run.evaluation.tokens, _count),
    ]
    head = ["", *(run.label for run in runs)]
    head += [f"{run.label} relative to {runs[-1].label}" for run in runs[:-1]]
    body = []
    for name, value, show in rows:
        numbers = [float(value(run)) for run in runs]
        if name.startswith("MFU") and np.isnan(numbers).all():
            continue  # a device without a known peak, such as a CPU
        relative = [percent(number, numbers[-1]) for number in numbers[:-1]]
        cells = ["not recorded" if np.isnan(number) else show(number) for number in numbers]
        body.append([name, *cells, *relative])
    return head, body


def _headline(run: Run, reference: Run) -> str:
    loss, other = run.evaluation.loss, reference.evaluation.loss
    ratio = attention_flops_per_token(reference.config) / attention_flops_per_token(run.config)
    sentence = (
        f"{run.label} has a validation loss of {loss:.4f} nats per token after "
        f"{run.evaluation.step:,} steps, {reference.label} {other:.4f} after "
        f"{reference.evaluation.step:,} ({percent(loss, other)}). On "
        f"{run.config.data.sequence_length:,} tokens {reference.label} needs {ratio:.2f} times the "
        f"attention FLOPs of {run.label}."
    )
    return f"<p>{page.text(sentence)}</p>"


def _comparison(runs: Sequence[Run]) -> str:
    lengths = sorted({run.config.data.sequence_length for run in runs})
    note = (
        "Loss and bits per byte are the final evaluation on held-out text. Speed is the median "
        "over the training records after the first, which holds the compilation. FLOPs are exact "
        f"counts for a document of {' and '.join(f'{length:,}' for length in lengths)} tokens "
        "(one full row), 2 per multiply-add; attention FLOPs hold scores, values and index scores "
        "but no projections. Training FLOPs are those of the sparse phase, backward pass and KL "
        "included; dense-equivalent is the dense twin's cost for the same tokens. "
        "Active parameters are those that one token uses, embedding included."
    )
    return f"{page.table(*comparison_table(runs))}{page.note(note)}"


def _selection(run: Run) -> str:
    note = (
        "The pictures are one validation sequence. A row is a query, a column a block of keys; "
        "what is left empty is not visible: later than the query, or in another document. "
        f"Each group keeps {run.config.attention.top_k} blocks for each query, its own among them."
    )
    parts = [_selection_table(run), page.note(note)]
    shown = selection_figures(run)
    opened = list(shown)[len(shown) // 2]
    for layer, figure in shown.items():
        content = page.grid([page.figure(*figure), _selected_text(run, layer)])
        parts.append(page.details(f"Layer {layer}", content, opened=layer == opened))
    return "".join(parts)


def _selection_table(run: Run) -> str:
    """The final evaluation's selection metrics, a row per layer."""
    metrics = {
        name: run.evaluation.layers[name] for name in LAYER_METRICS if name in run.evaluation.layers
    }
    if not metrics:
        return ""
    path = run.path / "evaluation.json"
    count = {len(values) for values in metrics.values()}
    layers = reporting_layers(run.config, max(count), path)
    if len(count) > 1:
        raise RunFileError(f"{path}: the metrics in 'layers' have unequal lengths {sorted(count)}")
    rows = [
        [str(layer), *(f"{value:.3f}" for value in values)]
        for layer, *values in zip(layers, *metrics.values(), strict=True)
    ]
    note = (
        "Final evaluation: means over groups and over the validation queries that had a choice, "
        f"which see more than {run.config.attention.top_k} blocks. Coverage: attention mass of the "
        "kept blocks as a share of all mass outside the query's own block. Union of 4 and 8: "
        "distinct blocks that so many neighbouring queries keep. Selection entropy: of the kept "
        "blocks' ids within a sequence; near 0 all queries keep the same ones. KL: over all "
        "queries."
    )
    head = ["layer", *(LAYER_METRICS[name] for name in metrics)]
    return f"{page.table(head, rows)}{page.note(note)}"


def _selected_text(run: Run, layer: int) -> str:
    """The text, the blocks marked that each group of one layer keeps for the last real query."""
    selection = run.selection
    assert selection is not None
    index = selection.layers.tolist().index(layer)
    query = int(np.flatnonzero(selection.segment_ids > 0)[-1])
    own = query // selection.block_size
    document = selection.segment_ids[:: selection.block_size] == selection.segment_ids[query]
    parts = []
    for group, ids in enumerate(selection.block_ids[index, :, query]):
        kept = set(ids[ids >= 0].tolist())
        spans = []
        for block in np.flatnonzero(document[: own + 1]).tolist():
            style = "own" if block == own else "kept" if block in kept else ""
            spans.append(f'<span class="{style}">{page.text(run.evaluation.text[block])}</span>')
        title = f"Group {group}, what the query at position {query:,} attends to:"
        parts.append(f'<div class=note>{title}</div><div class="text">{"".join(spans)}</div>')
    return f"<div>{''.join(parts)}</div>"


def _cost(config: ArchitectureConfig) -> str:
    rows = cost.compute_table(config)
    head = [
        "context",
        "dense TFLOPs",
        "MSA TFLOPs",
        "ratio",
        "ratio by Eq.\N{NO-BREAK SPACE}12",
        "index share",
        "KV cache (GB)",
        "index keys (GB)",
        "decode bytes ratio",
    ]
    body = [
        [
            figures.short_length(row.length),
            f"{row.dense_tflops:,.0f}",
            f"{row.msa_tflops:,.0f}",
            f"{row.ratio:.2f}",
            f"{row.eq12_ratio:.2f}",
            f"{row.index_share:.0%}",
            f"{row.kv_cache_gb:.2f}",
            f"{row.index_cache_gb:.2f}",
            f"{row.decode_ratio:.2f}",
        ]
        for row in rows
    ]
    note = (
        "Computed, not measured. TFLOPs: attention of all layers in one forward pass over one "
        "document of this length, without projections, exact causal count. Eq. 12 is the paper's "
        "estimate for one layer, which gives every query a full budget. Index share: of the MSA "
        "TFLOPs. Caches: one sequence, bfloat16, 1 GB = 1e9 bytes. Decode bytes: cache read per "
        "new token, dense over MSA."
    )
    return f"{page.table(head, body)}{page.note(note)}{_grid(cost_figures(config).values())}"


def _manifest(runs: Sequence[Run]) -> str:
    facts = [
        {"folder": run.path.name, "starts and resumes": str(run.starts)}
        | _flatten({name: value for name, value in run.manifest.items() if name != "config"})
        for run in runs
    ]
    configs = [_flatten(run.manifest["config"]) for run in runs]
    names = dict.fromkeys(name for config in configs for name in config)
    differing = [name for name in names if len({config.get(name) for config in configs}) > 1]
    note = ""
    if len(runs) > 1:
        where = ", ".join(differing) or "nothing"
        note = f"<p>The configurations differ in: {page.text(where)}.</p>"
    labels = [run.label for run in runs]
    return f"{note}{_facts(labels, facts)}{page.details('Configuration', _facts(labels, configs))}"


def _grid(found: Iterable[CaptionedFigure]) -> str:
    return page.grid([page.figure(*figure) for figure in found])


def _facts(labels: Sequence[str], columns: Sequence[Mapping[str, str]]) -> str:
    names = dict.fromkeys(name for column in columns for name in column)
    rows = [[name, *(column.get(name, "") for column in columns)] for name in names]
    return page.table(["", *labels], rows, style="facts")


def _flatten(values: Mapping[str, object], prefix: str = "") -> dict[str, str]:
    flat = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{prefix}{name}.")
        elif isinstance(value, (list, tuple)):
            flat[f"{prefix}{name}"] = " ".join(map(str, value))
        else:
            flat[f"{prefix}{name}"] = "" if value is None else str(value)
    return flat


def _training(run: Run) -> cost.TrainingFlopsPerToken:
    return cost.training_flops_per_token(run.config, run.config.data.sequence_length)


def _count(value: float) -> str:
    return f"{value:,.0f}"
