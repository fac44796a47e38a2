"""Checkpoints: asynchronous, the newest N kept, never half-written, checked before they are read.

`workdir/checkpoints/<step>/` holds three items: `state` (the arrays, each by its path in the state,
such as "params/embedding"), `data` (where the data iterator stands) and `config`. All of Orbax that
the project uses is in this file.
"""

import dataclasses
import os
import pathlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import jax
import orbax.checkpoint as ocp

from msa_jax.train.config import ExperimentConfig, from_config_dict

ARCHITECTURE_SECTIONS = ("model", "attention", "moe")

# How a model is computed or trained, not what it computes: these may differ from the checkpoint's.
FREE_FIELDS = frozenset(
    {
        "model.compute_dtype",
        "model.scan_layers",
        "model.remat",
        "attention.implementation",
        "attention.linear.chunk_size",
        "attention.mamba2.chunk_size",
        "moe.balance_weight",
        "moe.bias_update_rate",
    }
)


class CheckpointError(ValueError):
    """A checkpoint that is missing or does not fit; the message says which part of it."""


@dataclasses.dataclass(frozen=True)
class Restored:
    """What `Checkpointer.restore` brings back.

    Attributes:
      step: optimizer steps finished when it was saved.
      state: arrays in the structure and the shardings that were asked for.
      data_state: what `save` was given.
    """

    step: int
    state: Any
    data_state: dict[str, Any]


class Checkpointer:
    """Saves and restores one run's training states; a context manager that ends pending writes.

    Args:
      workdir: the run's directory; made if absent. Left-overs of an interrupted write are deleted.
      keep: how many of the newest checkpoints stay.
    """

    def __init__(self, workdir: str | os.PathLike[str], *, keep: int = 3):
        self._directory = checkpoint_directory(workdir)
        self._manager = _manager(
            self._directory,
            ocp.CheckpointManagerOptions(max_to_keep=keep, cleanup_tmp_directories=True),
        )

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def latest_step(self) -> int | None:
        """The newest complete checkpoint's step, None when there is none."""
        return self._manager.latest_step()

    def save(
        self, step: int, state: Any, data_state: Mapping[str, Any], config: ExperimentConfig
    ) -> None:
        """Copies `state` to the host and begins to write it; the state may be donated at once.

        Args:
          step: optimizer steps finished.
          state: any tree of arrays.
          data_state: the data iterator's position, as JSON can hold it.
          config: the run's.

        Raises:
          Exception: whatever made the previous write fail, for example a full disk.
        """
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.PyTreeSave(named_arrays(state)),
                data=ocp.args.JsonSave(dict(data_state)),
                config=ocp.args.JsonSave(dataclasses.asdict(config)),
            ),
        )

    def restore(
        self, abstract_state: Any, config: ExperimentConfig, *, step: int | None = None
    ) -> Restored:
        """Reads a whole training state to continue the run that saved it.

        Args:
          abstract_state: a tree of arrays or `jax.ShapeDtypeStruct`s, whose shardings the result
            has; they may be others than those it was saved from.
          config: of this run; its architecture and data must be the checkpoint's.
          step: which checkpoint, None for the latest.

        Raises:
          CheckpointError: there is none, or it is of another architecture, data or state.
        """
        step = _find_step(self._manager, self._directory, step)
        saved = _read_config(self._manager, step)
        sections = (*ARCHITECTURE_SECTIONS, "data")
        check_config(saved, config, source=self._directory, sections=sections)
        wanted = named_arrays(abstract_state)
        _check_arrays(_stored_shapes(self._manager, step), wanted, self._directory)
        arrays = _read_arrays(self._manager, step, wanted)
        data = self._manager.restore(step, args=ocp.args.Composite(data=ocp.args.JsonRestore()))
        return Restored(step, _rebuild(abstract_state, arrays), data["data"])

    def wait(self) -> None:
        """Returns when everything saved so far is on disk."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Ends pending writes and gives the manager's threads back."""
        self._manager.close()


def checkpoint_directory(workdir: str | os.PathLike[str]) -> pathlib.Path:
    """Where the checkpoints of the run in `workdir` are."""
    return pathlib.Path(workdir).absolute() / "checkpoints"


def checkpoint_steps(workdir: str | os.PathLike[str]) -> list[int]:
    """The steps of the checkpoints that a run has kept; `CheckpointError` where there is no run."""
    with _reader(workdir) as manager:
        return sorted(manager.all_steps())


def load_config(workdir: str | os.PathLike[str], *, step: int | None = None) -> ExperimentConfig:
    """The config that a checkpoint was saved with, by default the latest one's.

    Raises:
      CheckpointError: there is no such checkpoint.
    """
    with _reader(workdir) as manager:
        return _read_config(manager, _find_step(manager, checkpoint_directory(workdir), step))


def load_parameters(
    workdir: str | os.PathLike[str],
    target: Any,
    config: ExperimentConfig,
    *,
    step: int | None = None,
) -> Any:
    """Reads parameters without the rest of the training state.

    Args:
      workdir: the run to read from.
      target: a part of the training state by its field names, for example `{"params": params}`:
        arrays, or `jax.ShapeDtypeStruct`s with shardings. The result has its structure, dtypes and
        shardings.
      config: what `target` was made from; its architecture must be the checkpoint's.
      step: which checkpoint, None for the latest.

    Raises:
      CheckpointError: there is no checkpoint, it is of another architecture, or it lacks a
        parameter, has one too many or one of another shape.
    """
    directory = checkpoint_directory(workdir)
    with _reader(workdir) as manager:
        step = _find_step(manager, directory, step)
        check_config(_read_config(manager, step), config, source=directory)
        wanted = named_arrays(target)
        stored = _stored_shapes(manager, step)
        groups = {name.split("/")[0] for name in wanted}
        stored = {name: shape for name, shape in stored.items() if name.split("/")[0] in groups}
        _check_arrays(stored, wanted, directory)
        return _rebuild(target, _read_arrays(manager, step, wanted))


