"""Writes what a study knows: `results.csv`, `figures/` and one self-contained `report.html`."""

import dataclasses
import itertools
import pathlib
from collections import Counter
from collections.abc import Sequence

import optuna

from experiments.sweeping import figures
from experiments.sweeping.locks import FileLock
from experiments.sweeping.objectives import TITLES
from experiments.sweeping.points import Space
from experiments.sweeping.results import Row, read_rows, replace_file, to_csv
from msa_jax.eval import page
from msa_jax.eval.figures import standalone
from msa_jax.eval.run_figures import CaptionedFigure, Figures
from msa_jax.train.sweep import Parameter, Sweep


def write_results(study: optuna.Study, space: Space, workdir: pathlib.Path) -> int:
    """Writes the results into the sweep's folder, each file whole at every moment.

    Args:
      study: whose trials are shown, whichever machine they ran on.
      space: the sweep.
      workdir: its folder.

    Returns:
      How many trials are complete.
    """
    # Workers on one disk take turns: none replaces a newer state with an older one.
    with FileLock(workdir / "results.lock") as lock:
        lock.acquire("", wait=True)
        rows = read_rows(study, space.sweep)
        replace_file(workdir / "results.csv", to_csv(rows, space.sweep))
        found = all_figures(rows, space.sweep)
        (workdir / "figures").mkdir(exist_ok=True)
        for name, figure in found.items():
            replace_file(workdir / "figures" / f"{name}.svg", standalone(figure.svg))
        replace_file(workdir / "report.html", render(study.study_name, space, rows, found))
    return sum(row.state == "complete" for row in rows)


def all_figures(rows: Sequence[Row], sweep: Sweep) -> Figures:
    """Every figure by name; the names serve as file names.

    Figures that compare need two trials, a front two objectives, a heat map two parameters.
    """
    complete = [row for row in rows if row.state == "complete"]
    found: Figures = {}
    if len(complete) < 2:
        return found
    if len(sweep.objectives) > 1:
        found["pareto"] = CaptionedFigure(
            figures.pareto(complete, sweep.objectives),
            "Complete trials, two objectives at a time. A trial is on the front when no other is "
            "at least as good in all objectives and better in one; the numbers are trials.",
        )
    varied = _varied(complete, sweep)
    found["parallel_coordinates"] = CaptionedFigure(
        figures.parallel_coordinates(complete, varied, sweep.objectives),
        "A line per complete trial, from its parameters to its objectives; the colour is the first "
        "objective, thick lines are on the Pareto front.",
    )
    return found | _heat_maps(complete, varied, sweep)


def render(name: str, space: Space, rows: Sequence[Row], found: Figures) -> str:
    """The page as a string."""
    sweep = space.sweep
    body = [f"<p>{page.text(_headline(rows, sweep))}</p>"]
    for title, key in (("Pareto front", "pareto"), ("All trials", "parallel_coordinates")):
        if key in found:
            shown = page.figure(*found[key], wide=True)
            table = _front_table(rows, sweep) if key == "pareto" else ""
            body.append(page.section(title, shown + table))
    maps = "".join(
        page.details(
            TITLES[one.name],
            page.grid([page.figure(*found[key]) for key in found if key.startswith(one.name)]),
            opened=one is sweep.objectives[0],
        )
        for one in sweep.objectives
        if any(key.startswith(one.name) for key in found)
    )
    if maps:
        remark = page.note("Means over the complete trials of each pair of values.")
        body.append(page.section("Pairs of parameters", remark + maps))
    body.append(page.section("Every trial", _trial_table(rows, sweep)))
    if any(row.error for row in rows):
        body.append(page.section("Failed and left out", _reasons(rows)))
    body.append(page.section("The sweep", _definition(space)))
    return page.document(f"Sweep {name}", "".join(body))


