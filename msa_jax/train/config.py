"""Everything a training run adds to an architecture, and its bridge to ml-collections.

`ExperimentConfig` is what the files in `configs/` build and what `--config.field=value` edits.
Each section validates itself; `ExperimentConfig` checks what spans sections.
"""

import dataclasses
import typing
from collections.abc import Mapping
from typing import Any, Literal

import ml_collections

from msa_jax.config import ArchitectureConfig, ConfigError, require, require_choice

Source = Literal["stdlib", "files", "retrieval"]
RetrievalTask = Literal[
    "passkey", "multi_key", "multi_value", "multi_query", "variable_tracking",
    "question_answering", "common_words", "frequent_words", "associative_recall",
    "many_needles", "mixture",
]  # fmt: skip
Schedule = Literal["wsd", "cosine", "constant"]
Reduction = Literal["mean", "sum"]


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """What is read and how it is cut into batches.

    Attributes:
      source: "stdlib" (sources of the running interpreter's standard library), "files" (the glob
        `files`), or "retrieval" (synthetic retrieval documents alone).
      files: glob of text, `.jsonl` or `.parquet` files, for `source="files"`.
      text_field: the column of `.jsonl` and `.parquet` records that holds the text.
      tokenizer: "byte", or the path of a Hugging Face `tokenizer.json`.
      sequence_length: tokens per packed row, a multiple of the attention block size.
      join_documents: rows are cut from all documents joined end to end, each row one document to
        the model: full context, no padding, and attention without a mask of documents, which cuDNN
        can serve. False packs documents that do not see each other.
      warmup_length: sequence-length warm-up (Li et al., 2022, arXiv 2108.06084): the rows of the
        first `length_warmup_steps` are cut into rows of so many tokens, a multiple of the attention
        block size that divides `sequence_length`. A step's tokens stay the same.
      length_warmup_steps: optimizer steps with short rows; 0 has none.
      batch_size: rows per optimizer step, over all devices and accumulation steps.
      validation_fraction: share of files held out.
      retrieval_task: the synthetic task that `retrieval_share` mixes in, see
        `msa_jax.data.retrieval`; "mixture" draws from all of them.
      retrieval_share: share of training rows that are of synthetic documents.
      seed: of shuffling and of the synthetic documents.
    """

    source: Source = "stdlib"
    files: str = ""
    text_field: str = "text"
    tokenizer: str = "byte"
    sequence_length: int = 1024
    join_documents: bool = False
    warmup_length: int = 1024
    length_warmup_steps: int = 0
    batch_size: int = 8
    validation_fraction: float = 0.05
    retrieval_task: RetrievalTask = "passkey"
    retrieval_share: float = 0.0
    seed: int = 0

    def __post_init__(self):
        require_choice("data.source", self.source, Source)
        require_choice("data.retrieval_task", self.retrieval_task, RetrievalTask)
        require(
            self.source != "files" or bool(self.files),
            "data.files",
            self.files,
            'data.source="files" needs a glob such as "corpus/**/*.txt"',
        )
        for name in ("sequence_length", "batch_size", "warmup_length"):
            require(getattr(self, name) >= 1, f"data.{name}", getattr(self, name), "must be >= 1")
        require(
            self.length_warmup_steps >= 0,
            "data.length_warmup_steps",
            self.length_warmup_steps,
            "must be >= 0",
        )
        require(
            not self.length_warmup_steps or self.sequence_length % self.warmup_length == 0,
            "data.warmup_length",
            self.warmup_length,
            f"must divide data.sequence_length={self.sequence_length}",
        )
        require(
            0 < self.validation_fraction < 1,
            "data.validation_fraction",
            self.validation_fraction,
            "must lie strictly between 0 and 1",
        )
        require(
            0 <= self.retrieval_share <= 1,
            "data.retrieval_share",
            self.retrieval_share,
            "must lie between 0 and 1",
        )


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW and its learning-rate schedule.

    Attributes:
      learning_rate: peak.
      schedule: after a linear warm-up of `warmup_steps`: "wsd" stays at the peak and decays
        linearly over the last `decay_fraction` of the run, "cosine" decays over all of it.
      warmup_steps: optimizer steps of linear warm-up.
      decay_fraction: share of the run that "wsd" decays over.
      final_scale: learning rate at the end, as a share of the peak.
      b1: AdamW first-moment decay.
      b2: AdamW second-moment decay.
      eps: AdamW epsilon.
      weight_decay: decoupled, on matrices only.
      gradient_clip: global-norm clip; 0 turns it off.
      accumulation_steps: micro-batches per optimizer step; divides `data.batch_size`.
    """

    learning_rate: float = 3e-4
    schedule: Schedule = "wsd"
    warmup_steps: int = 100
    decay_fraction: float = 0.2
    final_scale: float = 0.1
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    gradient_clip: float = 1.0
    accumulation_steps: int = 1

    def __post_init__(self):
        require_choice("optimizer.schedule", self.schedule, Schedule)
        require(
            self.learning_rate > 0, "optimizer.learning_rate", self.learning_rate, "must be > 0"
        )
        require(
            self.accumulation_steps >= 1,
            "optimizer.accumulation_steps",
            self.accumulation_steps,
            "must be >= 1",
        )
        for name in ("warmup_steps", "weight_decay", "gradient_clip"):
            require(
                getattr(self, name) >= 0, f"optimizer.{name}", getattr(self, name), "must be >= 0"
            )
        for name in ("decay_fraction", "final_scale", "b1", "b2"):
            require(
                0 <= getattr(self, name) <= 1,
                f"optimizer.{name}",
                getattr(self, name),
                "must lie between 0 and 1",
            )


@dataclasses.dataclass(frozen=True)
class ObjectiveConfig:
    """The KL alignment of the index branch (paper section on training).

    Attributes:
      kl_weight: lambda.
      kl_reduction: over MSA layers; the paper sums, "mean" keeps lambda comparable across depths.
      index_warmup_steps: first steps, in which the main branch is dense and the index branch
        learns over the whole causal prefix; after them attention is sparse.
    """

    kl_weight: float = 1.0
    kl_reduction: Reduction = "mean"
    index_warmup_steps: int = 0

    def __post_init__(self):
        require_choice("objective.kl_reduction", self.kl_reduction, Reduction)
        require(self.kl_weight >= 0, "objective.kl_weight", self.kl_weight, "must be >= 0")
        require(
            self.index_warmup_steps >= 0,
            "objective.index_warmup_steps",
            self.index_warmup_steps,
            "must be >= 0",
        )


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each mesh axis; one of them may be -1: all that remain.

    Attributes:
      data: replicas that split the batch.
      fsdp: splits the batch, and parameters and optimizer state too.
      tensor: splits heads, feed-forward width and vocabulary.
      expert: splits the batch, and the experts.
      context: splits the sequence, for rows that are too long for a device. Each gathers the keys
        of all.
    """

    data: int = -1
    fsdp: int = 1
    tensor: int = 1
    expert: int = 1
    context: int = 1

    def __post_init__(self):
        sizes = dataclasses.asdict(self)
        for name, size in sizes.items():
            require(
                size >= 1 or size == -1, f"mesh.{name}", size, "must be >= 1, or -1 for the rest"
            )
        free = [name for name, size in sizes.items() if size == -1]
        require(len(free) <= 1, "mesh", sizes, "only one axis may be -1")


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """The loop.

    Attributes:
      steps: optimizer steps.
      seed: of the initial parameters.
      log_every: steps between metric records.
      eval_every: steps between evaluations; 0 evaluates at the end only.
      eval_batches: validation batches per evaluation.
      checkpoint_every: steps between checkpoints; 0 saves at the end only.
      keep_checkpoints: newest ones kept.
      prefetch_batches: batches that a thread packs ahead, for runs whose steps would wait for data;
        0 packs one, while the devices work.
      init_from: work directory of a dense (GQA) run of the same architecture to continue from with
        fresh index weights (MSA-CPT); empty starts from scratch.
      profile_start: first step of the profiler window.
      profile_steps: length of that window; 0 takes no profile.
      debug_nans: stop inside the operation that makes the first NaN (slow).
    """

    steps: int = 1000
    seed: int = 0
    log_every: int = 10
    eval_every: int = 100
    eval_batches: int = 8
    checkpoint_every: int = 500
    keep_checkpoints: int = 3
    prefetch_batches: int = 0
    init_from: str = ""
    profile_start: int = 10
    profile_steps: int = 0
    debug_nans: bool = False

    def __post_init__(self):
        for name in ("steps", "log_every", "eval_batches", "keep_checkpoints"):
            require(getattr(self, name) >= 1, f"train.{name}", getattr(self, name), "must be >= 1")
        free = ("eval_every", "checkpoint_every", "prefetch_batches")
        for name in (*free, "profile_start", "profile_steps"):
            require(getattr(self, name) >= 0, f"train.{name}", getattr(self, name), "must be >= 0")


