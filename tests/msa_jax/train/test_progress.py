"""Plain lines without a terminal, a bar on one, and no exception lost."""

import io

import pytest
import rich.console

from msa_jax.train.progress import TrainingProgress


def console(terminal: bool) -> rich.console.Console:
    return rich.console.Console(
        file=io.StringIO(), force_terminal=terminal, width=120, legacy_windows=False
    )


def test_without_a_terminal_there_is_a_line_every_few_steps_and_at_the_end():
    output = console(False)
    with TrainingProgress(7, title="msa", plain_every=3, console=output) as progress:
        for step in range(1, 8):
            progress.update(step, phase="sparse", loss=step / 2, rate=1234.5)
    lines = output.file.getvalue().splitlines()
    assert [line.split(", ")[1] for line in lines] == ["step 3/7", "step 6/7", "step 7/7"]
    assert lines[0].startswith("msa: sparse, step 3/7, loss 1.5000, 1,234 tokens/s")
    assert lines[2].endswith(", 0 s left")


def test_a_missing_loss_keeps_the_last_one():
    output = console(False)
    with TrainingProgress(2, plain_every=1, console=output) as progress:
        progress.update(1, phase="warmup", loss=2.0)
        progress.update(2, phase="warmup")
    assert output.file.getvalue().count("loss 2.0000") == 2


def test_a_terminal_shows_phase_step_figures_and_messages():
    output = console(True)
    with TrainingProgress(7, title="msa", console=output) as progress:
        for step in range(1, 8):
            progress.update(step, phase="sparse", loss=0.25, rate=2000.0)
        progress.message("saved [step 7]")
    text = output.file.getvalue()
    for part in ("msa: sparse", "7/7", "loss 0.2500, 2,000 tokens/s", "saved [step 7]"):
        assert part in text


def test_the_time_left_does_not_count_the_steps_of_before_a_resume(monkeypatch):
    clock = iter([100.0, 102.0])
    monkeypatch.setattr("msa_jax.train.progress.time.monotonic", lambda: next(clock))
    output = console(False)
    with TrainingProgress(60, plain_every=1, console=output) as progress:
        progress.update(50, phase="sparse")
        progress.update(51, phase="sparse")
    assert output.file.getvalue().splitlines() == [
        "train: sparse, step 50/60",
        "train: sparse, step 51/60, 18 s left",
    ]


@pytest.mark.parametrize("terminal", [True, False])
def test_exceptions_pass_and_the_cursor_comes_back(terminal):
    def fail():
        with TrainingProgress(3, console=output) as progress:
            progress.update(1, phase="sparse")
            raise KeyError

    output = console(terminal)
    with pytest.raises(KeyError):
        fail()
    assert ("\x1b[?25h" in output.file.getvalue()) == terminal
