"""What a report shows of finished runs: named figures with captions, see `msa_jax.eval.figures`."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from msa_jax import cost
from msa_jax.config import ArchitectureConfig
from msa_jax.eval import figures
from msa_jax.eval.runs import Run, reporting_layers, series

RECALLS = {"score_recall": "score recall", "block_recall": "block recall"}


class CaptionedFigure(NamedTuple):
    """An SVG string, and in words what one sees and how it was computed."""

    svg: str
    caption: str


Figures = dict[str, CaptionedFigure]


def all_figures(runs: Sequence[Run], cost_config: ArchitectureConfig) -> Figures:
    """Every figure of the report by name; the names serve as file names."""
    found = training_figures(runs) | evaluation_figures(runs) | cost_figures(cost_config)
    for run in runs:
        for layer, figure in selection_figures(run).items():
            found[f"selection_{run.label}_layer_{layer}"] = figure
    names = str.maketrans("/ ", "__")
    return {name.lower().translate(names): figure for name, figure in found.items()}


def training_figures(runs: Sequence[Run]) -> Figures:
    """Losses of all runs, the gap to the last one, and the recall and KL of those that select."""
    curves = {
        run.label: figures.LossCurve(*series(run.train, "loss"), *series(run.validation, "loss"))
        for run in runs
    }
    found = {
        "loss": CaptionedFigure(
            figures.loss_curves(curves),
            "Next-token loss over training: every logged training batch (thin line) and the mean "
            "over the validation batches (markers).",
        )
    }
    last = runs[-1].label
    reference = curves[last]
    for run in runs[:-1]:
        curve = curves[run.label]
        steps, mine, theirs = np.intersect1d(
            curve.validation_steps, reference.validation_steps, return_indices=True
        )
        if len(steps):
            base = reference.validation_loss[theirs]
            percent = 100 * (curve.validation_loss[mine] - base) / base
            found[f"loss_gap_{run.label}"] = CaptionedFigure(
                figures.loss_gap(steps, percent, run.label, last),
                f"Validation loss of {run.label} relative to {last} at the same step; below zero "
                "is better.",
            )
    for run in runs:
        found |= _recall_and_kl_figures(run)
    return found


def _recall_and_kl_figures(run: Run) -> Figures:
    found = {}
    recalls = {name: series(run.validation, name) for name in RECALLS}
    recalls = {name: pair for name, pair in recalls.items() if len(pair[0])}
    if recalls:
        steps = {name: pair[0] for name, pair in recalls.items()}
        values = {name: pair[1] for name, pair in recalls.items()}
        found[f"recall_{run.label}"] = CaptionedFigure(
            figures.recall(steps, values, RECALLS),
            f"{run.label}: how much of the main branch's own choice is selected, on validation "
            f"text. Of the {run.config.attention.top_k} blocks with the most attention mass, score "
            "recall is the share of the mass that was selected, block recall the share of the "
            "blocks. Line: mean over layers; band: from the lowest to the highest layer.",
        )
    steps, values = series(run.train, "index_kl")
    if len(steps):
        layers = reporting_layers(run.config, values.shape[1], run.path / "metrics.jsonl")
        warmup = run.config.objective.index_warmup_steps
        phases = (
            f"In the first {warmup:,} steps (dotted line) attention is dense and the KL covers "
            "every visible token; after them it covers the selected tokens."
            if warmup
            else "It covers the selected tokens."
        )
        found[f"kl_{run.label}"] = CaptionedFigure(
            figures.kl_per_layer(steps, values, layers, warmup),
            f"{run.label}: KL(main branch || index branch) of each layer on training batches. "
            + phases,
        )
    return found


def selection_figures(run: Run) -> dict[int, CaptionedFigure]:
    """The selection of up to four of the run's layers, by layer number; empty without one."""
    selection = run.selection
    if selection is None:
        return {}
    found = {}
    for index in figures.spread(len(selection.layers), 4):
        layer = int(selection.layers[index])
        found[layer] = CaptionedFigure(
            figures.selected_blocks(
                selection.block_ids[index], selection.segment_ids, selection.block_size
            ),
            f"Layer {layer}: the blocks that each KV group keeps for each query of the text.",
        )
    return found


def evaluation_figures(runs: Sequence[Run]) -> Figures:
    """Loss by position of all runs, and the expert load of those with experts."""
    found = {
        "loss_by_position": CaptionedFigure(
            figures.loss_by_position(
                {run.label: np.array(run.evaluation.position_edges) for run in runs},
                {run.label: np.array(run.evaluation.loss_by_position, float) for run in runs},
            ),
            "Mean loss of the validation tokens by their position in their document; a marker is "
            "the middle of a bucket. A model that makes use of its context falls to the right.",
        )
    }
    routed = [run for run in runs if run.evaluation.expert_load]
    if routed:
        found["expert_load"] = CaptionedFigure(
            figures.expert_load(
                {run.label: np.array(run.evaluation.expert_load, float) for run in routed},
                {run.label: _expert_layers(run.config) for run in routed},
            ),
            "Validation tokens that each routed expert received, relative to an even split of its "
            "layer: 1 is even, 0 an expert that nothing was sent to.",
        )
    return found


def cost_figures(config: ArchitectureConfig) -> Figures:
    """Attention FLOPs, and their share of the model's, over the context length."""
    rows = cost.compute_table(config)
    lengths = np.array([row.length for row in rows])

    def line(field: str, scale: float = 1.0) -> np.ndarray:
        return np.array([scale * getattr(row, field) for row in rows])

    flops = {"MSA": line("msa_tflops"), "GQA": line("dense_tflops")}
    shares = {
        "MSA": line("msa_attention_share", 100.0),
        "GQA": line("dense_attention_share", 100.0),
    }
    return {
        "attention_flops": CaptionedFigure(
            figures.by_context(lengths, flops, "attention (TFLOPs)", log=True),
            "Attention of all layers, one forward pass over one document.",
        ),
        "attention_share": CaptionedFigure(
            figures.by_context(lengths, shares, "attention's share of all FLOPs (%)", log=False),
            "The same as a share of the whole model's forward FLOPs: projections, the experts that "
            "a token visits, and the output head are the rest.",
        ),
    }


def _expert_layers(config: ArchitectureConfig) -> list[int]:
    return [layer for layer in range(config.model.num_layers) if config.has_experts(layer)]