@dataclasses.dataclass(frozen=True)
class ExperimentConfig(ArchitectureConfig):
    """One training run: the architecture, and everything that is not the architecture."""

    data: DataConfig = DataConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    mesh: MeshConfig = MeshConfig()
    train: TrainConfig = TrainConfig()

    def __post_init__(self):
        length, block = self.data.sequence_length, self.attention.block_size
        require(
            length % block == 0,
            "data.sequence_length",
            length,
            f"must be a multiple of attention.block_size={block}",
        )
        short = self.data.warmup_length
        require(
            not self.data.length_warmup_steps or short % block == 0,
            "data.warmup_length",
            short,
            f"must be a multiple of attention.block_size={block}",
        )
        rows, parts = self.data.batch_size, self.optimizer.accumulation_steps
        require(
            rows % parts == 0,
            "optimizer.accumulation_steps",
            parts,
            f"must divide data.batch_size={rows}",
        )

    @property
    def architecture(self) -> ArchitectureConfig:
        """The architecture alone: what a checkpoint must agree on."""
        return ArchitectureConfig(self.model, self.attention, self.moe)


def to_config_dict(config: Any) -> ml_collections.ConfigDict:
    """A dataclass, nested ones included, as a type-checked ConfigDict that flags can edit."""
    return ml_collections.ConfigDict(dataclasses.asdict(config), convert_dict=True)


