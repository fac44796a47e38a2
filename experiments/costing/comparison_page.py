"""The Markdown page of `experiments.economics --shapes`."""

from collections.abc import Mapping, Sequence

from experiments.costing import comparison, words
from experiments.costing.comparison import Model
from experiments.costing.costs import CostRow, Setting, cost_rows
from experiments.costing.files import as_csv, as_json
from experiments.costing.page import cost_curves
from msa_jax.eval import figures
from msa_jax.eval.tables import Table, markdown


def files(
    found: Mapping[str, Model],
    worst: Mapping[str, Model],
    paper: str,
    lengths: Sequence[int],
    setting: Setting,
    check: Table,
    command: str,
) -> dict[str, str]:
    """The files by name.

    Args:
      found: the models by name.
      worst: the same at the rates of random selections.
      paper: the name of the model whose dollars are shown.
      lengths: tokens, for those.
      setting: what the numbers depend on.
      check: of `comparison.measured_steps`.
      command: what makes them.
    """
    rows = cost_rows(found[paper].config, lengths, setting)
    plain = [{"model": name} | row.flat() for name, model in found.items() for row in model.rows]
    evens = {name: model.evens for name, model in found.items()}
    return {
        "economics.md": _markdown(found, worst, paper, rows, setting, check, command),
        "economics.svg": figures.standalone(cost_curves(rows, setting)),
        "economics.csv": as_csv(plain),
        "economics.json": as_json(plain, evens, setting, command),
    }


def _markdown(
    found: Mapping[str, Model],
    worst: Mapping[str, Model],
    paper: str,
    paper_rows: list[CostRow],
    setting: Setting,
    check: Table,
    command: str,
) -> str:
    config = found[paper].config
    gpu = setting.machine.gpu.name + ("" if setting.own else " (estimated)")
    return f"""\
# What long context costs

Written by `{command}`. One model's numbers, with a page of its own:
`python -m experiments.economics --config=configs/msa_109b.py --output=runs/economics`.

The usual estimate of attention's share of all compute, and of what sparse attention saves of it, is
one line of numbers for all models. Here it is held against several, by counted FLOPs and by time on
{gpu}. Bold is within the estimate. "Dense" is the same model with dense attention.

## For which models does the estimate hold?

{comparison.conclusion(found, setting, config)}

### By FLOPs of a forward pass

{markdown(comparison.by_flops(found))}

### By prefill time{words.estimated(setting) or " at measured kernel rates"}

{markdown(comparison.by_time(found))}

A negative saving is a loss: at short context selection costs more than it spares. The Llama models
are their published dimensions with MSA's selection in place of dense attention, and a backward pass
that computes each layer again (`model.remat="full"`); no such model was trained.

The rates are of one shape of layer. That they hold for others is an assumption:

{_others(found, setting)}

## From which context length on is MSA cheaper{words.estimated(setting)}?

Below these lengths, in tokens, MSA costs more than dense attention. With * the length lies below
what was measured, and rests on the rates of the shortest measured length. Times are of
{setting.measured.selection} selections; the last columns are of random ones, in which neighbouring
queries share least.

{markdown(comparison.break_even_table(found, worst))}

## What {paper} costs{words.estimated(setting)}

{words.dollars(setting)}; with * beyond the lengths that kernels were measured at.

{markdown(words.dollar_table(paper_rows))}

![Cost of prefill and decode against length](economics.svg)

{markdown(words.memory_table(paper_rows, setting))}

## Does the cost model agree with a run?

Training steps of `configs/h100_350m.py` (65,536 tokens, rows of 32K) on one H100, from
[350M parameters on an H100](benchmarks/h100_350m.md), beside what the cost model says of them. The
share of the matmul peak was set by the dense step, so that only the MSA step is a prediction.

{markdown(check)}

## What goes in

{words.bullets(words.assumptions(setting))}
"""


def _others(found: Mapping[str, Model], setting: Setting) -> str:
    """The models whose layers are unlike the measured one."""
    unlike = {
        name: words.unlike_the_measured(model.config.attention, setting)
        for name, model in found.items()
    }
    return words.bullets([f"{name} has {text}." for name, text in unlike.items() if text])
