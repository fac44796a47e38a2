"""The training loop: data in, checkpoints and metrics out, nothing lost on the way.

A run lives in its work directory:

| file | content |
|---|---|
| `manifest.json` | every start: config, versions, git commit, devices |
| `metrics.jsonl`, `tensorboard/` | training and validation records |
| `checkpoints/` | the newest states; started again, the run goes on from the last one |
| `nan_step_N/` | after a step that was not finite: the state before it, its batch, a message |
| `profile/` | the profiler window |

Steps count from 1: a record or a checkpoint of step N is of N finished optimizer steps. A step is
started before the metrics of the last one are read, so that the devices do not wait for the host.
"""

import contextlib
import dataclasses
import math
import os
import pathlib
import shutil
import signal
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from msa_jax.config import require
from msa_jax.cost import Phase
from msa_jax.data.packing import Batch, cut_rows, validate_batch
from msa_jax.data.pipeline import TrainIterator, train_iterator, validation_batches, vocab_size
from msa_jax.model import require_vocabulary
from msa_jax.sharding import RULES, axis_names, make_mesh, place_batch
from msa_jax.train.checkpoint import Checkpointer
from msa_jax.train.clock import StepClock
from msa_jax.train.config import ExperimentConfig
from msa_jax.train.evaluation import Record, make_evaluator
from msa_jax.train.initialize import initialize_from
from msa_jax.train.interrupt import Interruption
from msa_jax.train.manifest import write_manifest
from msa_jax.train.metrics import MetricWriter
from msa_jax.train.profiler import ProfilerWindow
from msa_jax.train.progress import NoProgress, Progress
from msa_jax.train.state import TrainState, abstract_state, create_state
from msa_jax.train.step import Metrics, make_train_step

type Evaluate = Callable[[TrainState, Phase], Record]


class NonFiniteError(FloatingPointError):
    """A step whose loss or gradient is NaN or infinite; the message says where its state is."""


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """How a call of `train` ended.

    Attributes:
      state: the last one, which is also saved.
      step: optimizer steps finished.
      interrupted: the signal that ended it early, None when all steps are done.
    """

    state: TrainState
    step: int
    interrupted: signal.Signals | None


def train(
    config: ExperimentConfig,
    workdir: str | os.PathLike[str],
    *,
    progress: Progress | None = None,
    devices: Sequence[jax.Device] | None = None,
) -> TrainResult:
    """Trains up to `config.train.steps`, from the latest checkpoint in `workdir` if it has one.

    A run that was interrupted and started again computes, to the bit, what it would have computed
    in one go. SIGTERM and SIGINT end it after the running step, with a checkpoint.

    Args:
      config: the run.
      workdir: its directory; made if absent.
      progress: is told of every step and event; the caller enters and leaves it.
      devices: to make the mesh of, by default all.

    Raises:
      ConfigError: the config does not fit the corpus, the tokenizer or the devices.
      CheckpointError: a checkpoint is of another architecture or other data.
      NonFiniteError: loss or gradient became NaN or infinite.
    """
    workdir, progress = pathlib.Path(workdir), progress or NoProgress()
    mesh = make_mesh(dataclasses.asdict(config.mesh), None if devices is None else list(devices))
    _check_batch_size(config, mesh)
    require_vocabulary(config, vocab_size(config.data))
    data = train_iterator(
        config.data,
        block_size=config.attention.block_size,
        prefetch=config.train.prefetch_batches,
    )
    with (
        contextlib.closing(data),
        jax.set_mesh(mesh),
        jax.debug_nans(config.train.debug_nans or jax.config.jax_debug_nans),
        Checkpointer(workdir, keep=config.train.keep_checkpoints) as checkpointer,
    ):
        start = checkpointer.latest_step()
        if start is not None:
            restored = checkpointer.restore(abstract_state(config, mesh), config)
            state = restored.state
            data.set_state(restored.data_state)
            progress.message(f"resuming {workdir} after step {start}")
        else:
            state = create_state(config, mesh)
            if config.train.init_from:
                state = initialize_from(config.train.init_from, state, config, mesh)
                progress.message(f"starting from the parameters in {config.train.init_from}")
        write_manifest(workdir, config, resumed_from_step=start)
        with (
            MetricWriter(workdir, resume_step=start or 0) as writer,
            ProfilerWindow(config.train, workdir) as profiler,
            Interruption() as interruption,
        ):
            clock = StepClock(config, list(mesh.devices.flat))
            run = _Run(config, workdir, mesh, checkpointer, writer, profiler, progress, clock)
            return run.steps(state, data, start or 0, interruption)