def check_config(
    saved: ExperimentConfig,
    config: ExperimentConfig,
    *,
    source: str | os.PathLike[str],
    sections: Sequence[str] = ARCHITECTURE_SECTIONS,
    free: Collection[str] = FREE_FIELDS,
) -> None:
    """Raises `CheckpointError` with every field of `sections` that is not `free` and differs."""
    differences = [
        f"{field}: checkpoint {old!r}, config {new!r}"
        for section in sections
        for (field, old), (_, new) in zip(
            _fields(saved, section), _fields(config, section), strict=True
        )
        if old != new and field not in free
    ]
    if differences:
        raise CheckpointError(
            f"the checkpoint in {source} is of another config ({'; '.join(differences)}): "
            "set these back or take another workdir"
        )


def named_arrays(tree: Any) -> dict[str, Any]:
    """The leaves of `tree` by their paths, "params/embedding" for `tree.params["embedding"]`.

    The `.value` below an `nnx.Variable` is left out.
    """
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {_name(path): leaf for path, leaf in leaves}


def _name(path: jax.tree_util.KeyPath) -> str:
    if path and path[-1] == jax.tree_util.GetAttrKey("value"):
        path = path[:-1]
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _rebuild(like: Any, arrays: Mapping[str, Any]) -> Any:
    """The inverse of `named_arrays`, in the structure of `like`."""
    structure = jax.tree.structure(like)
    return jax.tree.unflatten(structure, [arrays[name] for name in named_arrays(like)])


def _manager(
    directory: pathlib.Path, options: ocp.CheckpointManagerOptions
) -> ocp.CheckpointManager:
    handlers = {
        "state": ocp.PyTreeCheckpointHandler(),
        "data": ocp.JsonCheckpointHandler(),
        "config": ocp.JsonCheckpointHandler(),
    }
    return ocp.CheckpointManager(directory, options=options, item_handlers=handlers)


def _reader(workdir: str | os.PathLike[str]) -> ocp.CheckpointManager:
    """A manager that touches nothing: the run that owns the directory may be writing to it."""
    directory = checkpoint_directory(workdir)
    if not directory.is_dir():
        raise CheckpointError(f"no checkpoint in {workdir}: {directory} is not a directory")
    return _manager(directory, ocp.CheckpointManagerOptions(create=False))


def _find_step(manager: ocp.CheckpointManager, directory: pathlib.Path, step: int | None) -> int:
    steps = sorted(manager.all_steps())
    if not steps:
        raise CheckpointError(f"no checkpoint in {directory}: nothing was saved there yet")
    if step is not None and step not in steps:
        raise CheckpointError(f"no checkpoint of step {step} in {directory}: it has steps {steps}")
    return steps[-1] if step is None else step


def _read_config(manager: ocp.CheckpointManager, step: int) -> ExperimentConfig:
    items = manager.restore(step, args=ocp.args.Composite(config=ocp.args.JsonRestore()))
    return from_config_dict(ExperimentConfig, items["config"])


def _stored_shapes(manager: ocp.CheckpointManager, step: int) -> dict[str, tuple[int, ...]]:
    metadata = manager.item_metadata(step)["state"]
    return {name: tuple(array.shape) for name, array in metadata.tree.items()}


def _read_arrays(
    manager: ocp.CheckpointManager, step: int, wanted: Mapping[str, Any]
) -> dict[str, jax.Array]:
    """The arrays of `wanted`, in its dtypes and shardings; others are not read."""
    abstract = {
        name: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=array.sharding)
        for name, array in wanted.items()
    }
    arguments = ocp.args.PyTreeRestore(
        abstract,
        restore_args=ocp.checkpoint_utils.construct_restore_args(abstract),
        partial_restore=True,
    )
    return manager.restore(step, args=ocp.args.Composite(state=arguments))["state"]


def _fields(config: Any, section: str, path: str = "") -> Iterator[tuple[str, object]]:
    """The fields of a section by their whole names, those of sections inside it among them."""
    values = getattr(config, section)
    for field in dataclasses.fields(values):
        if dataclasses.is_dataclass(getattr(values, field.name)):
            yield from _fields(values, field.name, f"{path}{section}.")
        else:
            yield f"{path}{section}.{field.name}", getattr(values, field.name)


def _check_arrays(
    stored: Mapping[str, tuple[int, ...]], wanted: Mapping[str, Any], directory: pathlib.Path
) -> None:
    problems = [f"{name}: not in the checkpoint" for name in wanted if name not in stored]
    problems += [f"{name}: in the checkpoint only" for name in stored if name not in wanted]
    problems += [
        f"{name}: checkpoint {stored[name]}, model {tuple(array.shape)}"
        for name, array in wanted.items()
        if name in stored and stored[name] != tuple(array.shape)
    ]
    if problems:
        shown = problems[:8] + [f"and {len(problems) - 8} more"] * (len(problems) > 8)
        raise CheckpointError(f"the arrays in {directory} do not fit: {'; '.join(shown)}")
