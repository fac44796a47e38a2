"""The evaluation of toy runs from the command line: every task, two kinds of model, one page."""

import contextlib
import dataclasses
import io
import itertools
import json
import math
import re

import numpy as np
import pytest
from tiny_runs import save_tiny_run, tiny_config, write_corpus

from experiments import cli, evaluate
from msa_jax.attention.diagnostics import SELECTION_METRICS
from msa_jax.eval.long_context import Cell, LongContextConfig
from msa_jax.eval.long_context_run import measure
from msa_jax.eval.scoring import AnswerScores
from msa_jax.eval.subject import CannotMeasure, load_subject
from msa_jax.eval.texts import VALIDATION

pytestmark = pytest.mark.usefixtures("quick_compilation")

FLAGS = [
    "--lengths=64,128",
    "--tokens=256",
    "--examples=2",
    "--depths=2",
    "--pairs=2,20",
    "--batch_tokens=256",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("evaluate")


@pytest.fixture(scope="module")
def files(folder):
    return write_corpus(folder / "corpus")


@pytest.fixture(scope="module")
def finished(folder, files):
    """A folder with two runs."""
    save_tiny_run(folder / "msa", tiny_config(files))
    save_tiny_run(folder / "gqa", tiny_config(files, "gqa"), steps=(2,))
    return folder


def run(folder, *arguments):
    return cli.run(evaluate.main, ["evaluate", *FLAGS, f"--output={folder}/out", *arguments])


@pytest.fixture(scope="module")
def shown(finished, files):
    """What the evaluation of the MSA run printed: its output and its errors."""
    with (
        contextlib.redirect_stdout(io.StringIO()) as out,
        contextlib.redirect_stderr(io.StringIO()) as err,
    ):
        assert run(finished, f"--checkpoint={finished}/msa", f"--text={files}") == 0
    return out.getvalue(), err.getvalue()


def cells_of(folder, label):
    return json.loads((folder / "out" / f"{label}.json").read_text())["cells"]


def test_every_task_of_an_msa_run(finished, files, shown):
    out, err = shown
    cells = cells_of(finished, "msa")
    assert {key for key in cells if not key.startswith("ruler")} == {
        *(f"perplexity:{text}:{n}" for text in ("validation", files) for n in (64, 128)),
        *(f"selection:{text}:{n}" for text in ("validation", files) for n in (64, 128)),
        "needle:passkey:128",
        *(f"mqar::{n}" for n in (64, 128)),
    }
    assert {key for key in cells if key.startswith("ruler")} == {"ruler:passkey:128"}
    assert "msa: needle passkey, 64 tokens: left out: needs at least 100 tokens" in err
    for name in ("perplexity validation loss", "needle passkey choice", "mqar accuracy"):
        assert name in out
    perplexity = cells["perplexity:validation:128"]
    assert perplexity["tokens"] == 256
    assert math.log(perplexity["perplexity"]) == pytest.approx(perplexity["loss"])
    widths = [b - a for a, b in itertools.pairwise(perplexity["position_edges"])]
    by_position = zip(widths, perplexity["loss_by_position"], strict=True)
    assert sum(w * loss for w, loss in by_position) / 128 == pytest.approx(perplexity["loss"])
    assert perplexity["loss"] != cells["perplexity:validation:64"]["loss"]
    needle = cells["needle:passkey:128"]
    assert needle["depths"] == [0, 1]
    assert all(1 <= rank <= 16 for rank in needle["mean_rank"])
    assert cells["mqar::64"]["accuracy"][1] is None
    assert 0 <= cells["mqar::128"]["choice"][1] <= 1
    selection = cells["selection:validation:128"]
    assert selection["layers"] == [0, 1]
    assert selection["stability_step"] == 1
    assert set(SELECTION_METRICS) <= set(selection)
    assert all(0 < value < 1 for value in selection["stability"])


@pytest.mark.usefixtures("shown")
def test_runs_of_other_kinds_share_the_page_and_repeat_nothing(finished, capsys, monkeypatch):
    before, measured = cells_of(finished, "msa"), []

    def counted(subject, cell):
        measured.append((subject.run.attention.kind, cell.key))
        return measure(subject, cell)

    monkeypatch.setattr("msa_jax.eval.long_context_run.measure", counted)
    runs = [f"--checkpoint={finished}/{label}" for label in ("msa", "gqa")]
    assert run(finished, *runs, "--tasks=perplexity,selection", "--lengths=128") == 0
    assert measured == [("gqa", "perplexity:validation:128"), ("gqa", "selection:validation:128")]
    assert cells_of(finished, "msa") == before
    shown = capsys.readouterr()
    assert "a gqa model selects no blocks" in shown.err
    page = (finished / "out" / "index.html").read_text(encoding="utf-8")
    assert f"page: {finished}/out/index.html" in shown.out
    assert {"msa", "gqa"} <= set(re.findall(r"<h2>(\w+), 2 steps</h2>", page))
    for name in ("loss_by_length", "needle_choice_msa", "ruler_recall_msa", "overlap_msa"):
        assert (finished / "out" / f"{name}.svg").read_text(encoding="utf-8").startswith("<svg")
    assert "http://" not in page.replace("http://www.w3.org", "")


def test_a_run_without_text_of_its_own_is_measured_on_others(folder, files):
    config = tiny_config(files)
    synthetic = dataclasses.replace(config.data, source="retrieval")
    save_tiny_run(folder / "synthetic", dataclasses.replace(config, data=synthetic), steps=(1,))
    subject = load_subject(folder / "synthetic", LongContextConfig(lengths=(64,), tokens=256))
    for task in ("perplexity", "selection"):
        with pytest.raises(CannotMeasure, match="--text=GLOB names a text"):
            measure(subject, Cell(task, VALIDATION, 64))
    assert len(subject.stream(files).tokens) == 257


@pytest.mark.parametrize(("haystack", "word"), [("filler", "forest"), ("validation", "return")])
def test_needles_hide_where_they_are_told_to(haystack, word, finished, monkeypatch):
    asked = []

    def answer(model, prompts, candidates, *, max_new_tokens):
        asked.extend(bytes(row[1:].tolist()).decode() for row in prompts)
        return AnswerScores(np.zeros((len(prompts), 32), int), np.zeros(candidates.shape))

    monkeypatch.setattr("msa_jax.eval.retrieval_scores.score_answers", answer)
    settings = LongContextConfig(lengths=(512,), haystack=haystack, depths=2, examples=4)
    subject = load_subject(finished / "msa", settings)
    measure(subject, Cell("needle", "passkey", 512))
    assert len(asked) == 8
    assert {len(text) for text in asked} == {512 - 32 - 1}
    for other in ("forest", "return"):
        # Behind what fills up the front.
        assert any(other in text[100:] for text in asked) == (other == word)


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ([], "--checkpoint is missing: name the folder of a finished run"),
        (["--checkpoint=nowhere"], "no checkpoint in nowhere"),
        (["--checkpoint={0}/msa", "--step=7"], "no checkpoint of step 7"),
        (
            ["--checkpoint={0}/msa", "--checkpoint={0}/gqa/../msa"],
            "must differ, they name the runs",
        ),
        (["--checkpoint={0}/msa", "--lengths=2X"], "--lengths: '2X' is not a number of tokens"),
        (
            ["--checkpoint={0}/msa", "--tasks=needles"],
            "--tasks='needles': choose one of 'perplexity'",
        ),
        (
            ["--checkpoint={0}/msa", "--haystack=hay"],
            "--haystack=hay: value should be one of <filler|validation>",
        ),
        (
            ["--checkpoint={0}/msa", "--tokens=64"],
            "tokens=64: must be at least the greatest length",
        ),
        (["--checkpoint={0}/msa", "--examples=3"], "is of another evaluation (examples 2, now 3)"),
        (["--checkpoint={0}/msa", "--text={0}/*.none"], "--text={0}/*.none: matches no file"),
    ],
)
def test_a_mistake_is_one_line(arguments, line, finished, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run(finished, *(argument.format(finished) for argument in arguments)) == 2
    error = [text for text in capsys.readouterr().err.splitlines() if " runs as " not in text]
    assert len(error) == 1
    assert line.format(finished) in error[0]