@dataclasses.dataclass(frozen=True)
class _Run:
    """What all steps of a run have in common."""

    config: ExperimentConfig
    workdir: pathlib.Path
    mesh: jax.sharding.Mesh
    checkpointer: Checkpointer
    writer: MetricWriter
    profiler: ProfilerWindow
    progress: Progress
    clock: StepClock

    def steps(
        self, state: TrainState, data: TrainIterator, start: int, interruption: Interruption
    ) -> TrainResult:
        """Runs the steps after `start`."""
        config, last = self.config, self.config.train.steps
        if start >= last:
            self.progress.message(f"nothing to do: train.steps={last} are done")
            return TrainResult(state, start, None)
        train_step, evaluate = make_train_step(config), self._make_evaluator()
        position, batch = data.get_state(), next(data)
        validate_batch(batch, config.attention.block_size)  # what no compiled step could notice
        go = jax.device_put(True, NamedSharding(self.mesh, PartitionSpec()))
        running: _Step | None = None
        for step in range(start + 1, last + 1):
            phase, length = phase_of(config, step), length_of(config, step)
            if running and (self.profiler.turns_before(step) or running.program != (phase, length)):
                self._finish(running, state)
                running = None
            self.profiler.before_step(step)
            self.clock.begin_step()
            placed = place_batch(cut_rows(batch, length), self.mesh)
            proceed = running.metrics["finite"] if running else go
            state, metrics = train_step(state, placed, phase, proceed)
            before, running = running, _Step(step, (phase, length), batch, position, metrics)
            with self.clock.measure("data"):  # while the devices work
                position, batch = data.get_state(), next(data)
            if before:
                self._finish(before, state)
            evaluates = _due(step, config.train.eval_every, last)
            saves = _due(step, config.train.checkpoint_every, last) or interruption.signal
            if evaluates or saves:
                self._finish(running, state)
                running = None
            if evaluates:
                self._evaluate(evaluate, step, state, phase)
            if saves:
                with self.clock.measure("checkpoint"):
                    self.checkpointer.save(step, state, position, config)
                if interruption.signal and step < last:
                    self.progress.message(f"{interruption.signal.name}: saved step {step}")
                    return TrainResult(state, step, interruption.signal)
        return TrainResult(state, last, None)

    def _finish(self, done: "_Step", state: TrainState) -> None:
        """Waits for a step, and writes down what it says.

        Args:
          done: the step; the one after it may run already.
          state: behind all steps that were started.

        Raises:
          NonFiniteError: it was not finite. What was started after it has changed nothing.
        """
        step, (phase, length) = done.step, done.program
        values = jax.device_get(done.metrics)
        if not values.pop("finite"):
            self.writer.write(step, "train", values)
            raise NonFiniteError(self._dump(done, state, values))
        rate = self.clock.add_step(phase, length, int(values["tokens"]))
        self.progress.update(step, phase=phase, loss=float(values["loss"]), rate=rate)
        if _due(step, self.config.train.log_every, self.config.train.steps):
            values |= {"sparse": int(phase == "sparse"), **self.clock.take(phase, length)}
            self.writer.write(step, "train", values)

    def _evaluate(self, evaluate: Evaluate, step: int, state: TrainState, phase: Phase) -> None:
        with self.clock.measure("evaluation"):
            record = evaluate(state, phase)
        self.writer.write(step, "validation", record)
        self.progress.message(f"step {step}: validation loss {record['loss']:.4f}")

    def _make_evaluator(self) -> Evaluate:
        data = self.config.data
        block_size, count = self.config.attention.block_size, self.config.train.eval_batches
        batches = list(validation_batches(data, block_size=block_size, num_batches=count))
        mend = "leaves no validation batch: raise it, or give more files"
        require(bool(batches), "data.validation_fraction", data.validation_fraction, mend)
        return make_evaluator(self.config, batches, self.mesh)

    def _dump(self, failed: "_Step", state: TrainState, values: Mapping[str, np.ndarray]) -> str:
        """Writes what a step that was not finite started from; returns what there is to say.

        The directory is a work directory of its own: training in it repeats the step.
        """
        directory = self.workdir / f"nan_step_{failed.step}"
        shutil.rmtree(directory, ignore_errors=True)
        started = int(state.step) - failed.step + 1
        before = dataclasses.replace(state, step=state.step - started)
        with Checkpointer(directory) as checkpointer:
            checkpointer.save(failed.step - 1, before, failed.position, self.config)
        np.savez(directory / "batch.npz", allow_pickle=False, **failed.batch)
        culprits = [name for name, value in values.items() if not np.isfinite(value).all()]
        message = (
            f"step {failed.step} ({failed.program[0]}) is not finite: loss "
            f"{values['loss']:.6g}, gradient norm "
            f"{values['gradient_norm']:.6g}, learning rate {values['learning_rate']:.3g}; NaN or "
            f"infinite: {', '.join(culprits)}. {directory} has the state before it and its batch; "
            f"to stop in the operation that fails, repeat the command with --workdir={directory} "
            "--config.train.debug_nans --config.model.scan_layers=false"
        )
        (directory / "message.txt").write_text(f"{message}\n")
        return message


class _Step(NamedTuple):
    """A step that the devices were given.

    Attributes:
      step: its number.
      program: its phase and its tokens per row, which are all that compiled steps differ in.
      batch: as it came, in rows of full length.
      position: of the data before the batch.
      metrics: on the devices, ready when the step is.
    """

    step: int
    program: tuple[Phase, int]
    batch: Batch
    position: Mapping[str, Any]
    metrics: Metrics


def phase_of(config: ExperimentConfig, step: int) -> Phase:
    """The `Mode.phase` of a step, counted from 1; a model without MSA has only one."""
    layers = range(config.model.num_layers)
    sparse = any(config.attention_of(layer).kind == "msa" for layer in layers)
    return "warmup" if sparse and step <= config.objective.index_warmup_steps else "sparse"


def length_of(config: ExperimentConfig, step: int) -> int:
    """Tokens in a row of a step, counted from 1."""
    data = config.data
    return data.warmup_length if step <= data.length_warmup_steps else data.sequence_length


def _due(step: int, every: int, last: int) -> bool:
    """Whether something that happens every so many steps, and after the last one, does now."""
    return step == last or (every > 0 and step % every == 0)


def _check_batch_size(config: ExperimentConfig, mesh: jax.sharding.Mesh) -> None:
    axes = RULES.spec("batch", mesh_axes=mesh.axis_names)[0]
    parts = math.prod(mesh.shape[axis] for axis in axis_names(axes))
    parts *= config.optimizer.accumulation_steps
    require(
        config.data.batch_size % parts == 0,
        "data.batch_size",
        config.data.batch_size,
        f"must be a multiple of {parts}: every micro-batch splits over the mesh axes data, fsdp "
        "and expert",
    )
