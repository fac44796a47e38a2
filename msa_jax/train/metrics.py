"""Metric records: one JSON object a line in `metrics.jsonl`, the same in TensorBoard beside it.

A record is `{"step": 10, "split": "train", "loss": 2.5, "index_kl": [0.1, 0.2], ...}`: numbers,
and lists of numbers for what has one value for each layer. NaN and infinities, which JSON lacks,
are the strings "nan", "inf" and "-inf" in the file and floats again in `read_metrics`. Fields under
`clock/` come from the wall clock; all others are the same in every run of one config.
"""

import json
import math
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import tensorboardX

CLOCK_PREFIX = "clock/"

_NON_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


class MetricWriter:
    """Appends records; what a resumed run will compute again is cut off first.

    A record is with the operating system, in one piece, when `write` returns, so a killed process
    loses none. Use as a context manager.

    Args:
      workdir: the run's directory; `metrics.jsonl` and `tensorboard/` are made in it.
      resume_step: the step of the restored checkpoint; later records are dropped. 0 drops all but
        those of step 0, -1 drops all.
    """

    def __init__(self, workdir: str | os.PathLike[str], *, resume_step: int = -1):
        path = metrics_path(workdir)
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            _cut_after(path, resume_step)
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115 - closed by `close`
        self._board = tensorboardX.SummaryWriter(
            os.fspath(path.parent / "tensorboard"),
            purge_step=resume_step + 1,
            max_queue=1000,  # a record is many events: it must not wait for the disk
            flush_secs=30,
        )

    def __enter__(self) -> "MetricWriter":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def write(self, step: int, split: str, values: Mapping[str, Any]) -> None:
        """Appends one record.

        Args:
          step: optimizer steps finished.
          split: "train", "validation" or another set's name.
          values: numbers and arrays of numbers by name.
        """
        arrays = {name: np.asarray(value, np.float64) for name, value in values.items()}
        numbers = {
            name: _to_json(_python_value(values[name], array)) for name, array in arrays.items()
        }
        line = json.dumps({"step": step, "split": split, **numbers}, allow_nan=False)
        self._file.write(f"{line}\n".encode())
        for name, array in arrays.items():
            self._write_board(step, f"{split}/{name}", array)

    def close(self) -> None:
        """Closes both files."""
        self._file.close()
        self._board.close()

    def _write_board(self, step: int, tag: str, array: np.ndarray) -> None:
        """Numbers and vectors as curves, larger arrays as histograms."""
        if array.ndim == 0:
            self._board.add_scalar(tag, array.item(), step)
        elif array.ndim == 1:
            for index, value in enumerate(array):
                self._board.add_scalar(f"{tag}/{index:02d}", value.item(), step)
        elif np.isfinite(array).all():
            self._board.add_histogram(tag, array.ravel(), step)


def metrics_path(workdir: str | os.PathLike[str]) -> pathlib.Path:
    """Where the records of the run in `workdir` are."""
    return pathlib.Path(workdir) / "metrics.jsonl"


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The records of a `metrics.jsonl`, oldest first.

    A last line that a crash cut short is left out.

    Raises:
      ValueError: another line is no JSON object; the message gives its number.
    """
    return [_from_json(json.loads(line)) for line in _whole_lines(pathlib.Path(path))]


def _whole_lines(path: pathlib.Path) -> Iterator[bytes]:
    for number, line in enumerate(path.read_bytes().splitlines(keepends=True), start=1):
        if not line.endswith(b"\n"):
            return
        try:
            json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: not a JSON record ({error})") from error
        yield line


def _cut_after(path: pathlib.Path, step: int) -> None:
    """Rewrites the file without the records after `step`; it is whole at every moment."""
    kept = b"".join(line for line in _whole_lines(path) if json.loads(line)["step"] <= step)
    replacement = path.with_suffix(".jsonl.tmp")
    replacement.write_bytes(kept)
    os.replace(replacement, path)


def _python_value(value: Any, array: np.ndarray) -> Any:
    """Integers stay integers; every float prints with the digits of its own float64 value."""
    whole = np.issubdtype(np.asarray(value).dtype, np.integer)
    return (array.astype(np.int64) if whole else array).tolist()


def _to_json(value: Any) -> Any:
    if isinstance(value, list):
        return [_to_json(item) for item in value]
    return value if math.isfinite(value) else str(value)


def _from_json(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: item if key == "split" else _from_json(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_from_json(item) for item in value]
    return _NON_FINITE[value] if isinstance(value, str) else value
