"""The tuned table: the tile sizes of a kernel by device, dtype and bucket of shapes.

`tuned.json` beside this file is written by `python -m experiments.tune`. A kernel asks for its
config while it is traced and gives its default; what the table does not hold stays as it is.
"""

import contextlib
import contextvars
import dataclasses
import json
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax

TABLE = pathlib.Path(__file__).with_name("tuned.json")

Table = dict[str, dict[str, dict[str, dict[str, dict[str, Any]]]]]


@dataclasses.dataclass
class Trial:
    """Values to try instead of the table's, while `trying` them.

    Attributes:
      kernel: its name in the table.
      values: fields of its config.
      bucket: for which the kernel has asked for its config since; None: it has not.
    """

    kernel: str
    values: Mapping[str, Any]
    bucket: str | None = None


_trial: contextvars.ContextVar[Trial | None] = contextvars.ContextVar("trial", default=None)


def tuned[Config](
    kernel: str, default: Config, *, device_kind: str | None = None, dtype: str, bucket: str
) -> Config:
    """A kernel's config: the table's values in place of the default's.

    Args:
      kernel: its name in the table, such as "select_blocks.scores".
      default: a frozen dataclass; fields that the table leaves out keep its values.
      device_kind: `jax.Device.device_kind`, by default that of the first device.
      dtype: name of the dtype that the kernel multiplies, such as "bfloat16".
      bucket: see `shape_bucket`.

    Raises:
      ValueError: the table names a field that the config does not have, or a value it refuses.
    """
    trial = _trial.get()
    if trial is not None and trial.kernel == kernel:
        trial.bucket = bucket
        return _replace(default, trial.values, f"trial of {kernel}")
    kind = jax.devices()[0].device_kind if device_kind is None else device_kind
    values = read_table().get(kernel, {}).get(kind, {}).get(dtype, {}).get(bucket, {})
    return _replace(default, values, f"{TABLE.name}: {kernel}, {kind}, {dtype}, {bucket}")


def shape_bucket(length: int, **sizes: int) -> str:
    """The bucket of a shape: the next power of two of its length, and sizes that must be equal.

    `shape_bucket(5000, D=128, Bk=128)` is "8K D128 Bk128".
    """
    size = 1 << max(length - 1, 0).bit_length()
    name = str(size)
    for unit, letter in ((1 << 20, "M"), (1 << 10, "K")):
        if size >= unit:
            name = f"{size // unit}{letter}"
            break
    return " ".join([name, *(f"{key}{value}" for key, value in sizes.items())])


@contextlib.contextmanager
def trying(kernel: str, values: Mapping[str, Any]) -> Iterator[Trial]:
    """Gives `kernel` these values instead of the table's while it is traced."""
    trial = Trial(kernel, values)
    token = _trial.set(trial)
    try:
        yield trial
    finally:
        _trial.reset(token)


def read_table() -> Table:
    """The table: kernel, device kind, dtype, bucket, and then fields of the kernel's config."""
    return json.loads(TABLE.read_text(encoding="utf-8")) if TABLE.exists() else {}


def write_entry(
    kernel: str, values: Mapping[str, Any], *, device_kind: str, dtype: str, bucket: str
) -> None:
    """Puts the best values found into the table; others stay."""
    table = read_table()
    buckets = table.setdefault(kernel, {}).setdefault(device_kind, {}).setdefault(dtype, {})
    buckets[bucket] = dict(values)
    TABLE.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def _replace[Config](default: Config, values: Mapping[str, Any], source: str) -> Config:
    fields = [field.name for field in dataclasses.fields(default)]  # pyrefly: ignore
    unknown = sorted(set(values) - set(fields))
    if unknown:
        raise ValueError(
            f"{source}: {type(default).__name__} has no field {', '.join(unknown)}; it has "
            f"{', '.join(fields)}. Write the entry anew with `python -m experiments.tune`"
        )
    try:
        return dataclasses.replace(default, **values)  # pyrefly: ignore
    except (TypeError, ValueError) as error:
        raise ValueError(f"{source}: {error}") from error
