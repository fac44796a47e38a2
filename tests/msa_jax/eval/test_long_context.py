"""Settings, cells and the results file; nothing finished is lost or measured twice."""

import json

import pytest

from msa_jax.config import ConfigError
from msa_jax.eval import long_context_run
from msa_jax.eval.long_context import Cell, LongContextConfig, ResultsFile, parse_cell
from msa_jax.eval.long_context_run import evaluate, plan
from msa_jax.eval.subject import CannotMeasure, Subject

IDENTITY = {"step": 5, "pairs": (4, 8)}


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"tasks": ()}, r"tasks=\(\): name at least one"),
        ({"lengths": (64, 64)}, r"lengths=\(64, 64\): name each only once"),
        ({"lengths": (8,)}, "each must be >= 16"),
        ({"pairs": (0,)}, r"pairs=\(0,\): each must be >= 1"),
        ({"pairs": (53,)}, r"pairs=\(53,\): each must be <= 52"),
        ({"examples": 0}, "examples=0: must be >= 1"),
        ({"tokens": 4096}, "tokens=4096: must be at least the greatest length, 8192"),
        ({"seed": -1}, "seed=-1: must be between"),
    ],
)
def test_settings_that_cannot_work_name_the_field(change, line):
    with pytest.raises(ConfigError, match=line):
        LongContextConfig(**change)


def test_batches_are_equal_and_as_large_as_may_be():
    settings = LongContextConfig(batch_tokens=1000)
    assert settings.batch_size(100, 16) == 8
    assert settings.batch_size(100, 9) == 9
    assert settings.batch_size(100, 11) == 1
    assert settings.batch_size(5000, 16) == 1


def test_cells_are_named_by_what_they_are():
    for cell in (Cell("mqar", "", 64), Cell("perplexity", "a:b/*.h", 128)):
        assert parse_cell(cell.key) == cell
    settings = LongContextConfig(tasks=("perplexity", "mqar"), lengths=(64, 32), texts=("*.h",))
    assert [cell.key for cell in plan(settings)] == [
        "perplexity:validation:32",
        "perplexity:*.h:32",
        "mqar::32",
        "perplexity:validation:64",
        "perplexity:*.h:64",
        "mqar::64",
    ]


class Measured(Subject):
    """Counts what is measured; dies at a cell if told to."""

    def __init__(self, monkeypatch, settings, *, dies_at=None):
        self.settings, self.dies_at, self.keys = settings, dies_at, []
        monkeypatch.setattr(long_context_run, "measure", self)

    def __call__(self, subject, cell):
        assert subject is self
        if cell.key == self.dies_at:
            raise KeyboardInterrupt
        self.keys.append(cell.key)
        if cell.length == 32 and cell.task == "mqar":
            raise CannotMeasure("too short")
        return {"score": len(self.keys)}


def test_a_killed_evaluation_goes_on_where_it_stood(tmp_path, monkeypatch):
    settings = LongContextConfig(tasks=("perplexity", "mqar"), lengths=(32, 64, 128))
    path, told = tmp_path / "new" / "run.json", []

    def run(dies_at=None):
        subject = Measured(monkeypatch, settings, dies_at=dies_at)
        results = ResultsFile.open(path, IDENTITY)
        try:
            evaluate(subject, results, on_cell=lambda cell, values: told.append((cell.key, values)))
        finally:
            assert sorted(path.parent.iterdir()) == [path]
        return subject.keys, results

    with pytest.raises(KeyboardInterrupt):
        run(dies_at="perplexity:validation:128")
    assert json.loads(path.read_text())["cells"].keys() == {
        "perplexity:validation:32",
        "perplexity:validation:64",
        "mqar::64",
    }
    measured, results = run()
    assert measured == ["mqar::32", "perplexity:validation:128", "mqar::128"]
    assert told[1] == ("mqar::32", "too short")
    assert results.cells["perplexity:validation:32"] == {"score": 1}
    assert run()[0] == ["mqar::32"]
    assert [(cell.length, values["score"]) for cell, values in results.of_task("mqar")] == [
        (64, 4),
        (128, 3),
    ]


def test_results_of_something_else_are_refused(tmp_path):
    path = tmp_path / "run.json"
    ResultsFile.open(path, IDENTITY).add(Cell("mqar", "", 64), {"score": 1})
    assert ResultsFile.open(path, IDENTITY).cells == {"mqar::64": {"score": 1}}
    with pytest.raises(ConfigError, match=r"is of another evaluation \(step 5, now 6\): set these"):
        ResultsFile.open(path, IDENTITY | {"step": 6})
    path.write_text(path.read_text()[:20])
    with pytest.raises(ConfigError, match="holds no results; delete it, or take another --output"):
        ResultsFile.open(path, IDENTITY)


def test_variants_stand_in_the_order_of_the_longest(tmp_path):
    results = ResultsFile.open(tmp_path / "run.json", IDENTITY)
    for variant, length in (("b", 32), ("a", 64), ("b", 64)):
        results.add(Cell("ruler", variant, length), {})
    found = [(cell.variant, cell.length) for cell, _ in results.of_task("ruler")]
    assert found == [("a", 64), ("b", 32), ("b", 64)]
