"""A sweep of 12 points whose trainings are a script of a few lines."""

import contextlib
import pathlib
import signal
import sys
import threading
import time

from experiments import cli
from experiments.sweeping.points import Space, base_arguments, make_space
from experiments.sweeping.storage import open_storage, open_study
from experiments.sweeping.worker import Worker
from msa_jax.train.sweep import Choice, Objective, Sweep

ROOT = pathlib.Path(__file__).parents[2]
OBJECTIVES = (
    Objective("validation_loss", "minimize"),
    Objective("score_recall", "maximize"),
    Objective("attention_flops", "minimize"),
)
PARAMETERS = (
    Choice("attention.top_k", (2, 4, 8)),
    Choice("attention.block_size", (8, 16)),
    Choice("objective.kl_weight", (0.5, 2.0)),
)

# Scores a point by its flags. It ends as `experiments.train` does: with a checkpoint and 128 + N
# after a signal, going on from there when started again. It works while the file `hold` is there.
TRAINING = """
import json, os, pathlib, signal, sys, time
flags = dict(flag[2:].split("=", 1) for flag in sys.argv[1:])
folder = pathlib.Path(flags["workdir"])
sweep = folder.parent.parent
with open(folder / "starts.txt", "a") as starts:
    starts.write(f"{os.getpid()} {(folder / 'checkpoint').exists()}\\n")

def stop(number, frame):
    (folder / "checkpoint").write_text("")
    raise SystemExit(128 + number)

for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, stop)
(folder / "ready").write_text("")
patience = time.monotonic() + 200
while (sweep / "hold").exists() and time.monotonic() < patience:
    time.sleep(0.005)
top_k = int(flags["config.attention.top_k"])
size = int(flags["config.attention.block_size"])
weight = float(flags["config.objective.kl_weight"])
if (sweep / "fails").exists() and top_k == 4:
    print("step 3 is not finite\\n")
    raise SystemExit(1)
(folder / "evaluation.json").write_text(json.dumps({
    "step": 5, "tokens": 100, "loss": 3 - 0.1 * top_k + 0.01 * size + 0.05 * weight,
    "bits_per_byte": 4.0, "position_edges": [0, 16], "loss_by_position": [3.0],
    "layers": {"score_recall": [0.5 + 0.02 * weight, 0.6]}}))
"""


def make_sweep(**changes) -> Sweep:
    options = {"parameters": PARAMETERS, "objectives": OBJECTIVES} | changes
    return Sweep(config=str(ROOT / "configs/quickstart.py"), **options)


def space_of(sweep: Sweep, *arguments: str) -> Space:
    command = ["sweep", *base_arguments(sweep), *arguments]
    return make_space(sweep, cli.parse_with_config(command, lambda values: None)[1])


def open_worker(workdir: pathlib.Path, sweep: Sweep | None = None, url=None, **options):
    """A worker whose trainings are the script, and its study."""
    workdir.mkdir(parents=True, exist_ok=True)
    script = workdir / "training.py"
    script.write_text(TRAINING)
    space = space_of(sweep or make_sweep())
    storage = open_storage(url, workdir)
    study = open_study(storage, space, "study")
    command = (sys.executable, "-S", str(script))
    defaults = {"command": command, "poll_seconds": 0.05, "tell": lambda line: None}
    worker = Worker(study, storage, space, workdir, **defaults | options)
    return worker, study


def starts(workdir: pathlib.Path) -> dict[int, list[str]]:
    """By trial: "False" for every start afresh, "True" for every one from a checkpoint."""
    return {
        int(path.parent.name): [line.split()[1] for line in path.read_text().splitlines()]
        for path in sorted(workdir.glob("trials/*/starts.txt"))
    }


def wait_for(condition, seconds=120.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)


@contextlib.contextmanager
def signal_when(condition, number):
    """Sends this process's main thread a signal as soon as the condition holds."""

    def send():
        wait_for(condition)
        signal.pthread_kill(threading.main_thread().ident, number)

    thread = threading.Thread(target=send)
    thread.start()
    yield
    thread.join()
