"""What is timed: one case is one process on the GPU, and yields one record per line it prints."""

import dataclasses
from collections.abc import Sequence
from typing import Any, Self

from msa_jax.config import AttentionConfig, ConfigError

# Stand before each record that a case prints, and before what it says it is doing.
MARK, PHASE = "benchmark-record ", "benchmark-phase "

CEILINGS, MSA = "ceilings", "msa"
BASELINES = {  # name: title
    "cudnn": "cuDNN",
    "flash_attention_4": "FlashAttention-4",
    "flash_msa": "flash-msa",
}
# Their time grows as N^2, so that it may be extrapolated.
DENSE = ("cudnn", "flash_attention_4")
SELECTIONS = ("random", "identical", "correlated", "captured")
PRECISIONS = ("native", "int8")
FORWARD, TRAINING = PASSES = ("forward", "training")


@dataclasses.dataclass(frozen=True)
class Case:
    """One process of the benchmark.

    Attributes:
      subject: "ceilings", "msa" or one of `BASELINES`.
      length: tokens, queries and keys.
      selections: what the index inputs are like, for "msa".
      precisions: `index_precision` of `select_blocks`, for "msa".
      batch: sequences.
      num_heads: Hq.
      num_kv_heads: Hkv.
      head_dim: D.
      index_dim: Di.
      block_size: Bk.
      top_k: K.
      seed: of the random inputs.
      repeats: timed runs at most; fewer where one takes long.
      sampled_rows: query rows held to the oracle before anything is timed.
      implementation: of all ops, for "msa"; "" takes the best there is.
      inputs: npz file of the "captured" selection.
      passes: "forward", or "training": forward, backward and, where there is one, the KL.
    """

    subject: str
    length: int = 0
    selections: tuple[str, ...] = ()
    precisions: tuple[str, ...] = ()
    batch: int = 1
    num_heads: int = 64
    num_kv_heads: int = 4
    head_dim: int = 128
    index_dim: int = 128
    block_size: int = 128
    top_k: int = 16
    seed: int = 0
    repeats: int = 5
    sampled_rows: int = 32
    implementation: str = "mosaic_gpu"
    inputs: str = ""
    passes: str = FORWARD

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Self:
        """The case that `dataclasses.asdict` and JSON made of one."""
        tuples: dict[str, Any] = {n: tuple(values[n]) for n in ("selections", "precisions")}
        return cls(**{**values, **tuples})

    @property
    def attention(self) -> AttentionConfig:
        """The layer whose FLOPs these are."""
        return AttentionConfig(
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            index_dim=self.index_dim,
            block_size=self.block_size,
            top_k=self.top_k,
            rope_dim=0,
        )

    @property
    def label(self) -> str:
        """What it is called while the benchmark runs."""
        title = BASELINES.get(self.subject, self.subject)
        training = ", training" if self.passes == TRAINING else ""
        return f"{title} at {self.length} tokens{training}" if self.length else title


def plan(
    lengths: Sequence[int],
    selections: Sequence[str],
    precisions: Sequence[str],
    baselines: Sequence[str],
    *,
    skip_dense_above: int,
    **fields: Any,
) -> list[Case]:
    """The cases of a run, the ceilings first and then by length, so that what is lost is the end.

    Args:
      lengths: tokens.
      selections: for "msa".
      precisions: for "msa".
      baselines: names of `BASELINES`.
      skip_dense_above: longest length at which the dense baselines are timed.
      **fields: of every case.
    """
    cases = [Case(CEILINGS, **fields)]
    for length in sorted(lengths):
        if selections:
            cases.append(Case(MSA, length, tuple(selections), tuple(precisions), **fields))
        for name in baselines:
            if name not in DENSE or length <= skip_dense_above:
                cases.append(Case(name, length, **fields))
    return cases


def phase(name: str) -> None:
    """Says what this process does from now on; the runner reads the clock."""
    print(PHASE + name, flush=True)


def parse_length(text: str) -> int:
    """8192, 8K or 1M as a number of tokens.

    Raises:
      ConfigError: it is none.
    """
    factor = {"K": 2**10, "M": 2**20}.get(text[-1:].upper(), 1)
    digits = text[:-1] if factor > 1 else text
    if not digits.isdigit() or int(digits) == 0:
        raise ConfigError(f"{text!r} is not a number of tokens: write 8192, 8K or 1M")
    return int(digits) * factor
