"""Reads the folder that a finished training run leaves behind.

| file | content |
|---|---|
| `manifest.json` | `{"starts": [...]}`, see `msa_jax.train.manifest` |
| `metrics.jsonl` | records of the splits "train" and "validation", see `msa_jax.train.metrics` |
| `evaluation.json` | the final evaluation, see `Evaluation` |
| `selection.npz` | block ids on one real validation sequence, see `Selection` |
"""

import dataclasses
import json
import os
import pathlib
import typing
import zipfile
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from msa_jax.config import ArchitectureConfig, ConfigError
from msa_jax.train.config import ExperimentConfig, from_config_dict
from msa_jax.train.metrics import metrics_path, read_metrics

Records = list[dict[str, Any]]

# What the report calls a run, by its `attention.kind`.
LABELS = {
    "msa": "MSA",
    "gqa": "GQA",
    "mha": "MHA",
    "sliding_window": "Sliding window",
    "longformer": "Longformer",
    "bigbird": "BigBird",
    "mla": "MLA",
    "linear": "Gated DeltaNet",
    "mamba2": "Mamba-2",
}


class RunFileError(ValueError):
    """A run's file that is missing or does not hold what it should; the message names it."""


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """`evaluation.json`: the final model on held-out text. L counts the layers that report.

    Attributes:
      step: optimizer steps the model was trained for.
      tokens: validation tokens that were scored.
      loss: mean next-token loss, nats per token.
      bits_per_byte: the same per byte of text, bits.
      position_edges: [P + 1] token positions in the document that bound the buckets.
      loss_by_position: [P] mean loss of the targets whose position is in each bucket.
      text: the selection's sequence, one string per key block; empty without a selection.
      layers: per-layer means [L] by name (`score_recall`, `block_recall`, `index_kl`, ...).
      expert_load: [L, E] share of the routed tokens (any scale); empty without experts.
    """

    step: int
    tokens: int
    loss: float
    bits_per_byte: float
    position_edges: list[int]
    loss_by_position: list[float]
    text: list[str] = dataclasses.field(default_factory=list)
    layers: dict[str, list[float]] = dataclasses.field(default_factory=dict)
    expert_load: list[list[float]] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True)
class Selection:
    """`selection.npz`: which blocks each query kept on one validation sequence.

    Attributes:
      layers: [L] int, the model's layer numbers.
      block_ids: [L, Hkv, T, K] int32, valid ids ascending, then -1.
      segment_ids: [T] int32, the document of each token, 0 for padding.
      block_size: Bk, tokens per block.
    """

    layers: np.ndarray
    block_ids: np.ndarray
    segment_ids: np.ndarray
    block_size: int


@dataclasses.dataclass(frozen=True)
class Run:
    """One finished run.

    Attributes:
      label: how the report calls it.
      path: its folder.
      config: its configuration.
      manifest: the last entry of `manifest.json`.
      starts: how often the run was started or resumed.
      train: training records, oldest first.
      validation: evaluation records, oldest first.
      evaluation: the final evaluation.
      selection: None for a model that selects nothing, or where it was not asked for.
    """

    label: str
    path: pathlib.Path
    config: ExperimentConfig
    manifest: Mapping[str, Any]
    starts: int
    train: Records
    validation: Records
    evaluation: Evaluation
    selection: Selection | None


def read_runs(paths: Sequence[str | os.PathLike[str]]) -> list[Run]:
    """Reads several runs; each is labelled by its mixer, or by its folder where that is ambiguous.

    Raises:
      RunFileError: a file is missing, damaged, or disagrees with the run's config.
    """
    runs = [read_run(path) for path in paths]
    for label in (lambda run: run.label, lambda run: run.path.name, lambda run: str(run.path)):
        labels = [label(run) for run in runs]
        if len(set(labels)) == len(labels):
            break
    else:
        raise RunFileError(f"{', '.join(labels)}: each run can be named only once")
    return [dataclasses.replace(run, label=label) for run, label in zip(runs, labels, strict=True)]


def read_run(path: str | os.PathLike[str], *, selection: bool = True) -> Run:
    """Reads one run's folder; see `read_runs`. Without `selection` that file is not needed."""
    folder = pathlib.Path(path)
    manifest_path = _existing(folder / "manifest.json")
    starts = _json_object(manifest_path).get("starts")
    if not starts or "config" not in starts[-1]:
        raise RunFileError(f"{manifest_path}: holds no start of a run with its config")
    try:
        config = from_config_dict(ExperimentConfig, starts[-1]["config"])
    except ConfigError as error:
        raise RunFileError(f"{manifest_path}: {error}") from error
    evaluation = read_evaluation(folder / "evaluation.json")
    train, validation = _read_records(metrics_path(folder))
    found = None
    if selection and any(
        config.computes_selection(layer) for layer in range(config.model.num_layers)
    ):
        found = _read_selection(folder / "selection.npz", config, evaluation)
    return Run(
        label=_label(config),
        path=folder,
        config=config,
        manifest=starts[-1],
        starts=len(starts),
        train=train,
        validation=validation,
        evaluation=evaluation,
        selection=found,
    )


