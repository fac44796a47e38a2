"""Workers on one study: nothing is lost, nothing is run twice. The trainings are a script."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import threading

import pytest
import sweep_cases
from optuna.trial import TrialState, create_trial
from sweep_cases import (
    ROOT,
    make_sweep,
    open_worker,
    signal_when,
    space_of,
    starts,
    wait_for,
)

from experiments import cli
from experiments.sweeping.leases import MAX_LOST
from experiments.sweeping.storage import open_storage, open_study
from experiments.sweeping.training import trial_folder
from msa_jax.train.config import ExperimentConfig
from msa_jax.train.sweep import Choice, Condition, FloatRange, IntRange

STORAGES = ["sqlite", "journal"]
GRID = 12
FEW = make_sweep(trials=3)  # of the grid's points
SPACE = space_of(make_sweep())


def url_of(kind, folder):
    return f"journal:{folder}/shared/study.log" if kind == "journal" else None


def states(study):
    return [trial.state.name for trial in study.get_trials()]


def trial_values(study):
    return {trial.number: trial.values for trial in study.get_trials()}


@pytest.mark.parametrize("kind", STORAGES)
def test_two_workers_share_the_points_and_run_none_twice(tmp_path, kind):
    """Each with a storage of its own, as two processes have."""
    hold = tmp_path / "hold"
    hold.touch()
    both = [open_worker(tmp_path, url=url_of(kind, tmp_path), jobs=2) for _ in range(2)]
    threads = [threading.Thread(target=worker.run) for worker, _ in both]
    for thread in threads:
        thread.start()
    wait_for(lambda: len(list(tmp_path.glob("trials/*/ready"))) == 4)
    hold.unlink()
    for thread in threads:
        thread.join()
    # Both may ask for the last point; what the slower one is given then is none of the sweep's.
    trials, surplus = (both[0][1].get_trials()[part] for part in (slice(GRID), slice(GRID, None)))
    assert [trial.state for trial in trials] == [TrialState.COMPLETE] * GRID
    assert len({json.dumps(trial.params) for trial in trials}) == GRID
    assert starts(tmp_path) == {number: ["False"] for number in range(GRID)}
    assert len({trial.user_attrs["lease"]["owner"] for trial in trials}) == 2
    assert {trial.state for trial in surplus} <= {TrialState.WAITING}


def test_a_worker_too_late_for_the_last_point_leaves_it(tmp_path, monkeypatch):
    """It saw a point left, and another worker was faster; the sweep ends, and can grow."""
    (early, study), (late, _) = (open_worker(tmp_path, FEW) for _ in range(2))
    before = late._trials()
    early.run()
    with monkeypatch.context() as patch:
        patch.setattr(late, "_trials", lambda: before)
        assert not late._begin_next()
    assert states(study) == ["COMPLETE"] * 3 + ["WAITING"]
    assert late.run() == 0
    assert states(study) == ["COMPLETE"] * 3 + ["WAITING"]
    assert open_worker(tmp_path, make_sweep(trials=5))[0].run() == 0
    assert states(study) == ["COMPLETE"] * 5
    assert starts(tmp_path) == {number: ["False"] for number in range(5)}


@pytest.mark.parametrize("kind", STORAGES)
def test_a_waiting_trial_is_claimed_once(tmp_path, kind):
    """SQLite locks no rows, so that only its write lock keeps two workers from one trial."""

    def join_study():
        return open_study(open_storage(url_of(kind, tmp_path), tmp_path), SPACE, "study")

    def claim():
        study = join_study()
        together.wait()
        while (trial := study.ask()).number < waiting:
            claimed.append(trial.number)

    waiting, together, claimed = 20, threading.Barrier(4), []
    study = join_study()
    for _ in range(waiting):
        study.add_trial(create_trial(state=TrialState.WAITING))
    threads = [threading.Thread(target=claim) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(claimed) == list(range(waiting))


def test_finished_trials_are_never_run_again_and_more_can_follow(tmp_path):
    open_worker(tmp_path, FEW)[0].run()
    worker, study = open_worker(tmp_path, FEW)
    before = trial_values(study)
    assert worker.run() == 0
    assert trial_values(study) == before
    assert open_worker(tmp_path, make_sweep(trials=4))[0].run() == 0
    assert {**trial_values(study), **before} == trial_values(study)
    assert starts(tmp_path) == {number: ["False"] for number in range(4)}


@pytest.mark.parametrize(
    ("kind", "number"), [("sqlite", signal.SIGINT), ("journal", signal.SIGTERM)]
)
def test_a_signal_keeps_the_trial_and_the_next_start_goes_on_with_it(tmp_path, kind, number):
    hold, url = tmp_path / "hold", url_of(kind, tmp_path)
    worker, study = open_worker(tmp_path, FEW, url=url)
    hold.touch()
    with signal_when((trial_folder(tmp_path, 0) / "ready").exists, number):
        assert worker.run() == 128 + number
    assert states(study) == ["WAITING"]
    hold.unlink()
    worker, study = open_worker(tmp_path, FEW, url=url)
    assert worker.run() == 0
    assert states(study) == ["COMPLETE"] * 3
    assert starts(tmp_path) == {0: ["False", "True"], 1: ["False"], 2: ["False"]}


KILLED = """
import pathlib, sys
sys.path[:0] = sys.argv[1:3]
import sweep_cases
sweep_cases.open_worker(pathlib.Path(sys.argv[3]))[0].run()
"""


def test_a_killed_worker_loses_no_trial(tmp_path):
    """Its training goes on alone; the next worker waits for it instead of running beside it."""
    hold = tmp_path / "hold"
    hold.touch()
    arguments = [str(ROOT), str(pathlib.Path(__file__).parent), str(tmp_path)]
    process = subprocess.Popen([sys.executable, "-c", KILLED, *arguments])
    ready = trial_folder(tmp_path, 0) / "ready"
    wait_for(ready.exists)
    process.kill()
    process.wait()
    orphan = int((trial_folder(tmp_path, 0) / "starts.txt").read_text().split()[0])
    worker, study = open_worker(tmp_path, make_sweep(trials=2), stale_after=0.3, jobs=2)
    assert states(study) == ["RUNNING"]
    thread = threading.Thread(target=worker.run)
    thread.start()
    # The lease has run out and the new worker has the trial, but the old training has the folder.
    wait_for(lambda: study.get_trials()[0].user_attrs.get("lost") == 1)
    wait_for(lambda: (trial_folder(tmp_path, 1) / "ready").exists())
    assert starts(tmp_path)[0] == ["False"]
    os.kill(orphan, signal.SIGTERM)
    wait_for(lambda: len(starts(tmp_path)[0]) == 2)
    hold.unlink()
    thread.join()
    assert states(study) == ["COMPLETE"] * 2
    assert starts(tmp_path) == {0: ["False", "True"], 1: ["False"]}


@pytest.mark.parametrize("kind", STORAGES)
def test_a_worker_that_died_on_this_machine_is_noticed_at_once(tmp_path, kind):
    options = {"url": url_of(kind, tmp_path), "stale_after": 1e6}
    worker, study = open_worker(tmp_path, FEW, **options)
    lose_a_trial(worker, study, tmp_path)
    open_worker(tmp_path, FEW, **options)[0].run()
    assert states(study) == ["COMPLETE"] * 3
    assert len(starts(tmp_path)[0]) == 2


def lose_a_trial(worker, study, workdir):
    """Leaves what a worker leaves that is killed together with its training."""
    (workdir / "hold").touch()
    assert worker._begin_next()
    one = worker._active.pop()
    wait_for((one.training.folder / "ready").exists)
    one.training.stop(signal.SIGKILL)
    one.training.wait()
    one.training.release()
    (workdir / "hold").unlink()
    assert states(study)[one.trial.number] == "RUNNING"


def test_a_trial_that_takes_its_workers_down_ends_as_failed(tmp_path):
    lost = []
    for _ in range(MAX_LOST):
        worker, study = open_worker(tmp_path, FEW, stale_after=1e6)
        lost += [(trial.state, trial.user_attrs.get("lost")) for trial in study.get_trials()]
        lose_a_trial(worker, study, tmp_path)
    assert lost == [(TrialState.RUNNING, None), (TrialState.RUNNING, 1)]
    open_worker(tmp_path, FEW, stale_after=1e6)[0].run()
    trials = study.get_trials()
    assert [trial.state.name for trial in trials] == ["FAIL", "COMPLETE", "COMPLETE"]
    assert f"lost {MAX_LOST} times" in trials[0].user_attrs["error"]


def test_a_silent_worker_elsewhere_is_given_time(tmp_path):
    worker, study = open_worker(tmp_path, make_sweep(trials=1), stale_after=0.4)
    study.ask()
    lease = {"owner": "another", "host": "another machine", "renewed": 0.0}
    study._storage.set_trial_user_attr(study.get_trials()[0]._trial_id, "lease", lease)
    leases = worker._leases
    assert leases.recover(study.get_trials(), set()) == []
    study._storage.set_trial_user_attr(
        study.get_trials()[0]._trial_id, "lease", lease | {"renewed": 1.0}
    )
    threading.Event().wait(0.5)
    assert leases.recover(study.get_trials(), set()) == []  # it was renewed
    threading.Event().wait(0.5)
    assert leases.recover(study.get_trials(), set()) == [0]
    assert states(study) == ["WAITING"]


def test_a_failed_trial_is_recorded_and_the_sweep_goes_on(tmp_path):
    worker, study = open_worker(tmp_path, make_sweep(trials=6))
    (tmp_path / "fails").touch()
    assert worker.run() == 0
    for trial in study.get_trials():
        if trial.params["attention.top_k"] == 4:
            assert trial.state == TrialState.FAIL
            assert trial.user_attrs["error"] == "exit code 1: step 3 is not finite"
        else:
            assert trial.state == TrialState.COMPLETE


def test_a_training_without_a_score_is_a_failed_trial(tmp_path):
    worker, study = open_worker(tmp_path, FEW, command=(sys.executable, "-S", "-c", ""))
    worker.run()
    assert states(study) == ["FAIL"] * 3
    assert "evaluation.json: no such file" in study.get_trials()[0].user_attrs["error"]


def test_points_that_cannot_work_are_pruned_with_their_reason(tmp_path):
    def too_many(config: ExperimentConfig) -> bool:
        return config.attention.top_k * config.attention.block_size > 100

    parameters = (
        Choice("attention.top_k", (2, 8)),
        Choice("attention.block_size", (8, 16, 24)),
        Choice("objective.kl_weight", (1.0,)),
    )
    condition = Condition("more than 100 tokens", too_many)
    worker, study = open_worker(
        tmp_path, make_sweep(parameters=parameters, conditions=(condition,))
    )
    worker.run()
    found = {
        (trial.params["attention.top_k"], trial.params["attention.block_size"]): trial.user_attrs
        for trial in study.get_trials()
        if trial.state == TrialState.PRUNED
    }
    assert set(found) == {(2, 24), (8, 24), (8, 16)}
    assert found[8, 16]["error"] == "more than 100 tokens"
    assert found[2, 24]["error"].startswith("data.sequence_length=512: must be a multiple")
    assert len(starts(tmp_path)) == 3


@pytest.mark.parametrize("sampler", ["tpe", "nsga2"])
def test_searches_are_repeatable_and_train_no_point_twice(tmp_path, sampler):
    parameters = (
        Choice("attention.top_k", (2, 4)),
        Choice("attention.block_size", (8, 16)),
        Choice("objective.kl_weight", (1.0,)),
    )
    chosen = make_sweep(sampler=sampler, trials=8, parameters=parameters)
    drawn = []
    for name in ("a", "b"):
        worker, study = open_worker(tmp_path / name, chosen)
        worker.run()
        assert states(study) == ["COMPLETE"] * 8
        drawn.append([trial.params for trial in study.get_trials()])
        repeated = [trial for trial in study.get_trials() if "same_as" in trial.user_attrs]
        assert len(starts(tmp_path / name)) == 8 - len(repeated)
        assert len(repeated) >= 8 - 4  # 8 draws of 4 points
        for trial in repeated:
            first = study.get_trials()[trial.user_attrs["same_as"]]
            assert (trial.params, trial.values) == (first.params, first.values)
    assert drawn[0] == drawn[1]


def test_ranges_are_drawn_inside_their_bounds(tmp_path):
    parameters = (
        IntRange("attention.top_k", 2, 6, step=2),
        Choice("attention.block_size", (8,)),
        FloatRange("objective.kl_weight", 0.01, 10.0, log=True),
    )
    worker, study = open_worker(
        tmp_path, make_sweep(sampler="random", trials=12, parameters=parameters), jobs=4
    )
    worker.run()
    drawn = [trial.params for trial in study.get_trials()]
    assert {point["attention.top_k"] for point in drawn} == {2, 4, 6}
    weights = sorted(point["objective.kl_weight"] for point in drawn)
    assert 0.01 <= weights[0] < 0.3 < weights[-1] <= 10


def test_two_workers_draw_different_random_points(tmp_path):
    parameters = (FloatRange("objective.kl_weight", 0.1, 1.0), *sweep_cases.PARAMETERS[:2])
    chosen = make_sweep(sampler="tpe", trials=8, parameters=parameters)
    both = [open_worker(tmp_path, chosen) for _ in range(2)]
    for _ in range(4):
        for worker, _ in both:
            worker._begin_next()
    for worker, _ in both:
        worker._stop(signal.SIGTERM)
    drawn = {trial.params["objective.kl_weight"] for trial in both[0][1].get_trials()}
    assert len(drawn) == 8


def test_leftovers_of_another_study_are_not_resumed(tmp_path):
    open_worker(tmp_path, make_sweep(trials=2))[0].run()
    (tmp_path / "study.db").unlink()
    parameters = (*sweep_cases.PARAMETERS[:2], Choice("objective.kl_weight", (0.7, 2.0)))
    worker, study = open_worker(tmp_path, make_sweep(parameters=parameters, trials=2))
    worker.run()
    assert states(study) == ["FAIL", "COMPLETE"]
    assert "holds another trial" in study.get_trials()[0].user_attrs["error"]


def test_another_sweep_does_not_join_the_study(tmp_path):
    open_worker(tmp_path)
    other = make_sweep(parameters=(Choice("attention.top_k", (2, 4)),))
    with pytest.raises(cli.UsageError, match=r"of another sweep .*parameters\.attention\.top_k"):
        open_worker(tmp_path, other)
    with pytest.raises(cli.UsageError, match=r"config\.train\.steps: there 400, here 7"):
        open_worker(tmp_path, make_sweep(overrides={"train.steps": 7}))
    open_worker(tmp_path, make_sweep(trials=3))