def _heat_maps(complete: Sequence[Row], varied: Sequence[Parameter], sweep: Sweep) -> Figures:
    found: Figures = {}
    for objective in sweep.objectives:
        values = [row.values[objective.name] for row in complete]
        limits = (min(values), max(values))
        # The first parameter of the sweep lies along the vertical axis, as in a table.
        for y, x in itertools.combinations(varied, 2):
            name = f"{objective.name}_{y.field}_{x.field}".replace(".", "_")
            caption = f"Mean {TITLES[objective.name]} by {y.field} and {x.field}."
            svg = figures.heat_map(complete, x, y, objective, limits)
            found[name] = CaptionedFigure(svg, caption)
    return found


def _varied(complete: Sequence[Row], sweep: Sweep) -> list[Parameter]:
    """The parameters of which there is more than one value to see."""
    return [
        parameter
        for parameter in sweep.parameters
        if len({row.parameters[parameter.field] for row in complete}) > 1
    ]


def _headline(rows: Sequence[Row], sweep: Sweep) -> str:
    states = Counter(row.state for row in rows)
    counts = [f"{count} {state}" for state, count in sorted(states.items())]
    text = f"{sweep.total_trials} trials planned: {', '.join(counts) or 'none begun'}."
    complete = [row for row in rows if row.values]
    for objective in sweep.objectives if complete else ():
        choose = min if objective.direction == "minimize" else max
        best = choose(complete, key=lambda row: row.values[objective.name])
        shown = figures.short_number(best.values[objective.name])
        text += f" Best {TITLES[objective.name]}: {shown}, by trial {best.number}."
    hours = sum(row.seconds for row in rows) / 3600
    return f"{text} Training took {hours:.2f} hours in all."


def _front_table(rows: Sequence[Row], sweep: Sweep) -> str:
    first = sweep.objectives[0]
    front = [row for row in rows if row.on_front and row.same_as is None]
    front.sort(key=lambda row: row.values[first.name], reverse=first.direction == "maximize")
    head = ["trial", *_head(sweep)]
    return page.table(head, [[str(row.number), *_cells(row, sweep)] for row in front])


def _trial_table(rows: Sequence[Row], sweep: Sweep) -> str:
    head = ["trial", "state", *_head(sweep), "seconds", "same as"]
    body = []
    for row in rows:
        same = "" if row.same_as is None else f"trial {row.same_as}"
        end = [f"{row.seconds:.0f}" if row.seconds else "", same]
        body.append([str(row.number), row.state, *_cells(row, sweep), *end])
    return page.table(head, body)


def _reasons(rows: Sequence[Row]) -> str:
    """Why trials failed or were left out, those of one reason together."""
    reasons: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        if row.error:
            reasons.setdefault((row.state, row.error), []).append(str(row.number))
    body = [[state, ", ".join(numbers), why] for (state, why), numbers in reasons.items()]
    return page.table(["", "trials", "why"], body, style="facts")


def _head(sweep: Sweep) -> list[str]:
    """Parameters and objectives; long fields may be broken after their section."""
    fields = [parameter.field for parameter in sweep.parameters]
    names = [field.replace(".", ".\N{ZERO WIDTH SPACE}") for field in fields]
    return names + [TITLES[one.name] for one in sweep.objectives]


def _cells(row: Row, sweep: Sweep) -> list[str]:
    parameters = [row.parameters.get(parameter.field, "") for parameter in sweep.parameters]
    shown = [f"{value:.4g}" if isinstance(value, float) else str(value) for value in parameters]
    values = [row.values.get(one.name) for one in sweep.objectives]
    return shown + ["" if value is None else figures.short_number(value) for value in values]


def _definition(space: Space) -> str:
    sweep = space.sweep
    facts = [
        ["base config", sweep.config],
        ["changed in every trial", " ".join(space.fixed)],
        ["sampler", f"{sweep.sampler}, seed {sweep.seed}"],
        ["objectives", ", ".join(f"{one.direction} {one.name}" for one in sweep.objectives)],
    ]
    for parameter in sweep.parameters:
        values = dataclasses.asdict(parameter)
        values.pop("field")
        shown = ", ".join(f"{key} {value}" for key, value in values.items())
        facts.append([parameter.field, shown])
    facts += [["left out", condition.reason] for condition in sweep.conditions]
    return page.table(["", ""], facts, style="facts")