def _label(config: ArchitectureConfig) -> str:
    """The kind, and for MSA the selector if it is a fixed one."""
    attention = config.attention
    fixed = attention.kind == "msa" and attention.selector != "learned"
    return LABELS[attention.kind] + (f" {attention.selector}" if fixed else "")


def series(records: Records, name: str) -> tuple[np.ndarray, np.ndarray]:
    """The steps [N] and values [N, ...] of the records that have `name`."""
    found = [(record["step"], record[name]) for record in records if name in record]
    steps, values = zip(*found, strict=True) if found else ((), ())
    return np.array(steps, int), np.array(values, float)


def reporting_layers(config: ArchitectureConfig, count: int, path: pathlib.Path) -> list[int]:
    """The numbers of the `count` layers that a per-layer selection metric stands for."""
    layers = range(config.model.num_layers)
    computing = [layer for layer in layers if config.computes_selection(layer)]
    sparse = [layer for layer in layers if config.attention_of(layer).selects_blocks]
    for candidates in (computing, sparse):
        if len(candidates) == count:
            return candidates
    raise RunFileError(
        f"{path}: a per-layer metric has {count} values, in the config {len(sparse)} layers select "
        "blocks"
    )


def _existing(path: pathlib.Path) -> pathlib.Path:
    if not path.is_file():
        raise RunFileError(f"{path}: no such file; is this the folder of a finished run?")
    return path


def _json_object(path: pathlib.Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RunFileError(f"{path}: not JSON, perhaps cut short ({error})") from error
    if not isinstance(value, dict):
        raise RunFileError(f"{path}: holds a JSON {type(value).__name__} instead of an object")
    return value


def _read_records(path: pathlib.Path) -> tuple[Records, Records]:
    try:
        records = read_metrics(_existing(path))
    except RunFileError:
        raise
    except ValueError as error:
        raise RunFileError(str(error)) from error
    splits = []
    for split in ("train", "validation"):
        chosen = [record for record in records if record.get("split") == split]
        if not any("loss" in record and "step" in record for record in chosen):
            raise RunFileError(f"{path}: no {split} record with a loss; has the run finished?")
        splits.append(chosen)
    return splits[0], splits[1]


def read_evaluation(path: pathlib.Path) -> Evaluation:
    """Reads an `evaluation.json`.

    Raises:
      RunFileError: it is missing or damaged.
    """
    values = _json_object(_existing(path))
    fields = {field.name: field for field in dataclasses.fields(Evaluation)}
    hints = typing.get_type_hints(Evaluation)
    for name, field in fields.items():
        required = field.default_factory is dataclasses.MISSING
        if required and name not in values:
            raise RunFileError(f"{path}: the field {name!r} is missing")
        wanted = typing.get_origin(hints[name]) or hints[name]
        accepted = (int, float) if wanted is float else wanted
        if name in values and not isinstance(values[name], accepted):
            raise RunFileError(f"{path}: {name!r} is no {wanted.__name__}: {values[name]!r}")
        if wanted is float:
            values[name] = float(values[name])
    evaluation = Evaluation(**{name: values[name] for name in fields if name in values})
    edges, losses = len(evaluation.position_edges), len(evaluation.loss_by_position)
    if losses == 0 or edges != losses + 1:
        raise RunFileError(
            f"{path}: {losses} values of loss_by_position need {losses + 1} position_edges, "
            f"not {edges}"
        )
    return evaluation


def _read_selection(
    path: pathlib.Path, config: ArchitectureConfig, evaluation: Evaluation
) -> Selection:
    try:
        with _existing(path).open("rb") as file, np.load(file) as arrays:
            found = {name: arrays[name] for name in ("layers", "block_ids", "segment_ids")}
    except RunFileError:
        raise
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise RunFileError(f"{path}: cannot be read, perhaps cut short ({error})") from error
    attention, block_ids = config.attention, found["block_ids"]
    length = len(found["segment_ids"])
    expected = (len(found["layers"]), attention.kv_heads, length)
    if block_ids.ndim != 4 or block_ids.shape[:3] != expected:
        raise RunFileError(
            f"{path}: block_ids has shape {block_ids.shape}, but layers, config and segment_ids "
            f"ask for {(*expected, 'K')}"
        )
    blocks = -(-length // attention.block_size)
    if len(evaluation.text) != blocks:
        raise RunFileError(
            f"{path.with_name('evaluation.json')}: 'text' has {len(evaluation.text)} strings, "
            f"one for each of the {blocks} blocks of selection.npz is needed"
        )
    return Selection(block_size=attention.block_size, **found)
