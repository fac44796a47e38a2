"""The command line of all entry scripts: flags in, a typed config out, one clear line on a mistake.

`--config=path.py[:argument]` names a file with `get_config([argument])`,
`--config.section.field=value` edits what it returns, and each script adds flags of its own. A
mistake of the user ends with one line on standard error and exit code 2; an error of the program
keeps its traceback.
"""

import contextlib
import difflib
import importlib.util
import logging
import pathlib
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import ml_collections
from absl import flags
from ml_collections import config_flags

from msa_jax.config import ConfigError
from msa_jax.train.checkpoint import CheckpointError
from msa_jax.train.config import ExperimentConfig, from_config_dict, to_config_dict

USER_ERROR = 2


class UsageError(ValueError):
    """A command line that cannot be carried out."""


def run(main: Callable[[Sequence[str]], int | None], argv: Sequence[str] | None = None) -> int:
    """Calls `main` and turns the user's mistakes into one line and an exit code.

    Args:
      main: takes the command line, the program's name first; returns an exit code, or None for 0.
      argv: the command line, by default the process's.

    Returns:
      What `main` returned, or 2 after a wrong flag, config or checkpoint.
    """
    try:
        with _kernel_choices_shown():
            return main(sys.argv if argv is None else argv) or 0
    except (UsageError, ConfigError, CheckpointError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return USER_ERROR


class _StandardError(logging.Handler):
    """Writes to the standard error of the moment, which a progress bar may have replaced."""

    def emit(self, record: logging.LogRecord) -> None:
        print(self.format(record), file=sys.stderr)


@contextlib.contextmanager
def _kernel_choices_shown() -> Iterator[None]:
    """Says once per op which implementation runs."""
    logger, handler = logging.getLogger("pallas_kernels"), _StandardError()
    level, propagate = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    # Libraries that scripts import give the root logger a handler, which would say it again.
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        logger.propagate = propagate


def parse(
    argv: Sequence[str],
    define_flags: Callable[[flags.FlagValues], None],
    *,
    usage: str = "",
) -> flags.FlagValues:
    """Parses a command line without a config.

    Args:
      argv: the command line, the program's name first.
      define_flags: adds the script's flags to the values it is given.
      usage: what `--help` prints above the flags, the script's docstring.

    Raises:
      UsageError: an unknown flag, a value of the wrong type, an argument too many.
      SystemExit: with code 0 after `--help`.
    """
    values = flags.FlagValues()
    define_flags(values)
    return _parse(argv, values, usage)


def parse_with_config(
    argv: Sequence[str],
    define_flags: Callable[[flags.FlagValues], None],
    *,
    usage: str = "",
) -> tuple[flags.FlagValues, ExperimentConfig]:
    """Parses a command line with `--config` and its overrides; else like `parse`.

    Returns:
      The script's own flags, and the config.

    Raises:
      UsageError: as `parse`; or there is no config file, it fails, or an override names no field.
      ConfigError: a field's value cannot work.
      SystemExit: with code 0 after `--help`.
    """
    values = flags.FlagValues()
    define_flags(values)
    path, rest = take_flag(argv, "config")
    if path is None:
        _parse([argument for argument in rest if not _override(argument)], values, usage)
        raise UsageError("--config is missing: name a file, --config=configs/quickstart.py")
    config = _load_config("config", path)
    _check_fields(rest)
    config_flags.DEFINE_config_dict(
        "config", config, "file.py[:argument]", flag_values=values, sys_argv=rest
    )
    return _parse(rest, values, usage), from_config_dict(ExperimentConfig, config)


def _parse(argv: Sequence[str], values: flags.FlagValues, usage: str) -> flags.FlagValues:
    if {"--help", "-help", "-h"} & set(argv[1:]):
        own = [name for name in sorted(values) if not name.startswith("config")]
        print("\n".join([usage.strip(), "", *(f"  --{name}: {values[name].help}" for name in own)]))
        raise SystemExit(0)
    try:
        arguments = values(list(argv))
    except flags.Error as error:
        raise UsageError(str(error)) from error
    if arguments[1:]:
        raise UsageError(f"unexpected argument {arguments[1]!r}: flags are written --name=value")
    return values


def take_flag(argv: Sequence[str], flag: str) -> tuple[str | None, list[str]]:
    """The value of the last `--flag`, a file, and the command line without it.

    Raises:
      UsageError: the flag stands there without a value.
    """
    path, rest, pending = None, [], False
    for argument in argv:
        name, equals, value = argument.partition("=")
        if pending:
            path, pending = argument, False
        elif name in (f"--{flag}", f"-{flag}"):
            path, pending = value, not equals
        else:
            rest.append(argument)
    if pending:
        raise UsageError(f"--{flag} is empty: name a file, --{flag}=FILE.py")
    return path, rest


def load_config(flag: str, value: str) -> ExperimentConfig:
    """The config of `file.py[:argument]`, the value of `--flag`.

    Raises:
      UsageError: there is no such file, or it fails.
      ConfigError: a field's value cannot work.
    """
    return from_config_dict(ExperimentConfig, _load_config(flag, value))


def load_file(flag: str, value: str, function: str) -> Any:
    """What `function` of `file.py[:argument]`, the value of `--flag`, returns.

    Raises:
      UsageError: there is no such file, or it fails.
      ConfigError: it makes a config that cannot work.
    """
    name, colon, argument = value.partition(":")
    path = pathlib.Path(name)
    if not path.is_file():
        raise UsageError(f"--{flag}={value}: there is no file {name!r}")
    spec = importlib.util.spec_from_file_location(f"{flag}_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise UsageError(f"--{flag}={value}: {name} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        return getattr(module, function)(*([argument] if colon else []))
    except ConfigError:
        raise
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        lines = [f", line {frame.lineno}" for frame in frames if frame.filename.endswith(name)]
        where = f"{name}{lines[-1] if lines else ''}"
        raise UsageError(f"--{flag}={value}: {where}: {type(error).__name__}: {error}") from error


def _load_config(flag: str, value: str) -> ml_collections.ConfigDict:
    """What `get_config` of `file.py[:argument]` returns."""
    config = load_file(flag, value, "get_config")
    if not isinstance(config, ml_collections.ConfigDict):
        raise UsageError(
            f"--{flag}={value}: get_config() returned a {type(config).__name__}; "
            "return to_config_dict(ExperimentConfig(...))"
        )
    return config


def _override(argument: str) -> str | None:
    """The field that a `--config.field` or `--noconfig.field` argument names."""
    match = re.match(r"--?(?:no)?config\.([^=]*)", argument)
    return match[1] if match else None


def _check_fields(argv: Sequence[str]) -> None:
    known = _field_names(to_config_dict(ExperimentConfig()))
    for argument in argv:
        field = _override(argument)
        if field is not None and field not in known:
            raise UsageError(f"--config.{field}: no such field; {_suggestion(field, known)}")


def _field_names(config: ml_collections.ConfigDict, prefix: str = "") -> list[str]:
    names = []
    for key, value in config.items():
        inner = isinstance(value, ml_collections.ConfigDict)
        names += _field_names(value, f"{prefix}{key}.") if inner else [f"{prefix}{key}"]
    return names


def _suggestion(field: str, known: Sequence[str]) -> str:
    """The field most like `field`, by its whole path or else by the last part of it."""
    inside = [name for name in known if name.startswith(f"{field}.")]
    if inside:
        return f"it is a section, set one of its fields, such as --config.{inside[0]}"
    by_leaf = {name.rsplit(".", 1)[-1]: name for name in known}
    close = difflib.get_close_matches(field, known, n=1, cutoff=0.75)
    leaves = difflib.get_close_matches(field.rsplit(".", 1)[-1], by_leaf, n=1, cutoff=0.6)
    close += [by_leaf[leaf] for leaf in leaves]
    return f"did you mean --config.{close[0]}?" if close else "see msa_jax/train/config.py"