def from_config_dict[T](
    cls: type[T], values: Mapping[str, Any] | ml_collections.ConfigDict, path: str = ""
) -> T:
    """Builds dataclass `cls` from (possibly partial) nested `values`.

    Raises:
      ConfigError: an unknown key, a value of the wrong type, or one the dataclass refuses.
    """
    hints = {field.name: typing.get_type_hints(cls)[field.name] for field in _fields(cls)}
    arguments = {}
    for key, value in values.items():
        name = f"{path}{key}"
        if key not in hints:
            known = ", ".join(sorted(hints))
            section = path.rstrip(".") or "the config"
            raise ConfigError(f"{name}: no such field; {section} has {known}")
        if dataclasses.is_dataclass(hints[key]):
            section = isinstance(value, Mapping | ml_collections.ConfigDict)
            require(section, name, value, "must be a section with fields")
            arguments[key] = from_config_dict(hints[key], value, f"{name}.")
        else:
            arguments[key] = _coerce(name, value, hints[key])
    return cls(**arguments)


def _fields(cls: Any) -> tuple[dataclasses.Field, ...]:
    return dataclasses.fields(cls)


def _coerce(name: str, value: Any, hint: Any) -> Any:
    """`value` as the field's type: ints widen to float, nothing else changes type."""
    if typing.get_origin(hint) is Literal:
        require_choice(name, value, hint)
        return value
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    fits = isinstance(value, hint) and not (hint is int and isinstance(value, bool))
    require(fits, name, value, f"must be of type {hint.__name__}")
    return value
