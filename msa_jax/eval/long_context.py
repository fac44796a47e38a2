"""Long-context evaluation of a finished run: what is measured, cell by cell, and what is kept.

A cell is a task at a length (and, where there are several, on one text). Its results are written
when it is done, and it is never computed again: `ResultsFile`.
"""

import dataclasses
import json
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any, Literal, cast, get_args

from msa_jax.config import ConfigError, require, require_choice

Task = Literal["perplexity", "needle", "ruler", "mqar", "selection"]
HaystackText = Literal["filler", "validation"]


@dataclasses.dataclass(frozen=True)
class LongContextConfig:
    """What is measured.

    Attributes:
      tasks: any of "perplexity", "needle", "ruler", "mqar", "selection".
      lengths: tokens of context.
      texts: globs of files that perplexity and selection are also measured on, each a text of its
        own; the held-out part of the run's corpus is the first.
      tokens: of each text, at every length.
      examples: prompts per task, length and depth.
      depths: needle positions from the start to the end of the text.
      pairs: numbers of key-value pairs of associative recall.
      haystack: what needles are hidden in: "filler" sentences, as in training documents, or
        "validation", held-out text of the run's corpus.
      batch_tokens: tokens of a batch; a longer prompt is a batch of its own.
      seed: of the examples.
    """

    tasks: tuple[Task, ...] = get_args(Task)
    lengths: tuple[int, ...] = (2048, 4096, 8192)
    texts: tuple[str, ...] = ()
    tokens: int = 65_536
    examples: int = 16
    depths: int = 5
    pairs: tuple[int, ...] = (4, 8, 16, 32)
    haystack: HaystackText = "filler"
    batch_tokens: int = 16_384
    seed: int = 0

    def __post_init__(self):
        for task in self.tasks:
            require_choice("tasks", task, Task)
        require_choice("haystack", self.haystack, HaystackText)
        for name in ("tasks", "lengths", "pairs"):
            values = getattr(self, name)
            require(len(values) > 0, name, values, "name at least one")
            require(len(set(values)) == len(values), name, values, "name each only once")
        require(min(self.lengths) >= 16, "lengths", self.lengths, "each must be >= 16")
        require(min(self.pairs) >= 1, "pairs", self.pairs, "each must be >= 1")
        require(
            max(self.pairs) <= 52, "pairs", self.pairs, "each must be <= 52, as keys are letters"
        )
        for name in ("tokens", "examples", "depths", "batch_tokens"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "must be >= 1")
        require(
            "perplexity" not in self.tasks or self.tokens >= max(self.lengths),
            "tokens",
            self.tokens,
            f"must be at least the greatest length, {max(self.lengths)}",
        )
        require(0 <= self.seed < 2**32, "seed", self.seed, "must be between 0 and 2**32 - 1")

    def batch_size(self, length: int, rows: int) -> int:
        """Rows of a batch: so many that all batches of `rows` are equal, and compiled once."""
        most = max(1, self.batch_tokens // length)
        return max(size for size in range(1, min(most, rows) + 1) if rows % size == 0)


@dataclasses.dataclass(frozen=True, order=True)
class Cell:
    """One thing to measure.

    Attributes:
      task: which.
      variant: of the task: a text, or a kind of retrieval; empty where there is one only.
      length: tokens of context.
    """

    task: Task
    variant: str
    length: int

    @property
    def key(self) -> str:
        """Its name in the results."""
        return ":".join((self.task, self.variant, str(self.length)))


def parse_cell(key: str) -> Cell:
    """The inverse of `Cell.key`."""
    task, rest = key.split(":", 1)
    variant, length = rest.rsplit(":", 1)
    return Cell(cast(Task, task), variant, int(length))


@dataclasses.dataclass(eq=False)
class ResultsFile:
    """The results of one checkpoint, in a JSON file that is whole at any time.

    Attributes:
      path: of the file.
      identity: what the results are of: the checkpoint, and all settings that change a cell.
      cells: what is finished, by `Cell.key`.
    """

    path: pathlib.Path
    identity: dict[str, Any]
    cells: dict[str, dict[str, Any]]

    @classmethod
    def open(cls, path: str | os.PathLike[str], identity: Mapping[str, Any]) -> "ResultsFile":
        """The file to go on with, or a new one; its folder is made if absent.

        Raises:
          ConfigError: the file is damaged or of another identity.
        """
        path, identity = pathlib.Path(path), json.loads(json.dumps(identity))
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            return cls(path, identity, {})
        found = cls.read(path)
        names = dict.fromkeys((*found.identity, *identity))
        differing = [
            f"{name} {found.identity.get(name)!r}, now {identity.get(name)!r}"
            for name in names
            if found.identity.get(name) != identity.get(name)
        ]
        if differing:
            raise ConfigError(
                f"{path}: is of another evaluation ({'; '.join(differing)}): set these back, "
                "or take another --output"
            )
        return found

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> "ResultsFile":
        """The results in a file, whatever they are of.

        Raises:
          ConfigError: the file is missing or damaged.
        """
        path = pathlib.Path(path)
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            return cls(path, content["identity"], content["cells"])
        except FileNotFoundError:
            raise ConfigError(f"{path}: no such file") from None
        except (ValueError, KeyError, TypeError):
            raise ConfigError(
                f"{path}: holds no results; delete it, or take another --output"
            ) from None

    def add(self, cell: Cell, values: Mapping[str, Any]) -> None:
        """Keeps a finished cell."""
        self.cells[cell.key] = dict(values)
        temporary = self.path.with_suffix(".json.tmp")
        content = {"identity": self.identity, "cells": self.cells}
        temporary.write_text(json.dumps(content, indent=1), encoding="utf-8")
        os.replace(temporary, self.path)

    def of_task(self, task: Task) -> Iterator[tuple[Cell, dict[str, Any]]]:
        """The finished cells of a task: its variants in the order of the longest, then lengths."""
        cells = {parse_cell(key): values for key, values in self.cells.items()}
        found = sorted((c for c in cells if c.task == task), key=lambda cell: -cell.length)
        variants = list(dict.fromkeys(cell.variant for cell in found))
        for cell in sorted(found, key=lambda cell: (variants.index(cell.variant), cell.length)):
            yield cell, cells[cell]
